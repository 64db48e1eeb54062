"""What a run costs: a model to multiply-accumulates, bits to BitOPs."""
