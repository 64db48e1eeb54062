"""Measurements: ratios of interleaved runs, never a lone clock."""
