"""Data sets: downloaded, tokenised, and written as llm.c's files.

One module for each, with a function prepare(); `llmc data NAME` and dev/data/NAME.py call the same. text is for your own.
"""
