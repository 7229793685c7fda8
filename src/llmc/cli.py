"""`llmc` and `llmc-train`: finds the command, and turns an error into one line and an exit code.

Exit codes: 0 if all went well; 2 if the command line, a setting or a file name is wrong; 128 + n if signal n stopped the command
(130: Ctrl-C; 141: the program that read its output has ended); 1 for any other error.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

from llmc import _llmc
from llmc.arguments import Parser

COMMANDS = {
    "train": "train a model (the same as llmc-train)",
    "generate": "continue a text",
    "info": "show version, compiler, instruction sets, threads, GPU",
    "check": "check the kernels of this machine, CPU or GPU",
    "data": "download or tokenise a data set",
    "import": "convert a Hugging Face model into an llm.c checkpoint",
    "export": "convert a checkpoint into a Hugging Face folder, or GGUF for llama.cpp",
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
    arguments = list(sys.argv[1:] if argv is None else argv)
    return report_errors(prog, lambda: _run(arguments, prog), debug=True)  # a command reports its errors itself


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run the `llmc-train` command.

    Args:
        argv: the arguments after the program's name; None takes them from sys.argv.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return report_errors("llmc-train", lambda: run_command("train", arguments, prog="llmc-train"), debug=True)


def _run(argv: Sequence[str], prog: str) -> int:
    """Find the command and run it: it comes first."""
    listing = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog=prog,
        description="GPT-2 and GPT-3 pretraining with hand-written kernels.",
        epilog=f"commands:\n{listing}\n\n`{prog} COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"llmc {_llmc.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name: str = parser.parse_args(argv[:1]).command
    return run_command(name, argv[1:], prog=f"{prog} {name}")


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Parse the arguments of one command and run it.

    Args:
        name: a key of COMMANDS.
        argv: the arguments after the command.
        prog: what help texts and errors call the command, as "llmc plot".

    Returns:
        The exit code.
    """
    module = command(name)
    parser = parser_of(name, prog)
    args = parser.parse_args(argv)
    args.argv = list(argv)
    return report_errors(prog, lambda: module.run(args), debug=args.debug)


def command(name: str) -> ModuleType:
    """Return the module of a command. name: a key of COMMANDS."""
    return importlib.import_module(f"llmc.commands.{name}_" if name == "import" else f"llmc.commands.{name}")


def parser_of(name: str, prog: str) -> Parser:
    """Return the parser of a command's arguments. name: a key of COMMANDS; prog: as of run_command()."""
    parser = Parser(
        prog=prog,
        description=(command(name).__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    short = () if name == "train" else ("-h",)  # train has llm.c's flag for HellaSwag, which is help if it stands alone
    parser.add_argument(*short, "--help", action="help", help="show this and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name == "train":
        parser.add_argument("--version", action="version", version=f"llmc {_llmc.__version__}")
    command(name).add_arguments(parser)
    return parser


def show_any_text() -> None:
    """Make stdout write "?" for a character that the console's encoding lacks, instead of raising an error.

    Consoles of Windows have such encodings (cp1252, cp936, ...). stderr needs no change: Python writes \\u escapes there.
    """
    # A program that a service started, or a shell with >&-, may have no such streams.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def report_errors(prog: str, action: Callable[[], int | None], debug: bool = False) -> int:
    """Call action, and report an expected error, and each warning, as one line on stderr.

    Args:
        prog: the name that the line begins with.
        action: returns an exit code, or None for 0.
        debug: raise an expected error again, so that Python shows its traceback.

    Returns:
        The exit code. An error that is not expected (a bug) is raised.
    """
    show_any_text()

    def warn(message: Warning | str, *rest: object, **more: object) -> None:
        print(f"{prog}: warning: {message}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, warn
    try:
        try:
            return action() or 0
        finally:
            print(end="", flush=True)  # here a pipe that has closed, or a full disk, can still be answered
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that reads this one's output has ended: `llmc ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest there when it ends
        return 141
    except _EXPECTED_ERRORS as e:
        if debug:
            raise
        print(f"{prog}: error: {_message(e)}", file=sys.stderr)
        return 2 if isinstance(e, _USAGE_ERRORS) else 1
    finally:
        warnings.showwarning = before


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        length = len(os.path.abspath(error.filename)) if sys.platform == "win32" else 0
        limit = " (longer than the 247 characters of a folder, 259 of a file that Windows takes unless LongPathsEnabled is set)"
        return f"{error.filename}: {error.strerror}{limit if length > 247 else ''}"
    return str(error) or type(error).__name__
