"""Regressions on tables of retrainings."""
