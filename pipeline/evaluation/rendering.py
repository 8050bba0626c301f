"""Renders blocks of a report as Markdown and as one self-contained HTML page; also Markdown tables for plans and cards.

Takes blocks (kind, content) and the folder of their pictures; gives text.
"""

import base64
import html
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Block = tuple[str, Any]
"""(kind, content): text for "h1", "h2", "h3", "p" and for the verdict, which is "good", "unsure" or "bad";
lines for "pre", [header, *rows] for "table", (file, caption) for "image", [(word, what it means), ...] for "words", and
for "drafts" a text of texts.py."""


MARKS = {"h1": "# ", "h2": "## ", "h3": "### ", "p": "", "good": "> ", "unsure": "> ", "bad": "> "}


def markdown(page: list[Block]) -> str:
    """The blocks as Markdown."""
    lines = []
    for kind, content in page:
        if kind == "table":
            lines += [*markdown_table(*content), ""]
        elif kind == "image":
            lines += [f"![{content[1]}]({content[0]})", ""]
        elif kind == "words":
            lines += [f"- **{word}**: {meaning}" for word, meaning in content] + [""]
        elif kind == "pre":
            lines += [*(f"    {line}" for line in content.splitlines()), ""]
        elif kind == "drafts":
            lines += [*(f"    {line}" for line in _marked(content["pieces"]).splitlines()), ""]
        else:
            lines += [MARKS[kind] + content, ""]
    return "\n".join(lines)


def _marked(pieces: list[list[str]]) -> str:
    """The text with accepted drafts in brackets and without the rejected ones."""
    kept = itertools.groupby((p for p in pieces if p[1] != "rejected"), key=lambda piece: piece[1] == "accepted")
    runs = ((drafted, "".join(piece[0] for piece in run)) for drafted, run in kept)
    return "".join(f"[{text}]" if drafted else text for drafted, text in runs)


def markdown_table(header: Sequence[str], *rows: Sequence[str], left: Sequence[bool] | None = None) -> list[str]:
    """The lines of a table. With `left`, columns are padded to be read as plain text: True aligns a column left, False
    right."""
    if left is None:
        return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rules = ["-" * (w + 1) + ("-" if to_left else ":") for w, to_left in zip(widths, left, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True))
        return f"| {' | '.join(padded)} |"

    return [line(header), f"|{'|'.join(rules)}|", *map(line, rows)]


DRAFTS = """
.drafts { white-space: pre-wrap; border: 1px solid #d8dde6; padding: .6rem .9rem; } .drafts span:hover, .drafts
del:hover { outline: 2px solid #0072b2; } .accepted { background: #bfe6d8; border-radius: .2rem; }
.rejected { color: #a03c00; font-size: .8em; opacity: .75; }
"""
"""The style of texts of texts.py."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 62rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dde6; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.verdict { font-size: 1.15rem; font-weight: 600; border-left: .5rem solid; padding: .6rem .9rem; }
.good { background: #e3f4ee; border-color: #009e73; } .unsure { background: #fdf3dc; border-color: #e69f00; }
.bad { background: #fbe6dc; border-color: #d55e00; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: .6rem 0; }
img { width: 100%; height: auto; } figcaption { color: #4a5361; font-size: .9rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ee; white-space: nowrap; }
th { font-weight: 600; color: #4a5361; vertical-align: bottom; white-space: normal; } .text { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; font-size: .9rem; } dl { display: block; }
  dt { margin-top: .4rem; } }
"""


def html_page(page: list[Block], folder: Path) -> str:
    """The blocks as one self-contained page; pictures are read from `folder` and embedded."""
    parts = []
    for is_image, group in itertools.groupby(page, key=lambda block: block[0] == "image"):
        if is_image:  # consecutive pictures are placed side by side where there is room
            parts.append(f'<div class="figures">{"".join(_figure(content, folder) for _, content in group)}</div>')
        else:
            parts += [_element(kind, content) for kind, content in group]
    title = html.escape(next(content for kind, content in page if kind == "h1"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{DRAFTS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def html_part(page: list[Block]) -> str:
    """Blocks without pictures as HTML for a notebook, with the style of texts.py's."""
    return f"<style>{DRAFTS}</style>{''.join(_element(kind, content) for kind, content in page)}"


def _figure(content: tuple[str, str], folder: Path) -> str:
    file, caption = content
    data = base64.b64encode((folder / file).read_bytes()).decode()
    alt = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"><figcaption>{alt}</figcaption></figure>'


def _element(kind: str, content: Any) -> str:
    if kind == "table":
        return _table(content)
    if kind == "words":
        return f"<dl>{''.join(f'<dt>{html.escape(w)}</dt><dd>{html.escape(m)}</dd>' for w, m in content)}</dl>"
    if kind == "drafts":
        return f'<div class="drafts">{"".join(map(_piece, content["pieces"]))}</div>'
    if kind in ("good", "unsure", "bad"):
        return f'<p class="verdict {kind}">{html.escape(content)}</p>'
    return f"<{kind}>{html.escape(content)}</{kind}>"


def _piece(piece: list[str]) -> str:
    text, kind, note = map(html.escape, piece)
    tag = "del" if kind == "rejected" else "span"
    return f'<{tag} class="{kind}" title="{note}">{text}</{tag}>'


def _table(content: list[list[str]]) -> str:
    """A table in a box that scrolls if it is wider than the page; columns of words are aligned left, figures right."""
    header, *body = content
    words = [any(row[i][:1].isalpha() for row in body) for i in range(len(header))]

    def line(tag: str, row: list[str]) -> str:
        cells = (f"<{tag}{' class=text' if word else ''}>{html.escape(cell)}</{tag}>"
                 for cell, word in zip(row, words, strict=True))  # fmt: skip
        return f"<tr>{''.join(cells)}</tr>"

    lines = "".join(line("td", row) for row in body)
    return f'<div class="table" tabindex="0"><table>{line("th", header)}{lines}</table></div>'
