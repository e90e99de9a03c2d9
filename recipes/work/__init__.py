"""The work of each command line, as functions."""
