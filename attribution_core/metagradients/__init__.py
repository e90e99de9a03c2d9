"""The derivative of a whole training, backwards and forwards."""
