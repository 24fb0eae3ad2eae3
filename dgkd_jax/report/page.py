"""The HTML of a report: one file that loads nothing, readable on phones and large screens, in light and dark mode."""

import html
from collections.abc import Sequence
from typing import NamedTuple

_CSS = """
:root { color-scheme: light dark; --ink: #1d1e20; --soft: #5c6068; --ground: #ffffff; --panel: #f4f5f7; --line: #d9dce1;
  --accent: #0b62a8; --warn-ground: #fff6e0; --warn-line: #d9a21b;
  --shadow: rgb(0 0 0 / .28); }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #a2a8b3; --ground: #15171a; --panel: #1e2125;
  --line: #363b43; --accent: #79b8f2; --warn-ground: #2d2716; --warn-line: #b98a1f;
  --shadow: rgb(255 255 255 / .3); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .5rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h2.data { font-size: 1.5rem; margin-top: 3.5rem; border-top: 3px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p, ul { max-width: 46rem; margin: .4rem 0 .8rem; }
.soft { color: var(--soft); font-size: .92rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; font-size: .92rem; }
a { color: var(--accent); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.missing { border-left: 3px solid var(--warn-line); background: var(--warn-ground); padding: .5rem .8rem;
  margin: .6rem 0; max-width: 46rem; font-size: .92rem; overflow-wrap: anywhere; }
.missing ul { margin: 0; padding-left: 1.1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem 1.6rem;
  align-items: start; margin: .8rem 0; }
figure { margin: 0; min-width: 0; max-width: 34rem; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
/* A table that is too wide scrolls in its box; a shadow is at each edge behind which there is more. */
.scroll { overflow-x: auto; max-width: 100%; width: fit-content; margin: .6rem 0 1rem; padding: 0 .6rem;
  border: 1px solid var(--line); border-radius: 4px;
  background: linear-gradient(to right, var(--ground) 40%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--ground) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--shadow), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shadow), transparent) right / 1rem 100% no-repeat scroll; }
.scroll tbody tr:last-child td { border-bottom: none; }
abbr { text-decoration: underline dotted; text-underline-offset: .2em; cursor: help; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .text { text-align: left; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .4rem; }
details { margin: .5rem 0; max-width: 100%; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow: auto; background: var(--panel); padding: .8rem; border-radius: 4px; max-height: 28rem; font-size: .8rem;
  line-height: 1.4; }
.swatch { display: inline-block; width: .75em; height: .75em; margin-right: .45em; border-radius: 2px; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""

_LONGEST_TITLE = 2000


class Markup(str):
    """Text that is already HTML; `escape` does not change it."""

    __slots__ = ()


class Section(NamedTuple):
    """A section of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        body: HTML.
    """

    name: str
    title: str
    body: str


def escape(text: object) -> str:
    """Escape text for HTML."""
    return text if isinstance(text, Markup) else html.escape(str(text))


def paragraph(text: object, *, soft: bool = False) -> str:
    """A paragraph; `soft` for explanations."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def code(text: object) -> Markup:
    """A command or a file name."""
    return Markup(f"<code>{html.escape(str(text))}</code>")


def missing(sentences: Sequence[object]) -> str:
    """A box that lists what is missing; '' if nothing is."""
    if not sentences:
        return ""
    return f'<div class="missing"><ul>{"".join(f"<li>{escape(each)}</li>" for each in sentences)}</ul></div>'


def figure_grid(drawn: Sequence[tuple[str, str]]) -> str:
    """Figures next to each other where there is room.

    Args:
        drawn: (description for screen readers, SVG) of each figure.
    """
    if not drawn:
        return ""
    inside = "".join(
        f'<figure role="img" aria-label="{html.escape(described, quote=True)}">{svg}</figure>'
        for described, svg in drawn
    )
    return f'<div class="figures">{inside}</div>'


def table(header: Sequence[object], rows: Sequence[Sequence[object]], *, text: Sequence[int] = (0,)) -> str:
    """A table that scrolls on its own if it is too wide.

    Args:
        header: a cell for each column.
        rows: of cells.
        text: columns with words, which are aligned left; the others are numbers.
    """

    def line(cells: Sequence[object], tag: str) -> str:
        kind = dict.fromkeys(text, ' class="text"')
        return "".join(f"<{tag}{kind.get(i, '')}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<tr>{line(header, 'th')}</tr>"
    # With a tabindex the box can be scrolled by keys.
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def details(summary: object, body: str) -> str:
    """A box that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def shortened(text: object, length: int = 24) -> str:
    """A text of at most `length` characters; the whole one shows when the pointer rests on it."""
    whole = str(text)
    if len(whole) <= length:
        return whole
    return abbreviation(f"{whole[: length - 1]}…", whole[:_LONGEST_TITLE])


def abbreviation(text: str, meaning: str) -> Markup:
    """A text whose meaning shows when the pointer rests on it."""
    return Markup(f'<abbr title="{html.escape(meaning, quote=True)}">{html.escape(text)}</abbr>')


def swatch(colour: str, label: str) -> Markup:
    """A label next to its colour in the figures."""
    return Markup(f'<span class="swatch" style="background:{colour}"></span>{html.escape(label)}')


def document(title: str, introduction: str, parts: Sequence[tuple[str | None, Sequence[Section]]]) -> str:
    """The whole page.

    Args:
        title: of the page.
        introduction: HTML below it.
        parts: (heading, or None for no heading; sections) of each part.
    """
    body = []
    for number, (heading, sections) in enumerate(parts):
        ids = [section.name if len(parts) == 1 else f"{section.name}-{number + 1}" for section in sections]
        if heading is not None:
            body.append(f'<h2 class="data">{escape(heading)}</h2>')
        links = "".join(
            f'<a href="#{name}">{escape(section.title)}</a>' for name, section in zip(ids, sections, strict=True)
        )
        body.append(f"<nav>{links}</nav>")
        body += [
            f'<section id="{name}"><h2>{escape(section.title)}</h2>{section.body}</section>'
            for name, section in zip(ids, sections, strict=True)
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{introduction}</header><main>{''.join(body)}</main></body></html>\n"
    )
