"""What changes a network: its tensors, its layers, and the optimizer along with them."""
