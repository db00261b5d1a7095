"""The settings of Sphinx for the site that `make docs` builds from the Markdown pages and the docstrings.

The folder of sources is the whole checkout, so that a link between two pages is the same here and on GitHub. The lists
of pages in docs/index.md, docs/api/index.md and docs/examples/index.md are also the site's contents.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from myst_parser.parsers.sphinx_ import MystParser  # noqa: E402
from sphinx.pycode import ModuleAnalyzer  # noqa: E402

import lstm_ext  # noqa: E402

project = "lstm_ext"
release = lstm_ext.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "tests/simt/README.md",
    "tests/simt/ptx/README.md",
    "CHANGELOG.md",
    "examples/*.ipynb",
]
exclude_patterns = ["build", "dist", ".*", "csrc", "lstm_ext", "benchmarks"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"lstm_ext {release}"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"

myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
# The names of other sites that ours links to. The lists are here, so that a build needs no network.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", str(ROOT / "docs" / "names_python.txt")),
    "torch": ("https://docs.pytorch.org/docs/stable/", str(ROOT / "docs" / "names_torch.txt")),
}
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# A line of a list of pages: what it says of a page, and where it is.
_ENTRY = re.compile(r"^- \[([^\]]+)\]\((?!https?:)([^)#\s]+\.(?:md|ipynb))\)", flags=re.MULTILINE)


def _contents(app: Any, docname: str, source: list[str]) -> None:
    """Makes the lists of pages the site's contents: one part for each heading, after the page's text."""
    if not docname.endswith("/index"):
        return
    for part in re.split(r"^## ", source[0], flags=re.MULTILINE):
        pages = [f"{text} <{page}>" for text, page in _ENTRY.findall(part)]
        if pages:
            caption = part.split("\n", 1)[0].strip("# ")
            source[0] += "\n\n" + "\n".join(
                ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
            )


def _leave_out_summaries(app: Any, docname: str, source: list[str]) -> None:
    """Of the pages of the API: the docstrings, which only the site has, begin with the same lines."""
    if docname.startswith("docs/api/"):
        source[0] = re.sub(r"^(## .*\n\n)(?:.+\n)+\n(?=Sources?: )", r"\1", source[0], flags=re.MULTILINE)


def _hide_overloads() -> None:
    """One signature for each function. Overloads are for type checkers, and a page has the same in words."""
    for name in [name for name in sys.modules if name.startswith("lstm_ext.")]:
        if str(getattr(sys.modules[name], "__file__", "")).endswith(".py"):
            analyzer = ModuleAnalyzer.for_module(name)
            analyzer.analyze()
            analyzer.overloads.clear()


def _first_page(app: Any, error: Exception | None) -> None:
    """index.html at the top, beside those of search and index."""
    if error is None:
        Path(app.outdir, "index.html").write_text(
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
            '<a href="docs/index.html">lstm_ext</a>\n'
        )


class NotebookParser(MystParser):
    """A notebook as a page: its text, its code, and the outputs that are stored in it."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(source)
                continue
            parts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    parts.append(f"```text\n{''.join(output['text'])}```")
                elif "image/png" in output.get("data", {}):
                    parts.append(f"![output](data:image/png;base64,{output['data']['image/png'].strip()})")
        super().parse("\n\n".join(parts), document)


def setup(app: Any) -> dict[str, Any]:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    _hide_overloads()
    app.connect("source-read", _contents)
    app.connect("source-read", _leave_out_summaries)
    app.connect("build-finished", _first_page)
    return {"parallel_read_safe": True}
