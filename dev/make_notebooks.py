"""Makes the notebooks of the tutorials: python dev/make_notebooks.py [layernorm ...]

doc/NAME/NAME.py is the source, in jupytext's percent format. Its cells are executed from the first to the last, in a process of their
own, and written with what they show to doc/NAME/NAME.ipynb, which GitHub and the site render as it is. With --small they are executed at
small size, to see whether they run, and written to build/notebooks. With --text nothing is executed: for a sentence or a link that has
changed, the outputs stay those that the notebook has. It needs what `pip install ".[docs]"` brings, and llmc.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}


def tutorials() -> dict[str, Path]:
    """Return the scripts of the tutorials by their names: each in a folder of doc/ that has its name."""
    scripts = sorted(ROOT.glob("doc/*/*.py"))
    return {script.stem: script for script in scripts if script.stem == script.parent.name}


def read(script: Path) -> Any:
    """Return the notebook of a script, not executed. The same script gives the same bytes."""
    notebook = jupytext.read(script, fmt="py:percent")
    new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    return nbformat.v4.new_notebook(
        metadata=METADATA,
        cells=[
            new[cell.cell_type](cell.source, id=f"{script.stem}-{number}") for number, cell in enumerate(notebook.cells)
        ],
    )


def execute(notebook: Any, folder: Path) -> None:
    """Execute all cells in a folder. Raises RuntimeError if one fails, warns, or shows where the clone is."""
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--InlineBackend.figure_format=retina", "--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as e:
        raise RuntimeError(str(e)) from None
    notebook.metadata = METADATA  # without the version of the Python that executed it
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(f"this cell:\n{cell.source}\nwrites to stderr:\n{output.text}")
            for place in (str(ROOT), str(Path.home())):
                if place in str(output):
                    raise RuntimeError(f"this cell:\n{cell.source}\nshows a path of this machine, {place}")


def keep_outputs(notebook: Any, path: Path) -> None:
    """Take the outputs of the notebook that was executed. Raises RuntimeError if its code is not that of the script."""
    old, new = (
        [cell for cell in cells if cell.cell_type == "code"]
        for cells in (nbformat.read(path, as_version=4).cells, notebook.cells)
    )
    if [cell.source for cell in old] != [cell.source for cell in new]:
        raise RuntimeError("its code has changed, so it has to be executed: without --text")
    for before, cell in zip(old, new):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count


def main() -> int:
    scripts = tutorials()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scripts)}; without one: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--small", action="store_true", help="small sizes, into build/notebooks: to see whether they run")
    how.add_argument("--text", action="store_true", help="write what the text cells say now, and execute nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(scripts):
        parser.error(f"no tutorial is called {', '.join(sorted(unknown))}: there are {', '.join(scripts)}")
    os.environ.pop("LLMC_SMALL", None)
    if arguments.small:
        os.environ["LLMC_SMALL"] = "1"
    for name in arguments.names or scripts:
        notebook = read(scripts[name])
        path = (ROOT / "build" / "notebooks" if arguments.small else scripts[name].parent) / f"{name}.ipynb"
        try:
            if arguments.text:
                keep_outputs(notebook, path)
            else:
                execute(notebook, scripts[name].parent)
        except RuntimeError as e:
            print(f"{name}: {e}", file=sys.stderr)
            return 1
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
