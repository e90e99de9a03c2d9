"""How a model comes to the outputs it should have: the parts of `applied.unlearning`."""
