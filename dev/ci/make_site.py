"""Puts `llmc`, with the extension that was built in a folder, into that folder's `site`: python dev/ci/make_site.py BUILD

Prints the site's path, which belongs first on PYTHONPATH. There it comes before an llmc that is installed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "llmc"

# Python runs this at its start. An editable llmc is found by a finder that would be asked before PYTHONPATH is searched.
SITECUSTOMIZE = """\
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


def make_site(build: Path) -> Path:
    """Make the site anew, and return its path."""
    site = build / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(SOURCE, site / "llmc", ignore=shutil.ignore_patterns("__pycache__", "_llmc*.so"))
    for library in build.glob("_llmc*.so"):
        shutil.copy2(library, site / "llmc")
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    return site


if __name__ == "__main__":
    print(make_site(Path(sys.argv[1]).resolve()))
