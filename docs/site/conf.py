"""The documentation site: `make docs` builds docs/ and the docstrings into build/site."""

import re

from dgkd_jax import __version__, models
from dgkd_jax.methods.__main__ import table

project = "dgkd_jax"
version = release = __version__
copyright = "the authors of dgkd_jax. Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["figures"]
html_theme = "furo"
html_title = "dgkd_jax"

myst_enable_extensions = ["dollarmath", "amsmath", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"methods": table(), "networks": ", ".join(f"`{name}`" for name in models.NAMES)}
nb_execution_mode = "off"  # tests/test_tutorial.py executes the notebook; the site shows the outputs that it holds

highlight_language = "none"  # of indented blocks: shell commands, trees of files, tables
default_role = "code"  # docstrings mark code with single backquotes
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True  # the attributes of a class stand in its docstring, once
napoleon_use_rtype = False


def _math_as_on_github(app, docname, source):
    """GitHub's two ways to write LaTeX, as MyST writes them."""
    source[0] = re.sub(r"\$`(.+?)`\$", r"$\1$", source[0])
    source[0] = source[0].replace("```math\n", "```{math}\n")


def _blocks_as_written(app, what, name, obj, options, lines):
    """Indented blocks and tables of a docstring's text are shown as they are written, as Markdown would."""
    end = next((i for i, line in enumerate(lines) if line.startswith((":", ".."))), len(lines))
    text = [f"    {line}" if line.startswith("|") else line for line in lines[:end]]
    shown, before = [], ""
    for line in text:
        if line.startswith("    ") and not shown[-1] and not before.startswith("    "):
            shown += ["::", ""]
        shown.append(line)
        before = line or before
    lines[:end] = shown


def setup(app):
    app.connect("source-read", _math_as_on_github)
    app.connect("autodoc-process-docstring", _blocks_as_written)  # after napoleon
