"""What the site has besides documents: pages of the code that they link to, the help of commands, and the order of everything."""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache, partial
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight, lexers
from pygments.formatters import HtmlFormatter
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment.adapters.toctree import global_toctree_for_doc
from sphinx.util.docutils import SphinxDirective

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^()#\s]+)(#[^()\s]*)?(?=\))")  # [text](PATH#ANCHOR), without a scheme
ENTRY = re.compile(r"^(?:-|\d+\.) \[([^\]]+)\]\(([^)]+)\)", re.MULTILINE)


def add_tables_of_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """Make the site's order of doc/index.md: of each of its sections the lists of links."""
    if document == app.config.root_doc:
        for section in source[0].split("\n## ")[1:]:
            entries = "\n".join(f"{title} <{path}>" for title, path in ENTRY.findall(section))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {section.splitlines()[0]}\n\n{entries}\n```\n"


def mark_links_to_code(app: Sphinx, document: str, source: list[str]) -> None:
    """Turn links to files and folders that are no documents into source:PATH#ANCHOR, PATH from the root of the clone."""
    folder = Path(app.env.doc2path(document)).parent

    def marked(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        if path.suffix in (".svg", ".png") or not path.is_relative_to(app.srcdir) or not path.exists():
            return link[0]
        if app.env.path2doc(path) in app.env.found_docs:
            return link[0]
        return f"source:{path.relative_to(app.srcdir).as_posix()}{link[2] or ''}"

    source[0] = LINK.sub(marked, source[0])


def page_of(path: str) -> str:
    """Return the name of a file's page. A dot at the beginning of a name would hide it from some web servers."""
    return re.sub(r"(?<![^/])\.", "_", path)


def resolve_links_to_code(app: Sphinx, doctree: nodes.document, document: str) -> None:
    """Lead them to the pages that pages_of_code() makes."""
    for reference in doctree.findall(nodes.reference):
        if reference.get("refuri", "").startswith("source:"):
            path, _, anchor = reference["refuri"].removeprefix("source:").partition("#")
            reference["refuri"] = app.builder.get_relative_uri(document, page_of(path)) + (anchor and f"#{anchor}")


def pages_of_code(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page for each file or folder that documents link to, and for each file of such a folder."""
    wanted = {
        app.srcdir / reference["refuri"].removeprefix("source:").partition("#")[0]
        for document in app.env.found_docs
        for reference in app.env.get_doctree(document).findall(nodes.reference)
        if reference.get("refuri", "").startswith("source:")
    }
    wanted |= {path for folder in wanted if folder.is_dir() for path in text_files(folder)}

    @cache
    def contents(depth: int, **options: Any) -> str:
        """Return the contents of the site for pages so deep in folders. Sphinx would make them anew for each, for half a minute."""
        tree = global_toctree_for_doc(app.env, "-/" * depth + "-", app.builder, tags=app.tags, **options)
        return app.builder.render_partial(tree)["fragment"]

    for path in sorted(wanted):
        name = path.relative_to(app.srcdir).as_posix()
        body = f"<h1>{escape(name)}</h1>{listing(path) if path.is_dir() else code(path)}"
        context = {"title": name, "body": body, "toctree": partial(contents, name.count("/"))}
        yield page_of(name), context, "page.html"


def text_files(folder: Path) -> list[Path]:
    """Return the files of text in a folder, without those that are hidden or made."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.suffix not in (".so", ".pyd", ".png", ".svg")]


def listing(folder: Path) -> str:
    """Return a list of what is in a folder, with links to the pages of files. The folder's page lies beside it."""
    items = [escape(path.name) + "/" for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] not in "._"]
    items += [f'<a href="{folder.name}/{path.name}.html">{escape(path.name)}</a>' for path in text_files(folder)]
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def code(path: Path) -> str:
    """Return a file as highlighted code, whose line n has the anchor Ln, as on GitHub."""
    text = path.read_text(encoding="utf-8")
    try:
        lexer = lexers.get_lexer_for_filename(path.with_suffix(".cpp") if path.suffix == ".h" else path)
    except lexers.ClassNotFound:
        lexer = lexers.guess_lexer(text) if text.startswith("#!") else lexers.TextLexer()
    lexer.stripnl = False  # empty lines at the beginning count
    lines = highlight(text, lexer, HtmlFormatter(nowrap=True)).splitlines()
    numbered = (f'<span id="L{n}"><a href="#L{n}"></a>{line}\n</span>' for n, line in enumerate(lines, 1))
    return f'<div class="highlight source"><pre>{"".join(numbered)}</pre></div>'


def escape_markup(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Take docstrings for plain text with code in backticks: other marks of reStructuredText mean themselves."""
    for i, line in enumerate(lines):
        parts = re.split("(`+[^`]*`+)", line)
        parts[::2] = [re.sub(r"[*|\\]|_(?!\w)", r"\\\g<0>", text) for text in parts[::2]]
        parts[1::2] = [f"``{text.strip('`')}``" for text in parts[1::2]]
        lines[i] = "".join(parts)


def shorten_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str, returned: str
) -> Any:
    """Show types by their last names, and no self: signatures of bindings have both."""

    def short(signature: str | None) -> str | None:
        return signature and re.sub(r"(?<![~\w.'\"])(?=(?:[a-z_]\w*\.)+[A-Z])", "~", signature)

    return short(arguments and re.sub(r"^\(self: [\w.]+(, )?", "(", arguments)), short(returned)


def unlink_builtins(app: Sphinx, doctree: nodes.document) -> None:
    """Make plain text of Python's own types in signatures: "bytes" would be looked for among our attributes."""
    for reference in list(doctree.findall(addnodes.pending_xref)):
        if reference.get("refdomain") == "py" and hasattr(builtins, reference["reftarget"]):
            reference.replace_self(reference.children)


def highlight_printed_code(app: Sphinx, doctree: nodes.document) -> None:
    """Highlight what cells of notebooks print of the code: by run.source() or their own show(), or inspect.getsource()."""
    for cell in doctree.findall(lambda node: isinstance(node, nodes.container) and "cell" in node["classes"]):
        source = cell.children[0].astext()
        language = (
            "cpp"
            if re.search(r"\brun\.source\(|^show\(", source, re.M)
            else "python"
            if "getsource(" in source
            else None
        )
        for block in cell.findall(nodes.literal_block):
            if language and "cell_output" in block.parent["classes"]:
                block["language"] = language


class CommandHelp(SphinxDirective):
    """The help of a command of llmc: {command-help} data text."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return it as a block of code."""
        from llmc.cli import main

        os.environ["COLUMNS"] = "92"
        with redirect_stdout(StringIO()) as printed:
            try:
                main([*self.arguments[0].split(), "--help"])
            except SystemExit as e:
                if e.code:
                    raise self.error(f"there is no command '{self.arguments[0]}'") from None
        return [nodes.literal_block(printed.getvalue(), printed.getvalue(), language="text")]


def lead_to_index(app: Sphinx, error: Exception | None) -> None:
    """Write the page at the root of the site, which leads to that of the root document."""
    if error is None and app.builder.format == "html":
        url = app.builder.get_target_uri(app.config.root_doc)
        page = f'<!doctype html><meta charset="utf-8"><title>llmc</title><meta http-equiv="refresh" content="0; url={url}">\n'
        (app.outdir / "index.html").write_text(f'{page}<a href="{url}">llmc</a>\n', encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect all of it."""
    app.add_directive("command-help", CommandHelp)
    app.connect("source-read", add_tables_of_contents)
    app.connect("source-read", mark_links_to_code)
    app.connect("autodoc-process-docstring", escape_markup, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("doctree-read", unlink_builtins)
    app.connect("doctree-read", highlight_printed_code)
    app.connect("doctree-resolved", resolve_links_to_code)
    app.connect("html-collect-pages", pages_of_code)
    app.connect("build-finished", lead_to_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
