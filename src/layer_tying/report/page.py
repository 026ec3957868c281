"""The page as HTML, from the templates in this folder's ``templates/``.

The page is one file that needs no script, no font and nothing else from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from layer_tying.report.style import GRID, INK, MUTED, PAPER

PIXELS_PER_POINT = 1.55  # at which type of 9 points in a figure is as large as that of the page
_TEMPLATES = Environment(loader=PackageLoader("layer_tying.report"), autoescape=True)
_BLOCKS: Any = _TEMPLATES.get_template("blocks.html").module


def document(
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, Sequence[Markup]]],
) -> str:
    """The whole page: large numbers with what they are, then sections with their headings."""
    template = _TEMPLATES.get_template("report.html")
    return template.render(title=title, lead=lead, tiles=tiles, sections=sections)


def grid(blocks: Sequence[Markup]) -> Markup:
    """Figures side by side where the screen is wide enough."""
    return _BLOCKS.grid(blocks)


def note(text: str) -> Markup:
    """A short explanation under a table."""
    return _BLOCKS.note(text)


def details(summary: str, block: Markup) -> Markup:
    """A block that is folded away until asked for."""
    return _BLOCKS.details(summary, block)


def table(
    heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], kind: str = ""
) -> Markup:
    """A table that scrolls sideways; heads are (heading shared by neighbours, own name) pairs."""
    spans = [(heading, len(list(columns))) for heading, columns in groupby(heads, lambda h: h[0])]
    has_headings = any(heading for heading, _ in spans)
    names = [name for _, name in heads]
    cells = [[_cell(text) for text in row] for row in rows]
    return _BLOCKS.table(spans if has_headings else [], names, cells, kind)


def figure(svg: str, name: str, caption: str, is_wide: bool) -> Markup:
    """A figure from matplotlib's SVG, drawn in the page's own ink, and its caption."""
    caption = caption[:1].upper() + caption[1:]
    return _BLOCKS.figure(_inline(svg, name, caption), caption, is_wide)


def _cell(text: str) -> Markup:
    """One cell: spreads of lesser weight, unfinished runs marked."""
    html = re.sub(r"(± [\d,.]+)", r"<i>\1</i>", escape(text))
    mark = r'<span class="mark">\1</span>'
    return Markup(re.sub(r"(, (?:[0-9]+ )?unfinished$)", mark, html))


def _inline(svg: str, name: str, label: str) -> Markup:
    """The SVG element alone, its ids its own, its text and rules in the page's variables.

    It fills its place on a small screen, and on a large one stops where its type is as large as
    that of the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', svg)
    assert view is not None  # matplotlib always writes one
    width = PIXELS_PER_POINT * float(view[1])
    opening = (
        f'<svg {view[0]} style="max-width: {width:.0f}px" role="img" aria-label="{escape(label)}">'
    )
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)
