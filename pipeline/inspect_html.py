"""The few HTML elements that an inspection is made of. Text is escaped here, once."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from PIL import Image

from pipeline.terminal import printable

# A page of hundreds of full-size images would be slow to open.
_LARGE_BYTES, _THUMBNAIL = 60_000, (320, 320)
_MAX_PIXELS = 1 << 27
_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"RIFF": "image/webp",
}
# Nothing may be loaded and no script may run, whatever a caption says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def quoted(text: str) -> str:
    """Text of keys, names and addresses: what steers rendering is seen, not obeyed."""
    return escape(printable(text))


def document(title: str, *body: str) -> str:
    """A page that needs nothing beside itself."""
    style = files("pipeline").joinpath("inspect.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{quoted(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def section(title: str, *body: str, lead: str = "") -> str:
    """A titled part of the page; `lead` is text, `body` HTML."""
    anchor = re.sub(r"\W+", "-", title.lower())
    intro = f'<p class="lead">{quoted(lead)}</p>' if lead else ""
    return (
        f'<section id="{anchor}"><h2>{quoted(title)}</h2>{intro}{"".join(body)}'
        "</section>"
    )


def card(*body: str, title: str = "", note: str = "", classes: str = "") -> str:
    """A framed figure with an optional title and a note below it."""
    head = f"<h3>{quoted(title)}</h3>" if title else ""
    foot = f'<p class="note">{quoted(note)}</p>' if note else ""
    return f'<div class="card {classes}">{head}{"".join(body)}{foot}</div>'


def grid(*cards: str, classes: str = "two") -> str:
    """Cards side by side where the window is wide enough."""
    return f'<div class="grid {classes}">{"".join(cards)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A table: the first `texts` columns are text, the others right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        drawn = (
            f"<{tag}{'' if place < texts else ' class=n'}>{quoted(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(drawn)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def bars(rows: Sequence[tuple[str, int]], *, classes: str = "s0") -> str:
    """Counted words, the longest bar for the largest count."""
    most = max((count for _, count in rows), default=1)
    drawn = "".join(
        f'<li><span>{escape(text)}</span><i class="{classes}" '
        f'style="width:{100 * count / most:.1f}%"></i><b>{count:,}</b></li>'
        for text, count in rows
    )
    return f'<ol class="bars">{drawn}</ol>'


def folded(title: str, *body: str) -> str:
    """Detail that opens on a click."""
    return f"<details><summary>{quoted(title)}</summary>{''.join(body)}</details>"


def picture(data: bytes, text: str) -> str:
    """An image inside the page, made smaller where it is large."""
    kind = next((k for head, k in _SIGNATURES.items() if data.startswith(head)), None)
    if kind is None or len(data) > _LARGE_BYTES:
        made = _thumbnail(data)
        if made is None:
            return '<p class="noimage">cannot be shown</p>'
        kind, data = "image/jpeg", made
    encoded = base64.b64encode(data).decode()
    return (
        f'<img alt="{quoted(text)}" loading="lazy" src="data:{kind};base64,{encoded}">'
    )


def _thumbnail(data: bytes) -> bytes | None:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP", "GIF"]) as im:
            if im.width * im.height > _MAX_PIXELS:
                return None
            im.thumbnail(_THUMBNAIL)
            file = io.BytesIO()
            im.convert("RGB").save(file, "JPEG", quality=88)
            return file.getvalue()
    except Exception:  # decoders raise what they like
        return None
