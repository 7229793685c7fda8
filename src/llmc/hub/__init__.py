"""Hugging Face's models and tokenizers: what reads them, what writes them, and a module for each model family."""
