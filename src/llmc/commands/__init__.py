"""One file per `llmc` command: add_arguments(parser) and run(args) -> exit code. llmc.cli finds them by name."""
