"""The few HTML elements of reports and replays. Text is escaped here, once."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from trainer.report.charts import colour_class

_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


def document(title: str, *body: str, style: str = "", script: str = "") -> str:
    """The whole page; `style` is CSS besides the report's, `script` JavaScript."""
    looks = Path(__file__).with_name("report.css").read_text() + style
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Palimpsest: {escape(title)}</title><style>{looks}</style></head>"
        f"<body><main>{''.join(body)}</main>"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def header(
    title: str, tiles: Iterable[tuple[str, str, str]], *, kicker: str, lead: str = ""
) -> str:
    """The top of a page: its title, a sentence, and (name, value, note) tiles."""
    sentence = f'<p class="headline">{escape(lead)}</p>' if lead else ""
    drawn = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'{sentence}<div class="tiles">{drawn}</div></header>'
    )


def section(title: str, *body: str, lead: str = "") -> str:
    """A titled part of the page; `lead` is text, `body` HTML."""
    anchor = re.sub(r"\W+", "-", title.lower())
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        f'<section id="{anchor}"><h2>{escape(title)}</h2>{intro}{"".join(body)}'
        "</section>"
    )


def card(*body: str, title: str = "", note: str = "", classes: str = "") -> str:
    """A framed figure with an optional title and a note below it."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="card {classes}">{head}{"".join(body)}{foot}</div>'


def grid(*cards: str, classes: str = "two") -> str:
    """Cards side by side where the window is wide enough."""
    return f'<div class="grid {classes}">{"".join(cards)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A table: the first `texts` columns are text, the others right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        drawn = [
            f"<{tag}{'' if place < texts else ' class=n'}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(drawn)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def legend(names: Sequence[str], *, classes: str = "") -> str:
    """Names of the runs beside their colours; nothing for a single one."""
    if len(names) < 2:
        return ""
    keys = [
        f'<span class="{colour_class(place)}"><i></i>{escape(name)}</span>'
        for place, name in enumerate(names)
    ]
    return f'<p class="legend {classes}">{"".join(keys)}</p>'


def missing(what: str, cure: str) -> str:
    """A notice that a part is not there, and the command that makes it."""
    return (
        f'<p class="missing">{escape(what)} <span>Make it with</span> '
        f"<code>{escape(cure)}</code></p>"
    )


def folded(title: str, *body: str) -> str:
    """Detail that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(body)}</details>"


def image(source: Path | bytes, text: str, *, suffix: str = ".jpg") -> str:
    """An image inside the page: a file, or bytes of the type that `suffix` says."""
    if isinstance(source, Path):
        suffix, data = source.suffix.lower(), source.read_bytes()
    else:
        data = source
    kind = _IMAGE_TYPES[suffix]
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{escape(text)}" src="data:{kind};base64,{encoded}">'


def picture(run: Path, name: str, text: str) -> str:
    """The image `name` of a run directory, or a word that it is not there."""
    path = run / name
    # probes.json names the files; only pictures of the run itself are embedded.
    inside = path.resolve().is_relative_to(run.resolve())
    if inside and path.is_file() and path.suffix.lower() in _IMAGE_TYPES:
        return image(path, text)
    return f'<p class="missing">{escape(name)} is not there</p>'
