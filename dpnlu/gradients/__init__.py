"""Per-example gradients of any torch model. Knows nothing of privacy."""
