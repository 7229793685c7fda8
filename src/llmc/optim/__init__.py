"""Optimizers, and schedules of the learning rate and of the batch size."""
