"""Hugging Face's models and tokenizers, and GGUF: what reads and what writes them, and a module for each model family."""
