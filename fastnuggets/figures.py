"""Charts, pictures and tables of the demos' pages: everything inside the page, in its own colours."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastnuggets.molecules.files import need

INK = "#010203"  # replaced by the text colour of the page


def pyplot() -> Any:
    need("matplotlib").use("Agg")
    return need("matplotlib.pyplot")


def png(figure: Any, dpi: int = 150, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, **{"transparent": True, **options})
    pyplot().close(figure)
    return file.getvalue()


def image(data: bytes, alternative: str) -> str:
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def chart(width: float, height: float) -> tuple[Any, Any]:
    plots = pyplot()
    plots.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "0"})
    figure, axis = plots.subplots(figsize=(width, height))
    bare(axis)
    return figure, axis


def bare(axis: Any) -> None:
    """The page's style: no frame, a faint grid, the text's colour."""
    axis.tick_params(colors=INK, length=0)
    axis.grid(color=INK, alpha=0.12, linewidth=0.8)
    for spine in axis.spines.values():
        spine.set_visible(False)


def svg(figure: Any, label: str) -> str:
    file = io.StringIO()
    figure.tight_layout(pad=0.3)
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    pyplot().close(figure)
    text = file.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(INK, "currentColor")
        .replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    )
    text = text.replace("xlink:href", "href").replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    start, end = text.find("<metadata>"), text.find("</metadata>")
    return text[:start] + text[end + len("</metadata>") :] if start >= 0 else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def tiled(tiles: Iterable[tuple[str, str]]) -> str:
    """What stands on top of a page: numbers, each with its text."""
    return "".join(f'<div class="tile"><b>{number}</b><span>{text}</span></div>' for number, text in tiles)


def share(value: float) -> str:
    return "–" if math.isnan(value) else f'<b class="bar" style="--v:{value:.3f}">{100 * value:.1f}</b>'


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
