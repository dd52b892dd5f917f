"""Held-out pairs while a run trains: with real ranks, and in one process."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.conftest import launch_environment, python
from tests.pipeline.damage import flip, rewrite_first
from tests.pipeline.foreign import img2dataset_shard
from tests.trainer.tiny import TINY, column, config, damaged_copy, launch, metrics
from trainer.build import build_model
from trainer.contract import VALIDATION_NAMES, may_change, read_validation
from trainer.dataset import Dataset
from trainer.engine import World
from trainer.folder import DamagedError
from trainer.loader import Loader
from trainer.masking import Mode
from trainer.metrics import Metrics
from trainer.panels import first_pairs
from trainer.philox import signed_uids
from trainer.probes import drawn_places, partners, read_pairs
from trainer.validation import HeldOut, held_out, share_of

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
# Wide enough that ZeRO 3 really takes parameters apart.
WIDE = ("--model.width=256", "--model.ffn_width=512", "--checkpoint.every_steps=2")
SEEING = (
    "--eval.every_steps=2",
    "--eval.probes_every_steps=2",
    "--eval.probe_pairs=12",
    "--eval.panel_pairs=3",
    "--log.norms_every=2",
    "--log.tensorboard=true",
    "--profile.first_step=2",
    "--profile.steps=1",
    "--profile.memory=true",
)


def train_alone(*words: str | Path) -> str:
    """One rank to its end; what it printed."""
    line = ("-m", "trainer.pretrain", *TINY, *WIDE, "--deepspeed.zero_stage=0", *words)
    done = python(*line, env=launch_environment())
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def seeing(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that looks at held-out pairs, stopped and continued; between,
    files of a step that it has lost.
    """
    run = tmp_path_factory.mktemp("seeing") / "run"
    words = (f"--data={shards}", f"--output={run}", *SEEING)
    train_alone(*words, "--max_steps=2")
    with open(run / "validation.jsonl", "a") as file:
        file.write('{"step": 3, "val_loss": 0.5}\n{"step": 4, "val_')
    shutil.copy(
        run / "panels" / "step-00000002.png", run / "panels" / "step-00000003.png"
    )
    assert "  val " in train_alone(*words, "--max_steps=4")
    return run


def test_looking_at_held_out_pairs_changes_no_bit_of_training(
    seeing: Path, shards: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "run"
    train_alone(
        *(f"--data={shards}", f"--output={blind}", "--max_steps=4"),
        *("--eval.every_steps=0", "--log.norms_every=0"),
    )
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(seeing, name) == column(blind, name)
    assert read_validation(blind) == []


def test_each_look_is_written_once(seeing: Path, shards: Path) -> None:
    rows = read_validation(seeing)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert set(VALIDATION_NAMES) <= set(row)
        assert row["val_pairs"] == len(Dataset(shards, "val"))
        for probe, partner in (("mlm", "blank"), ("recon", "empty")):
            assert row[f"probe_{probe}_true"] > 0
            low, high = row[f"probe_{probe}_{partner}_gap_ci95"]
            assert low <= row[f"probe_{probe}_{partner}_gap"] <= high
    panels = sorted(path.name for path in (seeing / "panels").iterdir())
    assert panels == ["step-00000002.png", "step-00000004.png"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(seeing / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("val_loss")] == [2, 4]
    assert [event.step for event in events.Images("reconstructions")] == [2, 4]


def test_a_panel_shows_its_pairs(seeing: Path) -> None:
    with Image.open(seeing / "panels" / "step-00000004.png") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    height, width = pixels.shape
    assert width > 400
    assert height > 400
    assert pixels.std() > 10


def test_ranks_that_share_the_work_measure_what_one_measures(
    seeing: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}", *WIDE, *SEEING, "--max_steps=4")
    launch(2, *words, "--deepspeed.zero_stage=3")
    expected = read_validation(seeing)
    # Two ranks and ZeRO 3 sum in another order, in training too.
    for row, other in zip(read_validation(run), expected, strict=True):
        assert set(row) == set(other)
        for name in row:
            if name.startswith("val_") and "accuracy" not in name:
                assert row[name] == pytest.approx(other[name], rel=1e-3)
        assert row["probe_mlm_true"] == pytest.approx(other["probe_mlm_true"], rel=1e-3)
    for row, other in zip(metrics(run), metrics(seeing), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert ("param_norm" in row) == (row["step"] % 2 == 0)
        if "param_norm" in row:
            assert row["param_norm"] == pytest.approx(other["param_norm"], rel=1e-5)
        assert 0.01 < row["peak_memory_gib"] < 100


def test_a_trace_holds_the_steps_asked_for_by_the_names_of_their_parts(
    seeing: Path,
) -> None:
    with gzip.open(seeing / "profile" / "rank-0.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    for name in ("data", "forward", "backward", "optimizer"):
        assert name in names
    # Four micro-batches a step; one step was asked for.
    assert names.count("forward") == 4
    assert "aten::addmm" in names
    assert "[memory]" in names
    assert [path.name for path in (seeing / "profile").iterdir()] == [
        "rank-0.trace.json.gz"
    ]


def held(shards: Path, *words: str, metrics: Metrics | None = None) -> HeldOut | None:
    """The held-out pairs of a tiny configuration, in this process."""
    keys = config(shards, Path("unused"), *words)
    loader = Loader(Dataset(keys.data, "train"), keys, rank=0, world_size=1)
    build = partial(build_model, keys, loader.dataset.tokenizer)
    return held_out(loader, ALONE, build, metrics)


def losses(shards: Path, *words: str) -> dict[str, Any]:
    """Losses that one and the same fresh model has."""
    torch.manual_seed(0)
    keys = config(shards, Path("unused"))
    model = build_model(keys, Dataset(keys.data, "train").tokenizer)
    found = held(shards, *words)
    assert found
    return found.losses(model)


def test_validation_depends_on_its_own_seed_and_on_nothing_else(shards: Path) -> None:
    one = losses(shards)
    assert losses(shards) == one
    assert losses(shards, "--seed=5") == one
    # Micro-batches of 1 and of 6 sum in another order.
    assert losses(shards, "--micro_batch=1") == pytest.approx(one, rel=1e-5)
    other = losses(shards, "--eval.seed=1")
    assert other["val_pairs"] == one["val_pairs"]
    assert other["val_mlm_loss"] != pytest.approx(one["val_mlm_loss"], rel=1e-4)
    assert losses(shards, "--eval.max_pairs=7")["val_pairs"] == 7


def test_losses_by_mode_are_of_the_modalities_that_the_mode_masks(shards: Path) -> None:
    row = losses(shards)
    assert "val_mlm_loss_image_heavy" not in row
    assert "val_recon_loss_text_heavy" not in row
    ends = sorted((row["val_mlm_loss_text_heavy"], row["val_mlm_loss_light"]))
    assert ends[0] <= row["val_mlm_loss"] <= ends[1]
    text_only = losses(shards, "--mask.mode_probabilities=[0,1,0]")
    assert text_only["val_recon_loss"] == 0
    assert text_only["val_loss"] == pytest.approx(text_only["val_mlm_loss"])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("pairs", [0, 1, 5, 40])
def test_every_pair_counts_once_and_ranks_have_as_many_batches(
    size: int, pairs: int
) -> None:
    modes = np.random.default_rng(pairs).integers(0, 3, pairs)
    shares = [
        share_of(modes, rank=rank, size=size, micro_batch=4) for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = []
    for share in shares:
        for mode, rows, counts in share:
            assert 0 < len(rows) <= 4
            assert (modes[rows] == mode).all()
            counted += rows.tolist() if counts else []
    assert sorted(counted) == list(range(pairs))
    assert [mode for mode, _, _ in shares[0]] == [mode for mode, _, _ in shares[-1]]
    assert set(np.unique(modes)) == {int(mode) for mode, _, _ in shares[0]} <= set(Mode)


def test_a_dataset_without_the_split_is_trained_on_with_a_note(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Metrics(tmp_path, first_step=0, last_step=1, tensorboard=False)
    assert held(mixed, metrics=shown) is None
    assert held(mixed, "--eval.every_steps=0", metrics=shown) is None
    shown.close()
    printed = capsys.readouterr().err
    assert printed.count("no validation") == 1
    assert "--split.val" in printed


BEARS = "--damage.max_share=0.9"
MATCHING = ("--model.itm_weight=1", "--model.itm_group=3")


@pytest.fixture(scope="module")
def rotten(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A copy of the dataset in which a held-out image has a flipped bit; its uid."""
    copy = tmp_path_factory.mktemp("rotten") / "shards"
    return copy, int(damaged_copy(shards, copy, "val"), 16)


def first_holding(shards: Path, uid: int) -> int:
    """Of how many held-out pairs, in their order, one is the last but three."""
    dataset = Dataset(shards, "val")
    drawn = dataset.records(drawn_places(dataset, seed=0, limit=None))["uid"]
    return int(np.flatnonzero(drawn == np.uint64(uid))[0]) + 4


def test_a_damaged_pair_is_left_out_and_none_takes_its_place(
    shards: Path, rotten: tuple[Path, int], tmp_path: Path, capfd: Any
) -> None:
    damaged, uid = rotten
    count = first_holding(shards, uid)
    keys = ("--eval.probes_every_steps=1", f"--eval.probe_pairs={count + 2}")
    keys = (*keys, f"--eval.max_pairs={count}", *MATCHING, BEARS)
    whole = held(shards, *keys)
    shown = Metrics(tmp_path, first_step=0, last_step=1, tensorboard=False)
    part = held(damaged, *keys, metrics=shown)
    assert whole
    assert part
    share, other = whole._share, part._share
    assert (share.total, share.damaged) == (count, 0)
    assert (other.total, other.damaged) == (count - 1, 1)
    assert sorted(other.numbers) == list(range(count - 1))
    lost = signed_uids(np.array([uid], dtype=np.uint64))[0]
    kept = dict(zip(share.pairs.uids, share.pairs.uids[share.image_of], strict=True))
    assert set(share.pairs.uids) - set(other.pairs.uids) == {lost}
    # Whose image each text is shown with, in the losses and in the probes.
    for one, image in zip(
        other.pairs.uids, other.pairs.uids[other.image_of], strict=True
    ):
        assert image == kept[one] or kept[one] == lost
    assert whole._panels
    assert part._panels
    for limit in (count + 2, count):
        before = first_pairs(whole._panels.pairs, limit)
        after = first_pairs(part._panels.pairs, limit)
        assert after.uids.tolist() == [one for one in before.uids if one != lost]
        was = before.uids[partners(before, seed=0)]
        had = dict(zip(before.uids, was, strict=True))
        now = after.uids[partners(after, seed=0)]
        for one, partner in zip(after.uids, now, strict=True):
            assert partner == had[one] or had[one] == lost
    shown.close()
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "damage" in line]
    assert f"1 of {count + 2} held-out pairs" in said
    assert "val/shard-000000.tar, offset " in said
    assert f"`python -m pipeline.validate {damaged}`" in said


@pytest.mark.parametrize("model", [(), MATCHING])
def test_every_kind_of_damage_is_left_out(
    shards: Path, tmp_path: Path, model: tuple[str, ...]
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    tar = copy / rewrite_first(copy, "jpg", lambda data: data[:300] + bytes(len(data)))
    records = np.load(tar.with_suffix(".index.npy"))
    with tar.open("r+b") as file:
        for record in records[3:6]:
            file.seek(int(record["ids_offset"]) + int(record["ids_size"]) - 1)
            file.write(b"\xff")
        file.truncate(int(records[-1]["jpg_offset"]) + 1)
    found = held(copy, BEARS, *model, "--eval.split=train")
    assert found
    pairs = len(Dataset(shards, "train"))
    assert (found._share.total, found._share.damaged) == (pairs - 5, 5)


@pytest.mark.parametrize("model", [(), MATCHING])
@pytest.mark.parametrize("ours", [True, False])
def test_damage_to_members_that_no_pair_is_made_of_is_found(
    shards: Path, tmp_path: Path, model: tuple[str, ...], ours: bool
) -> None:
    """In our own shards and in anybody's, where the ids lie beside the tar."""
    copy = tmp_path / "copy"
    if ours:
        shutil.copytree(shards, copy)
    else:
        img2dataset_shard(copy, 0, range(30))
        tokenizer = f"--tokenizer={shards / 'tokenizer'}"
        done = python("-m", "pipeline.index", copy, tokenizer)
        assert done.returncode == 0, done.stdout
    keys = (BEARS, *model, "--eval.split=train")
    dataset = Dataset(copy, "train")
    places = dataset.places()
    whole = held(copy, *keys)
    assert whole
    assert (whole._share.total, whole._share.damaged) == (len(places), 0)
    records = dataset.records(places[:5])
    (name,) = {dataset.shard(shard).name for shard in places[:5, 0].tolist()}
    for what, record in zip(
        ("json", "txt", "header", "padding"), records[1:], strict=True
    ):
        start, size = int(record["span_offset"]), int(record["span_size"])
        span = (copy / name).read_bytes()[start : start + size]
        at = {
            "json": span.index(b'"key"'),
            "txt": span.rindex(b".txt\0") // 512 * 512 + 512,
            "header": 0,
            "padding": size - 1,
        }[what]
        flip(copy / name, start + at, 2)
    found: list[DamagedError] = []
    pairs = read_pairs(
        Dataset(copy, "train"),
        config(copy, Path("unused")),
        places,
        seed=0,
        damage=found,
    )
    assert len(pairs) == len(places)
    assert {one.uid for one in found} == set(records["uid"][1:].tolist())
    assert {one.reason for one in found} == {"crc"}
    part = held(copy, *keys)
    assert part
    assert (part._share.total, part._share.damaged) == (len(places) - 4, 4)


def test_more_damaged_pairs_than_the_run_bears_stop_it_and_name_the_shard(
    rotten: tuple[Path, int],
) -> None:
    damaged, uid = rotten
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ValueError, match=f"{uid:016x} is damaged") as caught:
        held(damaged)
    assert not dist.is_initialized(), "the rank must have left its group"
    message = str(caught.value)
    assert "more than the 0 that damage.max_share bears" in message
    assert "crc in val/shard-000000.tar (1)" in message
    assert "pipeline.validate" in message


def test_probes_without_two_sound_pairs_are_refused(rotten: tuple[Path, int]) -> None:
    damaged, uid = rotten
    dataset = Dataset(damaged, "val")

    def among_two(seed: int) -> bool:
        drawn = dataset.records(drawn_places(dataset, seed=seed, limit=2))
        return uid in drawn["uid"].tolist()

    seed = next(filter(among_two, itertools.count()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ValueError, match="fewer than two sound pairs"):
        held(
            damaged,
            BEARS,
            f"--eval.seed={seed}",
            "--eval.probes_every_steps=1",
            "--eval.probe_pairs=2",
        )


def test_a_run_trains_and_resumes_over_a_damaged_pair_as_any_number_of_ranks(
    shards: Path, rotten: tuple[Path, int], tmp_path: Path
) -> None:
    damaged, uid = rotten
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = (f"--data={damaged}", *SEEING[:4], *MATCHING, "--eval.probe_pairs=99")
    said = train_alone(*words, f"--output={whole}", "--max_steps=4", BEARS)
    assert said.count(f"{uid:016x} is damaged") == 1
    two = (*words, *WIDE, f"--output={run}", "--deepspeed.zero_stage=0")
    assert launch(2, *two, "--max_steps=2", BEARS).count("is damaged") == 1
    # Too much is refused, and what it takes to go on is named.
    line = ("-m", "trainer.pretrain", *TINY, *two, "--damage.max_share=0")
    done = python(*line, env=launch_environment())
    assert done.returncode == 1
    assert "crc in val/shard-000000.tar (1)" in done.stdout.splitlines()[-1]
    said = train_alone(*words, f"--output={run}", "--max_steps=4", BEARS)
    assert "resuming after step 2" in said
    assert "is damaged" in said
    pairs = len(Dataset(shards, "val")) - 1
    for row, other in zip(read_validation(run), read_validation(whole), strict=True):
        assert (row["val_pairs"], row["val_damaged"]) == (pairs, 1)
        assert row["probe_pairs"] == other["probe_pairs"] == pairs
        for name in ("step", "val_pairs", "val_loss", "probe_mlm_shuffled_gap"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4)
    assert column(run, "sample_digest") == column(whole, "sample_digest")
    assert len(metrics(run)) == 4


@pytest.mark.parametrize("key", ["seed", "split", "max_pairs"])
def test_one_run_has_one_measurement_and_may_make_it_more_or_less_often(
    key: str,
) -> None:
    assert not may_change(f"eval.{key}")
    assert may_change("eval.every_steps")
    assert may_change("profile.steps")
