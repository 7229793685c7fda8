"""`python -m llmc` runs the `llmc` command."""

import sys

from llmc.cli import main

sys.exit(main(prog="python -m llmc"))
