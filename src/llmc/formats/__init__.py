"""One module for each section of doc/formats.md: how a file is laid out, with its reader beside its writer."""
