"""Curvature of a loss: its factors, its inverse, how much of it to damp."""
