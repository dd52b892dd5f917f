"""Run directories for reports, and what a browser would read in a page."""

from __future__ import annotations

import json
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from trainer.report.__main__ import main

STEPS = 400
HOSTILE = '<script>alert("x")</script>&amp;'


class Page(HTMLParser):
    """What a browser would load and show, and whether the tags balance."""

    VOID = frozenset({"meta", "img", "br", "input", "circle", "line", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.links: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")
            if name == "class":
                self.classes.update((value or "").split())
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID or self.open[-1] == tag:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def write_config(run: Path, data: Path, **keys: Any) -> None:
    run.mkdir(exist_ok=True)
    config = {"data": str(data), "output": str(run), "seed": 0, "global_batch": 96}
    config |= {"model": {"layers": 4, "width": 128}, **keys}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def write_metrics(run: Path, *, shift: float = 0.0, tail: str = "") -> None:
    run.mkdir(exist_ok=True)
    rows = [
        {
            "step": step,
            "epoch": step // 30,
            "loss": 4 + 4 * math.exp(-step / 60) + shift,
            "mlm_loss": 3.5 + 4 * math.exp(-step / 60) + shift,
            "recon_loss": 0.05 + 0.3 * math.exp(-step / 40),
            "lr": 1e-3 * min(step / 50, 1),
            "grad_norm": 1 + math.sin(step),
            "pairs_per_s": 123.4,
            "tokens_per_s": 4567.0,
            "data_wait_frac": 0.0125,
            "padding_frac": 0.031,
            "sample_digest": "00",
        }
        for step in range(1, STEPS + 1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + tail)


def write_probes(run: Path, *, gap: float = 0.125, word: str = "wave") -> None:
    (run / "probes").mkdir(parents=True, exist_ok=True)
    for name in ("recon.png", "pair-000.png"):
        Image.new("RGB", (32, 32), (200, 30, 30)).save(run / "probes" / name)

    def interval(mean: float) -> dict[str, Any]:
        return {"mean": mean, "ci95": [mean - 0.02, mean + 0.02]}

    def probe(wrong: str, base: float) -> dict[str, Any]:
        losses = {"true": base, "shuffled": base + gap, wrong: base + 2 * gap}
        gaps = {"shuffled": gap, wrong: 2 * gap}
        return {
            "conditions": {name: interval(value) for name, value in losses.items()},
            "gaps": {name: interval(value) for name, value in gaps.items()},
        }

    guess = {"text": word, "masked": True, "top5": [[word, 0.4], ["hand", 0.1]]}
    result = {
        "task": "probes",
        "pairs": 386,
        "command": "python -m trainer.evaluate RUN --task probes",
        "mlm": probe("blank", 3.0),
        "recon": probe("empty", 0.5),
        "figures": [
            {"file": "probes/recon.png", "title": "Panels", "caption": "held out"}
        ],
        "top_words": [
            {
                "uid": "00ff",
                "image": "probes/pair-000.png",
                "tokens": [guess, {"text": "skin", "masked": False}],
            }
        ],
    }
    (run / "probes.json").write_text(json.dumps(result))


def report(*runs: Path) -> str:
    output = runs[0].parent / "out" / "report.html"
    main([*map(str, runs), "--output", str(output)])
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    return output.read_text()
