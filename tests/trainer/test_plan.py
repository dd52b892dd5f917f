"""What `trainer.plan` says of real datasets, and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import python
from tests.trainer.tiny import TINY, config
from trainer.build import build_model
from trainer.dataset import Dataset
from trainer.loader import Loader, sum_counts
from trainer.plan import main
from trainer.plan_data import expected, facts_of, shapes

H200 = ("--gpu=h200", "--gpus=4", "--decode=8")


def planned(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """The plan of the tiny recipe as JSON."""
    assert main([*TINY, *H200, "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_knows_the_model_and_the_epochs_of_a_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, f"--data={shards}", "--schedule.steps=70")
    dataset = Dataset(str(shards), "train")
    same = config(shards, tmp_path)
    model = build_model(same, dataset.tokenizer)
    assert found["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert sum(found["parameters"].values()) == found["parameters_total"]
    assert found["parameters"]["transformer"] == sum(
        p.numel() for p in model.blocks.parameters()
    )
    assert found["pairs"] == len(dataset)
    assert found["steps_per_epoch"] == len(dataset) // 24
    assert found["epochs"] == pytest.approx(70 / found["steps_per_epoch"])
    assert (found["micro_batch"], found["accumulation"]) == (6, 1)


def test_the_work_of_a_step_is_what_the_loader_counts(
    shards: Path, tmp_path: Path
) -> None:
    same = config(shards, tmp_path)
    facts = facts_of(same, ranks=1, decode=0)
    loader = Loader(Dataset(str(shards), "train"), same, rank=0, world_size=1)
    steps = facts.steps_per_epoch
    assert steps
    with ThreadPoolExecutor(1) as decoders:
        batches = [loader.load(step, decoders) for step in range(steps)]
    counted = sum_counts([batch.counts for batch in batches])
    mean = expected(same, facts, counted.pairs)
    # Fewer than a step's pairs are left over at the end of an epoch.
    for name in (
        *("tokens", "squared_lengths", "scored_lengths"),
        *("masked_words", "recon_images"),
    ):
        assert getattr(mean, name) == pytest.approx(getattr(counted, name), rel=0.03)
    limit = shapes(same, facts, loader.micro_batch)
    for micro in (micro for batch in batches for micro in batch.micro_batches):
        assert len(micro.stream.source) <= limit.rows
        assert micro.stream.dense.numel() <= limit.table
        assert micro.n_masked_words <= limit.masked_words
        assert min(micro.n_recon_images, micro.stream.pairs) <= limit.recon_images


def test_hours_and_cost_follow_from_flops_and_the_assumed_utilisation(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"--data={shards}", "--price=2.5")
    half = planned(capsys, *words, "--mfu=0.25")
    whole = planned(capsys, *words, "--mfu=0.5")
    assert half["hours"] == pytest.approx(2 * whole["hours"])
    rate = 4 * 989e12 * 0.5
    assert whole["step_s"] == pytest.approx(whole["step_flops"] / rate)
    assert whole["cost"] == pytest.approx(whole["hours"] * 4 * 2.5)
    assert whole["read_bytes_per_s"] == pytest.approx(
        whole["read_bytes_per_pair"] * whole["pairs_per_s"]
    )
    dataset = Dataset(str(shards), "train")
    records = dataset.records(dataset.places())
    sizes = records["jpg_size"].astype(np.int64) + records["ids_size"]
    assert whole["read_bytes_per_pair"] == pytest.approx(sizes.mean())
    assert whole["decode_s_per_pair"] > 0


def test_a_peak_that_is_given_counts_and_itm_takes_its_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--deepspeed.precision=fp32", "--log.peak_tflops=67")
    found = planned(capsys, *given)
    assert found["peak_tflops"] == 67
    assert found["step_s"] == pytest.approx(found["step_flops"] / (4 * 67e12 * 0.35))
    itm = planned(capsys, *given, "--model.itm_weight=1", "--model.itm_group=3")
    again = sum(found["forward_flops"][part] for part in ("transformer", "attention"))
    # Another pass, whose last layer is read at one row of each pair.
    assert 0.6 * again < itm["forward_flops"]["itm"] < again
    assert itm["parameters"]["ITM head"] > 0
    assert "ITM head" not in found["parameters"]


def test_a_mixture_has_epochs_for_each_source(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, f"--data={mixed}")
    assert found["steps_per_epoch"] is None
    assert found["sources"] == [
        {"name": "faces", "pairs": 90, "share": 0.75},
        {"name": "flags", "pairs": 70, "share": 0.25},
    ]


def test_what_is_not_known_without_data_is_said_to_be_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, "--vocab_size=1000")
    unknown = ("pairs", "epochs", "steps_per_epoch", "read_bytes_per_s", "decode_cores")
    assert [found[name] for name in unknown] == [None] * len(unknown)
    assert found["text_tokens_per_pair"] == 48
    shorter = planned(capsys, "--vocab_size=1000", "--text_tokens=10")
    assert shorter["text_tokens_per_pair"] == 10
    assert shorter["step_flops"] < found["step_flops"]
    # No text of a run is longer than that.
    longer = planned(capsys, "--vocab_size=1000", "--text_tokens=100")
    assert longer["step_flops"] == found["step_flops"]
    assert main([*TINY, *H200]) == 0
    printed = capsys.readouterr().out
    assert "no --data: pairs, epochs, reading and decoding are not known" in printed
    assert "checked on one GPU with ZeRO 1 alone" in printed


def test_the_table_shows_every_stage_and_what_to_do(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *H200, f"--data={shards}", "--price=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("ZeRO 0    ZeRO 1    ZeRO 2    ZeRO 3" in line for line in lines)
    assert any(line.startswith("fits with ZeRO 1, in micro-batches") for line in lines)
    fits = next(line for line in lines if line.startswith("fits into"))
    # bf16 with stage 0 is what pretrain refuses.
    assert fits.split()[-4:] == ["refused", "yes", "yes", "yes"]
    assert any("bf16 needs deepspeed.zero_stage 1 or more" in line for line in lines)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large = (
        "--model.layers=24",
        "--model.width=1024",
        "--model.heads=16",
        "--model.ffn_width=4096",
        "--lanes=4",
        "--global_batch=8192",
        "--gpu=l40s",
    )
    found = planned(capsys, *large)
    stage = found["stages"][1]
    assert stage["largest"] < stage["largest_checkpointed"]
    for size, fits in ((stage["largest"], True), (2 * stage["largest"], False)):
        again = planned(capsys, *large, f"--micro_batch={size}")
        assert again["micro_batch"] == size
        assert again["stages"][1]["fits"] == fits


def test_a_model_that_is_too_large_is_not_recommended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    huge = (
        "--model.layers=96",
        "--model.width=12288",
        "--model.heads=96",
        "--model.ffn_width=49152",
        "--gpu=l4",
    )
    assert planned(capsys, *huge)["recommended_stage"] is None
    assert main([*TINY, *H200, *huge]) == 0
    assert "DOES NOT FIT with any micro-batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deepspeed.precision=fp32"], "by --log.peak_tflops"),
        (["--init=nowhere", "--data={shards}"], "--init nowhere holds no weights"),
        (["--model.itm_weight=1", "--model.itm_group=4"], "lower model.itm_group"),
        (["--gpus=5"], "start 1, 2, 3, 4, 6, 12 ranks"),
        (["--gpu=h20"], "b200, h200"),
        (["--global_batch=32"], "global_batch"),
        (["--mfu=1.5"], "mfu is 1.5"),
        (["--text_tokens=2"], "text_tokens is 2"),
        (["--data=nowhere"], "nowhere has no manifest.json"),
        (["--mpu=0.5"], "Did you mean 'mfu'"),
        (["--split=test", "--data={shards}"], "no split 'test'"),
        (["--global_batch=1200", "--data={shards}"], "add data"),
    ],
)
def test_what_pretrain_would_refuse_is_refused(
    shards: Path, words: list[str], message: str
) -> None:
    given = [word.format(shards=shards) for word in words]
    with pytest.raises(ValueError, match=message):
        main([*TINY, *H200, *given])


def test_help_explains_the_keys_of_a_plan() -> None:
    done = python("-m", "trainer.plan", "--help")
    assert done.returncode == 0
    for words in ("before anyone rents a GPU", "--mfu", "Price of one GPU", "--lanes"):
        assert words in done.stdout
