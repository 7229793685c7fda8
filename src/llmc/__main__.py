"""`python -m llmc` is `llmc`."""

import sys

from llmc.cli import main

sys.exit(main(prog="python -m llmc"))
