"""Pieces of HTML. Everything that comes from runs goes through `escape`: responses are text that anybody may write."""

from __future__ import annotations

import html
from collections.abc import Sequence

MAX_CHARACTERS = 700  # of a response


def escape(text: object) -> str:
    """Text as HTML that shows it, without characters that would change how the rest is read."""
    printable = "".join(x if x.isprintable() or x == "\n" else " " for x in str(text))
    return html.escape(printable, quote=True)


def shortened(text: str, most: int = MAX_CHARACTERS) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[:most]} …"


def paragraphs(texts: Sequence[str], kind: str = "p") -> str:
    """A paragraph, or another element, a text."""
    return "".join(f"<{kind}>{escape(text)}</{kind}>\n" for text in texts)


def listed(texts: Sequence[str]) -> str:
    """A list of texts."""
    return f"<ul>\n{paragraphs(texts, 'li')}</ul>\n"


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], best: frozenset[tuple[int, int]] = frozenset()
) -> str:
    """A table that scrolls in its own frame.

    Args:
        caption: what it shows. heads: texts. rows: cells, which are HTML already; one that ends a row of heads is text.
        best: rows and columns of cells that stand out.
    """
    lines = [f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>']
    lines.append(f"<caption>{escape(caption)}</caption>")
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines.append(f"<thead><tr>{columns}</tr></thead><tbody>")
    for i, row in enumerate(rows):
        cells = [f'<th scope="row">{row[0]}</th>']
        for j, cell in enumerate(row[1:], start=1):
            mark = ' class="best"' if (i, j) in best else ""
            cells.append(f"<td{mark}>{cell}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>\n"])


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that the navigation leads to."""
    return f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escape(title)}</h2>\n' + (
        "".join(parts) + "</section>\n"
    )
