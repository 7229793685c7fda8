"""The subcommands of `llmc`: one module each, with add_arguments(parser) and run(args)."""
