"""The report: one offline page that shows what there is and names what there is not."""

from __future__ import annotations

import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.manifest import load_manifest
from tests.conftest import python
from tests.trainer.pages import (
    HOSTILE,
    Page,
    report,
    write_config,
    write_metrics,
    write_probes,
)
from trainer.report.charts import Series, curves, number, smooth, thin, ticks
from trainer.report.data import DatasetView, SamplePair, read_runs
from trainer.report.page import page


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    """A run directory with everything in it, as the demo leaves it."""
    path = tmp_path / "seed0"
    write_config(path, shards)
    write_metrics(path)
    write_probes(path)
    (path / "commands.txt").write_text("python -m pipeline.preprocess --input a&b\n")
    (path / "complete.json").write_text('{"step": 400}')
    return path


def test_page_refers_to_nothing_outside_itself(run: Path) -> None:
    text = report(run)
    shown = Page(text)
    assert len(shown.links) == shown.tags["img"] > 5
    assert all(link.startswith("data:image/") for link in shown.links)
    assert shown.tags["link"] == shown.tags["iframe"] == 0
    assert shown.tags["script"] == len(shown.scripts) == 2
    assert not re.search(r"url\(|@import|https?://", text)


def test_page_shows_the_whole_way_from_corpus_to_probes(
    run: Path, shards: Path
) -> None:
    shown = Page(report(run))
    manifest = load_manifest(shards)
    assert f"{manifest.accounting.inputs:,}" in shown.words
    for split, row in manifest.totals().items():
        assert f"written to {split}" in shown.words
        assert f"{row['tokens']:,}" in shown.words
    assert shown.words.count("[SEP]") >= 9
    for expected in ("MLM: nats a masked word", "Gradient norm", "held out"):
        assert expected in shown.text
    for expected in ("+0.12 nats", "123", "4,567", "1.25 %", "3.10 %", "386"):
        assert expected in shown.text
    assert "python -m pipeline.preprocess --input a&b" in shown.words
    assert shown.classes["missing"] == 0
    assert "helps to restore words" in shown.text


def test_a_gap_whose_interval_holds_0_is_not_called_a_help(run: Path) -> None:
    write_probes(run, gap=0.01)
    text = Page(report(run)).text
    assert "the right image does not surely help to restore words" in text
    assert "the right caption does not surely help to restore pixels" in text


def test_every_run_is_overlaid_and_only_real_differences_are_listed(
    run: Path, shards: Path
) -> None:
    other = run.with_name("seed1")
    shutil.copytree(run, other)
    write_config(other, shards, seed=1, model={"layers": 6, "width": 128})
    single, both = Page(report(run)), Page(report(run, other))
    assert both.classes["line"] == 2 * single.classes["line"] >= 10
    assert both.classes["whisker"] == 2 * single.classes["whisker"] == 20
    text = re.search(r"Differences(.*?)Every key", both.text, re.DOTALL)
    assert text
    listed = text[1].split()
    assert "seed" in listed
    assert "model.layers" in listed
    assert "model.width" not in listed
    assert "output" not in listed
    # What both runs share stands once.
    assert both.words.count("python -m pipeline.preprocess --input a&b") == 1


@pytest.mark.parametrize("parts", ["config", "metrics", "probes", "config probes"])
def test_a_part_that_is_not_there_is_named_with_its_command(
    tmp_path: Path, shards: Path, parts: str
) -> None:
    run = tmp_path / "young"
    run.mkdir()
    if "config" in parts:
        write_config(run, shards)
    if "metrics" in parts:
        write_metrics(run)
    if "probes" in parts:
        write_probes(run)
    text = Page(report(run)).text
    evaluate = f"python -m trainer.evaluate {run} --task probes"
    assert ("No step of young yet" in text) == ("metrics" not in parts)
    assert "deepspeed --module trainer.pretrain" in text
    assert (evaluate in text) == ("probes" not in parts)
    assert ("No config.yaml" in text) == ("config" not in parts)
    assert ("No run names its dataset" in text) == ("config" not in parts)


def test_a_dataset_that_is_gone_leaves_the_rest_of_the_page(
    run: Path, tmp_path: Path
) -> None:
    write_config(run, tmp_path / "deleted")
    text = Page(report(run)).text
    assert f"python -m pipeline.preprocess --input CORPUS --output {tmp_path}" in text
    assert "Gradient norm" in text


def test_damaged_shards_are_reported_not_shown(run: Path, shards: Path) -> None:
    copy = run.with_name("shards")
    shutil.copytree(shards, copy)
    tar = copy / load_manifest(copy).split("train")[0].name
    tar.write_bytes(b"\xff" * tar.stat().st_size)
    write_config(run, copy)
    text = Page(report(run)).text
    assert "is damaged" in text
    assert "pipeline.validate" in text


def test_text_of_captions_words_and_keys_is_escaped(run: Path, shards: Path) -> None:
    write_probes(run, word=HOSTILE)
    write_config(run, shards, tokenizer=HOSTILE)
    (run / "commands.txt").write_text(f"{HOSTILE}\n")
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    pair = SamplePair(uid=HOSTILE, jpeg=buffer.getvalue(), captions=[[HOSTILE]])
    view = DatasetView(
        path=str(shards),
        split=HOSTILE,
        manifest=load_manifest(shards),
        samples=[pair],
        problem="",
    )
    shown = Page(page(read_runs([run]), [view]))
    assert shown.tags["script"] == len(shown.scripts) == 2
    assert shown.words.count(HOSTILE) >= 5


def test_torn_and_not_finite_metrics_do_not_break_a_chart(run: Path) -> None:
    bad = '{"step": 401, "loss": NaN, "mlm_loss": Infinity, "lr": null}\n{"step": 4'
    write_metrics(run, tail=bad)
    charts = re.findall(r"<svg.*?</svg></svg>", report(run), re.DOTALL)
    assert len(charts) >= 5
    assert not re.search(r"nan|inf", " ".join(re.findall(r' d="[^"]*"', str(charts))))


def test_pictures_outside_the_run_are_not_embedded(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "probes" / "recon.png", tmp_path / "secret.png")
    write_probes(run)
    probes = json.loads((run / "probes.json").read_text())
    before = Page(report(run)).tags["img"]
    probes["figures"][0]["file"] = "../secret.png"
    (run / "probes.json").write_text(json.dumps(probes))
    shown = Page(report(run))
    assert shown.tags["img"] == before - 1
    assert "../secret.png is not there" in shown.words


def test_the_same_runs_give_the_same_bytes(run: Path) -> None:
    assert report(run) == report(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none", "--output={tmp}/r.html"], "is no directory"),
        (["{tmp}", "--output={tmp}/r.html"], "is no run"),
        (["{run}", "{run}", "--output={tmp}/r.html"], "named twice"),
        (["{run}", "--outptu={tmp}/r.html"], "Did you mean 'output'?"),
        (["--output={tmp}/r.html"], "must be given"),
    ],
)
def test_wrong_calls_get_one_line_and_write_nothing(
    run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    given = [word.format(tmp=tmp_path, run=run) for word in words]
    done = python("-m", "trainer.report", *given)
    assert done.returncode != 0
    assert message in done.stdout
    assert done.stdout.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_report_needs_neither_ray_nor_pyarrow_nor_torch(run: Path) -> None:
    script = (
        "import sys; sys.modules.update(ray=None, pyarrow=None, torch=None); "
        "from trainer.report.__main__ import main; main(sys.argv[1:])"
    )
    output = run / "report.html"
    done = python("-c", script, run, f"--output={output}")
    assert done.returncode == 0, done.stdout
    assert output.stat().st_size > 10_000


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-6, 1e6),
    count=st.integers(2, 8),
)
def test_ticks_are_few_ordered_and_inside(low: float, span: float, count: int) -> None:
    marks = ticks(low, low + span, count)
    slack = 1e-6 * max(abs(low), span)
    assert len(marks) <= count + 1
    assert marks == sorted(marks)
    assert all(low - slack <= mark <= low + span + slack for mark in marks)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.0, 0.5, "0"),
        (1234567.0, 1.0, "1,234,567"),
        (-0.25, 0.25, "\N{MINUS SIGN}0.25"),
        (0.5, 0.25, "0.50"),
        (2.5, 2.5, "2.5"),
        (0.001, 0.00025, "0.00100"),
        (3.14159, None, "3.14"),
        (0.0125, None, "0.0125"),
        (81.23, None, "81.2"),
    ],
)
def test_numbers_read_as_people_write_them(
    value: float, step: float | None, text: str
) -> None:
    assert number(value, step) == text


@pytest.mark.parametrize("steps", [(1, 3), (37, 237), (4611, 4811), (0, 1000)])
def test_no_tick_is_printed_over_the_name_of_the_axis(steps: tuple[int, int]) -> None:
    line = Series(name="x", colour=0, steps=steps, values=[1.0, 2.0])
    drawn = curves([line], label="x")
    (name,) = re.findall(r'<text class="tick" x="(\d+)"[^>]*>step<', drawn)
    places = re.findall(r'<text class="tick mid" x="([\d.]+)"', drawn)
    assert len(places) >= 3
    # Half of the widest tick, and the name.
    assert all(float(place) - 20 > float(name) + 30 for place in places)


def test_thinned_curves_keep_ends_and_spikes() -> None:
    values = [1.0] * 100_000
    values[54_321] = 9.0
    values[54_322] = -9.0
    steps = [float(step) for step in range(len(values))]
    points = thin(steps, values, extremes=True)
    assert len(points) < 1_000
    assert {(54_321.0, 9.0), (54_322.0, -9.0)} <= set(points)
    assert points[0] == (0.0, 1.0)
    assert points[-1] == (99_999.0, 1.0)
    assert points == sorted(points)


def test_smoothing_is_unbiased_from_the_first_step() -> None:
    assert smooth([3.0] * 50, 10) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 5.0, 2.0], 1) == [1.0, 5.0, 2.0]


def test_a_chart_of_one_step_and_of_a_constant_is_drawn() -> None:
    for steps, values in (([1.0], [2.0]), ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])):
        one = Series(name="a", colour=0, steps=steps, values=values)
        chart = curves([one], label="x")
        assert "nan" not in chart
        assert "<circle" in chart or "<path" in chart
    assert curves([], label="x") == ""
