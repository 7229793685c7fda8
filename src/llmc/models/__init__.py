"""Models: their shape, their weights on a device, and generation."""
