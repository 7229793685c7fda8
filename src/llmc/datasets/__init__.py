"""Data sets, which are downloaded, tokenised, and written as llm.c's files.

Each has a module with a function prepare(), which `llmc data NAME` and dev/data/NAME.py call; text and tokens are for your own data.
common, download and archive are what they share.
"""
