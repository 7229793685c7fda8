"""A training run: its settings, what is built from them, the loop, and what it says and keeps."""
