"""From text to batches: documents, tokenizers, token shards, the loader."""
