"""Several runs on one page: curves that can be chosen, panels, differences, results."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import launch_environment, python
from tests.trainer.pages import (
    HOSTILE,
    Page,
    report,
    write_config,
    write_metrics,
    write_probes,
)
from tests.trainer.tiny import TINY, metrics
from trainer.report import page
from trainer.report.charts import SERIES_COLOURS
from trainer.report.configs import differing_keys

CSS = Path(page.__file__).with_name("report.css")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ABSENT = "\N{EN DASH}"
# Below this distance in CIELAB two lines of a chart are taken for one.
TOLD_APART = 15
# Machado, Oliveira, Fernandes 2009: full severity, linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def write_validation(run: Path, *losses: float, tail: str = "") -> None:
    """A row each 100 steps."""
    rows = [
        {
            "step": 100 * place,
            "val_loss": loss,
            "val_mlm_loss": loss - 0.5,
            "val_recon_loss": 0.05,
            "val_mlm_accuracy": 0.2,
            "probe_mlm_blank_gap_ci95": [0.1, 0.2],
        }
        for place, loss in enumerate(losses, start=1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "validation.jsonl").write_text(lines + tail)


def write_panels(run: Path, *steps: int) -> None:
    (run / "panels").mkdir()
    for step in steps:
        picture = Image.new("RGB", (60, 30), (step % 256, 90, 90))
        picture.save(run / "panels" / f"step-{step:08d}.png")


@pytest.fixture
def runs(tmp_path: Path, shards: Path) -> list[Path]:
    """Two runs: `low` with everything, `high` without validation, probes and panels."""
    low, high = tmp_path / "low", tmp_path / "high"
    write_config(low, shards, optimizer={"lr": 0.001})
    write_metrics(low)
    write_validation(low, 7.0, 6.5, 6.75)
    write_probes(low)
    write_panels(low, 100, 200, 300)
    write_config(high, shards, optimizer={"lr": 0.004})
    write_metrics(high, shift=1)
    return [low, high]


@pytest.fixture(scope="module")
def real(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the trainer that was stopped after 3 of 12 steps."""
    output = tmp_path_factory.mktemp("real") / "stopped"
    words = (*TINY, f"--data={shards}", f"--output={output}", "--max_steps=3")
    done = python("-m", "trainer.pretrain", *words, env=launch_environment())
    assert done.returncode == 0, done.stdout
    return output


def curve_data(shown: Page) -> dict[str, Any]:
    return json.loads(shown.scripts[0])


def test_a_run_of_the_trainer_is_compared_step_by_step(
    real: Path, runs: list[Path]
) -> None:
    shown = Page(report(runs[0], real))
    data = curve_data(shown)
    assert [run["name"] for run in data["runs"]] == ["low", "stopped"]
    written = metrics(real)
    for name in ("loss", "lr", "grad_norm", "pairs_per_s"):
        _, series = data["curves"][name]["series"]
        assert series["run"] == 1
        drawn = series["raw"] or series["line"]
        assert drawn[0] == [1, 2, 3]
        assert drawn[1] == pytest.approx([row[name] for row in written], rel=1e-5)
    clock = data["runs"][1]["clock"]
    assert clock[0] == [1, 2, 3]
    spent = sum(row["step_s"] for row in written)
    assert clock[1][-1] == pytest.approx(spent, rel=1e-5)
    assert data["runs"][1]["batch"] == 24
    assert "step 3 of 12" in shown.words
    assert "ranks at that step" in shown.words
    assert "torch" in shown.words
    assert version("torch") in shown.words
    assert "No probes of stopped yet." in shown.text


def test_every_numeric_metric_is_drawn_once(real: Path) -> None:
    shown = Page(report(real))
    validation = (real / "validation.jsonl").read_text().splitlines()
    names = {
        name
        for row in [*metrics(real), *map(json.loads, validation)]
        for name, value in row.items()
        if isinstance(value, int | float)
    } - {"step", "epoch", "val_pairs", "probe_pairs"}
    assert {"val_loss", "mlm_loss_text_heavy", "psnr"} < names
    assert set(curve_data(shown)["curves"]) == names
    assert shown.classes["curve"] == len(names)


def test_a_run_without_validation_probes_and_panels_stands_beside_one_with(
    runs: list[Path],
) -> None:
    shown = Page(report(*runs))
    curves = curve_data(shown)["curves"]
    assert [one["run"] for one in curves["val_loss"]["series"]] == [0]
    assert curves["val_loss"]["series"][0]["line"] == [[100, 200, 300], [7, 6.5, 6.75]]
    assert [one["run"] for one in curves["loss"]["series"]] == [0, 1]
    assert not any("ci95" in name for name in curves)
    assert "No probes of high yet." in shown.text
    assert shown.classes["missing"] == 1
    without = Page(report(runs[1]))
    assert "val_loss" not in curve_data(without)["curves"]
    assert "Panels" not in without.words


def test_a_run_that_is_being_written_is_shown_as_far_as_it_got(
    runs: list[Path],
) -> None:
    write_validation(runs[0], 7.0, math.nan, tail='{"step": 300, "val_lo')
    write_metrics(runs[0], tail='7\n{"step": 40')
    curves = curve_data(Page(report(*runs)))["curves"]
    assert curves["val_loss"]["series"][0]["line"] == [[100], [7]]
    assert curves["loss"]["series"][0]["line"][0][-1] == 400


def test_the_best_of_each_line_is_marked(runs: list[Path]) -> None:
    write_validation(runs[1], 9.0, 6.25, 8.0)
    page = report(*runs)
    rows = {
        re.sub("<.*?>", "", row.split("</td>")[0]): row
        for row in re.findall(r'<table class="results">.*?</table>', page)[0].split(
            "<tr>"
        )
    }

    def best(title: str) -> list[bool]:
        return ['class="best"' in cell for cell in rows[title].split("<td")[2:]]

    assert best("Total loss") == [True, False]
    assert best("Held out: total loss") == [True, False]
    assert best("Held out: lowest total loss") == [False, True]
    assert "6.2500 at step 200" in rows["Held out: lowest total loss"]
    # Alike, or a finding rather than a score.
    assert best("RECON: squared error a masked pixel") == [False, False]
    assert best("Probe: a wrong image costs, MLM loss") == [False, False]


@pytest.mark.parametrize(
    ("first", "second", "differing"),
    [
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": True}, ["a"]),
        ({"a": "1"}, {"a": 1}, ["a"]),
        ({"a": None}, {}, ["a"]),
        ({}, {"a": None, "b": 2}, ["a", "b"]),
        ({"a": [1, 2], "b": 3}, {"b": 4, "a": [2, 1]}, ["a", "b"]),
        ({"output": "x", "a": ""}, {"output": "y", "a": ""}, []),
    ],
)
def test_exactly_the_keys_that_differ_are_listed(
    first: dict[str, Any], second: dict[str, Any], differing: list[str]
) -> None:
    assert differing_keys([first, second]) == differing
    assert differing_keys([first, first, second]) == differing


def test_differences_show_both_values_and_what_a_run_lacks(
    runs: list[Path], shards: Path
) -> None:
    write_config(runs[1], shards, optimizer={"lr": 0.004}, max_steps=None)
    text = report(*runs)
    listed = text[text.index("Differences") : text.index("Every key")]
    cells = re.findall(r"<td>(.*?)</td>", listed)
    assert cells == ["optimizer.lr", "0.001", "0.004", "max_steps", ABSENT, "null"]


def test_names_and_paths_are_escaped_where_scripts_read_them(
    tmp_path: Path, shards: Path
) -> None:
    run = tmp_path / HOSTILE.replace("/", ":")
    closing = tmp_path / "<!--<script" / "</script"
    for path in (run, closing):
        path.mkdir(parents=True)
        write_config(path, shards)
        write_metrics(path)
        write_panels(path, 5)
    row = {"step": 401, "<script>x</script>": 1.0}
    (run / "metrics.jsonl").open("a").write(json.dumps(row) + "\n")
    shown = Page(report(run, closing))
    assert shown.tags["script"] == len(shown.scripts) == 2
    data = curve_data(shown)
    assert [one["name"] for one in data["runs"]] == [run.name, closing.name]
    assert "<script>x</script>" in data["curves"]
    assert shown.words.count(run.name) > 3


def test_panels_stand_side_by_side_the_newest_first_seen(runs: list[Path]) -> None:
    write_panels(runs[1], 100, 400)
    (runs[0] / "panels" / "step-00000300.png").write_bytes(b"\x89PNG torn")
    text = report(*runs)
    panels = text[text.index('<section id="panels"') : text.index('id="speed"')]
    steps = re.findall(r'data-step="(\d+)"( hidden)?', panels)
    assert [step for step, hidden in steps if not hidden] == ["300", "400"]
    assert [step for step, _ in steps] == ["100", "200", "300", "100", "400"]
    assert panels.count("data:image/webp") == 4
    assert "step-00000300.png cannot be shown" in panels


def test_few_of_many_panels_are_kept_the_ends_among_them(runs: list[Path]) -> None:
    write_panels(runs[1], *range(10, 1010, 10))
    text = report(*runs)
    own = re.findall(r'alt="high, step (\d+)"', text)
    assert len(own) == 8
    assert (own[0], own[-1]) == ("10", "1000")


def test_colours_can_be_told_apart_with_any_vision() -> None:
    for theme in CSS.read_text().split("@media")[:2]:
        found = [re.search(rf"--s{n}: #(\w{{6}})", theme) for n in range(8)]
        colours = np.array([list(bytes.fromhex(one[1])) for one in found if one])
        assert len(colours) == SERIES_COLOURS
        for name, matrix in VISION.items():
            seen = lab(linear(colours) @ matrix.T)
            nearest = min(
                np.linalg.norm(one - other) for one, other in combinations(seen, 2)
            )
            assert nearest > TOLD_APART, (name, theme[:20])


def linear(rgb: np.ndarray) -> np.ndarray:
    share = rgb / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB, white point D65."""
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = np.clip(rgb, 0, 1) @ to_xyz.T / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_a_browser_shows_what_a_reader_chooses(runs: list[Path]) -> None:
    text = report(*runs)
    before = browser(text, runs[0].parent, "")
    loss = chart(before, "loss")
    assert '<form class="controls" autocomplete' in before
    assert loss.count('class="line') == loss.count('class="raw') == 2
    assert ">step<" in loss
    after = browser(
        text,
        runs[0].parent,
        """
        document.querySelector("[name=run][value='1']").click();
        document.querySelector("[name=smooth]").click();
        document.querySelector("[name=log]").click();
        document.querySelector("[name=axis][value=pairs]").click();
        const slider = document.querySelector("#panel-step");
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        const svg = document.querySelector("svg[data-curve=loss]");
        svg.dispatchEvent(new KeyboardEvent("keydown", {key: "End"}));
        """,
    )
    loss = chart(after, "loss")
    assert 'class="line s0"' in loss
    assert "s1" not in loss
    assert 'class="raw' not in loss
    assert ">pairs<" in loss
    recon = chart(after, "recon_loss")
    ticks = re.findall(r'class="tick end"[^>]*>([^<]+)<', recon)
    assert ticks[-2:] == ["0.1", "0.2"]
    assert '<output for="panel-step">step 100</output>' in after
    assert re.search(r'data-step="100"><img', after)
    assert "<b>38,400 pairs</b>" in after


def browser(text: str, folder: Path, script: str) -> str:
    """The page's elements after its own scripts and `script` have run; fails on an
    error in them.
    """
    page = folder / "page.html"
    failed = (
        "addEventListener('error', e => { document.title = 'FAILED ' + e.message })"
    )
    text = text.replace("<title>", f"<script>{failed}</script><title>", 1)
    page.write_text(text.replace("</body>", f"<script>{{{script}}}</script></body>"))
    done = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-sync"),
            "--disable-component-update",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>FAILED" not in done.stdout
    return done.stdout


def chart(dom: str, name: str) -> str:
    """What stands in a chart."""
    start = dom.index(f'data-curve="{name}"')
    return dom[start : dom.index('<div class="tip', start)]
