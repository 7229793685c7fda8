"""`llmc` and `llmc-train`: finds the command, and turns an error into one line and an exit code.

Exit codes: 0 if all went well; 2 if the command line, a setting or a file name is wrong; 128 + n if signal n stopped the command;
1 for any other error.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from llmc import _llmc

COMMANDS = {
    "train": "train a model (the same as llmc-train)",
    "generate": "continue a text",
    "info": "show version, compiler, instruction sets, threads, GPU",
    "check": "check the kernels of this machine, CPU or GPU",
    "data": "download or tokenise a data set",
    "import": "convert a Hugging Face model into an llm.c checkpoint",
    "export": "convert a checkpoint into a Hugging Face folder",
    "eval": "compute validation loss, HellaSwag or MMLU of a checkpoint",
    "plot": "plot the curves of one run or several",
    "watch": "follow a run from another terminal",
    "sweep": "train many runs over lists of settings",
}

# Errors that the caller can mend, by other arguments or other files.
_USAGE_ERRORS = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
_EXPECTED_ERRORS = (*_USAGE_ERRORS, _llmc.Error, OSError, MemoryError, ImportError)


def main(argv: Sequence[str] | None = None, prog: str = "llmc") -> int:
    """Run the `llmc` command.

    Args:
        argv: the arguments after the program's name; None takes them from sys.argv.
        prog: the program's name in help texts and errors: "llmc" or "python -m llmc".

    Returns:
        The exit code.
    """
    show_any_text()
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description="GPT-2 and GPT-3 pretraining with hand-written kernels.",
        epilog=f"commands:\n{listing}\n\n`{prog} COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--version] COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmc {_llmc.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    head, rest = argv[:1], argv[1:]
    name: str = parser.parse_args(head).command
    return run_command(name, rest, prog=f"{prog} {name}")


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run the `llmc-train` command.

    Args:
        argv: the arguments after the program's name; None takes them from sys.argv.

    Returns:
        The exit code.
    """
    show_any_text()
    return run_command("train", list(sys.argv[1:] if argv is None else argv), prog="llmc-train")


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Parse the arguments of one command and run it.

    Args:
        name: a key of COMMANDS.
        argv: the arguments after the command.
        prog: what help texts and errors call the command, as "llmc plot".

    Returns:
        The exit code.
    """
    module = importlib.import_module(f"llmc.commands.{name}_" if name == "import" else f"llmc.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(module.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", action="help", help="show this and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name == "train":
        parser.add_argument("--version", action="version", version=f"llmc {_llmc.__version__}")
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    args.argv = list(argv)
    return report_errors(prog, lambda: module.run(args), debug=args.debug)


def show_any_text() -> None:
    """Make stdout write "?" for a character that the console's encoding lacks, instead of raising an error.

    Consoles of Windows have such encodings (cp1252, cp936, ...). stderr needs no change: Python writes \\u escapes there.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def report_errors(prog: str, action: Callable[[], int | None], debug: bool = False) -> int:
    """Call action, and report an expected error as one line on stderr.

    Args:
        prog: the name that the line begins with.
        action: returns an exit code, or None for 0.
        debug: raise an expected error again, so that Python shows its traceback.

    Returns:
        The exit code. An error that is not expected (a bug) is raised.
    """
    show_any_text()
    try:
        return action() or 0
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that reads this one's output has ended: `llmc ... | head`
        sys.stderr.close()
        return 1
    except _EXPECTED_ERRORS as e:
        if debug:
            raise
        print(f"{prog}: error: {_message(e)}", file=sys.stderr)
        return 2 if isinstance(e, _USAGE_ERRORS) else 1


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        length = len(os.path.abspath(error.filename)) if sys.platform == "win32" else 0
        limit = " (longer than the 247 characters of a folder, 259 of a file that Windows takes unless LongPathsEnabled is set)"
        return f"{error.filename}: {error.strerror}{limit if length > 247 else ''}"
    return str(error) or type(error).__name__
