"""Which configurations are tried, in which order, and which go on. Knows no tensors."""
