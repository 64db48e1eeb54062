"""A train state, a step, and the loop around them."""
