"""What `llmc check` does: every op and a training step of this machine's kernels, beside NumPy."""
