"""A training as a chain of pure steps, and where along it a model stands."""
