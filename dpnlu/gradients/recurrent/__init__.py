"""One LSTM layer, both directions at once, as kernels that show the gradient of its gates."""
