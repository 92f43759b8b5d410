"""The report as one self-contained HTML page: figures inside, nothing fetched, legible in print."""

from __future__ import annotations

import base64
import re
from html import escape
from typing import Any, NamedTuple

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
tr.paper { color: #666; font-style: italic } .pass { color: #00684a } .fail { color: #b23800; font-weight: bold }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption, .note { color: #555; font-size: .92rem }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem }
@media print { h2 { break-before: auto } figure, table { break-inside: avoid } }
"""


class Section(NamedTuple):
    """A heading, and HTML under it."""

    title: str
    body: str


def page(title: str, introduction: str, sections: list[Section]) -> str:
    """Return the whole page."""
    body = "".join(f"<section><h2>{escape(s.title)}</h2>{s.body}</section>" for s in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>{introduction}</p>{body}</body></html>\n"
    )


def table(heads: list[str], rows: list[list[Any]], paper: int = 0) -> str:
    """Return a table; the last `paper` rows are marked as figures of the paper."""
    lines = ["<table><thead><tr>", *(f"<th>{escape(head)}</th>" for head in heads), "</tr></thead><tbody>"]
    for index, row in enumerate(rows):
        lines.append('<tr class="paper">' if index >= len(rows) - paper else "<tr>")
        for cell in row:
            number = isinstance(cell, (int, float))
            lines.append(f'<td class="number">{cell}</td>' if number else f"<td>{_cell(cell)}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def _cell(cell: Any) -> str:
    if isinstance(cell, Html):
        return cell
    return re.sub(r"(\[[\d.]+,) ([\d.]+\])", r"\1&nbsp;\2", escape(str(cell)))  # an interval stays on one line


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def figure(png: bytes, caption: str) -> str:
    """Return an image, embedded, with its caption."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
