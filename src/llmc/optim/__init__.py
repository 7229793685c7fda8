"""Optimizers, an average of the weights, and schedules of the learning rate and of the batch size."""
