"""HTML and CSS of the page: no script, no font and nothing else from anywhere but the file itself.

The content security policy in its head makes a browser refuse anything from a network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import groupby

from layer_tying.report.figures import GRID, INK, MUTED, PAPER

STYLE = """
:root { color-scheme: light dark; --paper: #fefefe; --ink: #1b1f25; --muted: #5c6470;
  --grid: #dfe2e7; --tile: #f4f6f8; --warm: #9a5b00; --dim: 1;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb;
  --muted: #9aa3ae; --grid: #30363e; --tile: #1e2227; --warm: #e3b260; --dim: .88; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 67rem; padding: 2.5rem 1.25rem 5rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 var(--sans); }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 3.5rem 0 1rem; }
.lead { color: var(--muted); margin: .4rem 0 2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr));
  gap: .75rem; }
.tile { background: var(--tile); border-radius: .6rem; padding: 1rem 1.15rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.25; font-weight: 620;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.tile span { color: var(--muted); font-size: .85rem; line-height: 1.4; display: block; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 1.75rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; min-width: 100%; }
th { font-weight: 500; color: var(--muted); }
th, td { text-align: right; padding: .4rem 0 .4rem 1.1rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }
thead tr:first-child th[colspan] { text-align: center; }
thead tr:last-child th { border-bottom: 1px solid var(--grid); }
tbody tr + tr td { border-top: 1px solid var(--grid); }
td i { font-style: normal; color: var(--muted); }
.left td, .left th { text-align: left; }
.mark { color: var(--warm); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem 2rem; }
figure { margin: 0 0 2.25rem; min-width: 0; }
.grid figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
.wide svg { min-width: 42rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg image, svg [id*=swatch] { filter: brightness(var(--dim)); }
figcaption, .note { color: var(--muted); font-size: .85rem; line-height: 1.5; max-width: 46rem;
  margin: .6rem 0 0; }
details { margin-top: 1.5rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--muted); margin-bottom: .75rem; }
@media (max-width: 40rem) { body { padding-top: 1.5rem; } h2 { margin-top: 2.5rem; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, lead: str, blocks: Sequence[str]) -> str:
    """The whole page."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{chr(10).join(blocks)}
</main>
</body>
</html>
"""


def section(title: str, blocks: Sequence[str]) -> str:
    """A titled part of the page."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{chr(10).join(blocks)}\n</section>"


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    cells = (
        f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in items
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def grid(blocks: Sequence[str]) -> str:
    """Figures side by side where the screen is wide enough."""
    return f'<div class="grid">{"".join(blocks)}</div>' if blocks else ""


def note(text: str) -> str:
    """A short explanation under a table."""
    return f'<p class="note">{escape(text)}</p>'


def details(title: str, block: str) -> str:
    """A block that is folded away until asked for."""
    return f"<details><summary>{escape(title)}</summary>{block}</details>"


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls sideways; heads are (heading shared by neighbours, own name) pairs."""
    upper = ""
    if any(heading for heading, _ in heads):
        spans = [
            (heading, len(list(columns))) for heading, columns in groupby(heads, lambda h: h[0])
        ]
        cells = (f'<th colspan="{width}">{escape(heading)}</th>' for heading, width in spans)
        upper = f"<tr>{''.join(cells)}</tr>"
    lower = "".join(f"<th>{escape(name)}</th>" for _, name in heads)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">\n<thead>{upper}<tr>{lower}</tr>'
        f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(svg: str, name: str, caption: str, is_wide: bool) -> str:
    """A figure from matplotlib's SVG, drawn in the page's own ink, and its caption."""
    kind = "scroll wide" if is_wide else "scroll"
    return (
        f'<figure><div class="{kind}">{_inline(svg, name, caption)}</div>'
        f"<figcaption>{escape(caption[:1].upper() + caption[1:])}</figcaption></figure>"
    )


def _cell(text: str) -> str:
    """One cell: spreads and units of lesser weight, unfinished runs marked."""
    text = escape(text)
    text = re.sub(r"(± [\d,.]+)", r"<i>\1</i>", text)
    return f"<td>{re.sub(r'(, (?:[0-9]+ )?unfinished$)', _MARK, text)}</td>"


_MARK = r'<span class="mark">\1</span>'


def _inline(svg: str, name: str, label: str) -> str:
    """The SVG element alone, its ids its own, its text and rules in the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {view[0] if view else ""} role="img" aria-label="{escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
