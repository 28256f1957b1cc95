"""Sweeps: their jobs, what has become of them, and going on with them."""
