"""Starts a run on many machines, and says beforehand what it will take."""
