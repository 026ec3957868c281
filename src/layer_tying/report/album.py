"""The figures of a page: drawn into it, and written to a folder next to it as SVG and PNG."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from layer_tying.report import page, style


class Album:
    """The figures of one page.

    Args:
        output: the page; its figures go into ``<stem>_figures/``.

    Attributes:
        written: the files, as far as they are written.

    Raises:
        OSError: if nothing can be written there.
    """

    def __init__(self, output: Path) -> None:
        self._folder = output.with_name(f"{output.stem}_figures")
        self._folder.mkdir(parents=True, exist_ok=True)
        self.written: list[Path] = []

    def show(self, name: str, figure: Figure, caption: str) -> Markup:
        """Write a figure under a name; returns it as HTML, with its caption."""
        svg, png = style.render(figure)
        for suffix, content in ((".svg", svg.encode()), (".png", png)):
            self.written.append(self._folder / (name + suffix))
            self.written[-1].write_bytes(content)
        return page.figure(svg, name, caption, is_wide=figure.get_figwidth() > style.NARROW)
