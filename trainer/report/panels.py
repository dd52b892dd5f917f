"""Panels on the page: what each run restored, at the step that the reader chooses.

Owns which panels are shown. The trainer draws them; the slider is in `report.js`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.report.data import Run
from trainer.report.elements import image, section

_QUALITY = 82


def panels_section(runs: Sequence[Run], *, limit: int) -> str:
    """Panels of all runs side by side, at most `limit` of each, the newest shown."""
    drawn = [_figure(run, limit) for run in runs if run.panels and limit]
    if not drawn:
        return ""
    counts = [len(run.panels) for run in runs]
    lead = "Held-out pairs as they were restored while the runs trained."
    if max(counts) > limit:
        lead += f" {limit} of {max(counts)} panels of a run, evenly spaced."
    slider = (
        '<p class="slider" hidden><label for="panel-step">Panels at</label> '
        '<input type="range" id="panel-step" min="0" value="0" autocomplete="off"> '
        '<output for="panel-step"></output></p>'
    )
    figures = f'<div class="grid two">{"".join(drawn)}</div>'
    blocks = f'<div class="panels">{slider}{figures}</div>'
    return section("Panels", blocks, lead=lead)


def spread(panels: Sequence[tuple[int, Path]], limit: int) -> list[tuple[int, Path]]:
    """At most `limit` panels, evenly spaced, the first and the newest among them."""
    if limit < 2:
        return list(panels[-1:])
    count = min(limit, len(panels))
    places = np.linspace(0, len(panels) - 1, count).round().astype(int)
    return [panels[place] for place in places]


def _figure(run: Run, limit: int) -> str:
    shown = spread(run.panels, limit)
    pictures = "".join(
        f'<div data-step="{step}"{"" if path == shown[-1][1] else " hidden"}>'
        f"{_picture(path, f'{run.name}, step {step}')}"
        f"<figcaption>{escape(run.name)}, step {step:,}</figcaption></div>"
        for step, path in shown
    )
    return (
        f'<figure class="card figure">{pictures}<label class="enlarge">'
        '<input type="checkbox" autocomplete="off">full width</label></figure>'
    )


def _picture(path: Path, text: str) -> str:
    try:
        with Image.open(path) as panel:
            buffer = BytesIO()
            # A tenth of the bytes; a page holds many of them.
            panel.convert("RGB").save(buffer, "WEBP", quality=_QUALITY)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = f"{path.name} cannot be shown: {error}"
        return f'<p class="missing">{escape(reason)}</p>'
    return image(buffer.getvalue(), text, suffix=".webp")
