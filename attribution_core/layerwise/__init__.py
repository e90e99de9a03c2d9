"""A model seen layer by layer: per-example gradients without forming them."""
