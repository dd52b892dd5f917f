"""A real run against what is said of it before: memory, checkpoint, FLOPs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import launch_environment, python
from tests.trainer.tiny import TINY, config, metrics
from trainer.dataset import Dataset
from trainer.flops import step_flops
from trainer.loader import Loader
from trainer.plan_run import checkpoint_bytes

# Large enough that a process's own hundred megabytes do not hide it.
LARGE = (
    "--model.layers=4",
    "--model.width=384",
    "--model.heads=6",
    "--model.ffn_width=1536",
    "--global_batch=96",
    "--micro_batch=96",
    "--max_steps=2",
    "--log.peak_tflops=0.5",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    pairs: int
    tokens: int
    squared_lengths: int
    scored_lengths: int
    masked_words: int
    recon_images: int


def trained(shards: Path, run: Path, *words: str) -> dict[str, Any]:
    """What a run took, and the estimate of it, from the command of the benchmark."""
    done = python(
        "-m",
        "benchmarks.training_memory",
        *(*TINY, f"--data={shards}", f"--output={run}", *LARGE, *words),
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def real(
    shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run of two steps on one rank with ZeRO 1, and its memory."""
    run = tmp_path_factory.mktemp("planned") / "run"
    return run, trained(shards, run, "--deepspeed.zero_stage=1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures a CPU's memory")
def test_a_run_takes_about_the_estimated_memory(
    real: tuple[Path, dict[str, Any]],
) -> None:
    _, found = real
    assert found["device"] == "cpu"
    # benchmarks/README.md has more sizes.
    assert found["estimated_mb"] == pytest.approx(found["measured_mb"], rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gpu_allocates_about_the_estimated_memory(
    shards: Path, tmp_path: Path, stage: int
) -> None:
    words = (f"--deepspeed.zero_stage={stage}", "--deepspeed.precision=bf16")
    found = trained(shards, tmp_path / "run", *words)
    assert found["device"] == "cuda"
    assert found["estimated_mb"] == pytest.approx(found["measured_mb"], rel=0.15)


def test_a_checkpoint_has_about_the_planned_size(
    real: tuple[Path, dict[str, Any]],
) -> None:
    run, found = real
    files = (run / "checkpoints" / "step-00000002").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    planned = checkpoint_bytes(found["parameters"])
    assert size == pytest.approx(planned, rel=0.02)


def test_a_run_writes_the_flops_of_its_real_tokens(
    real: tuple[Path, dict[str, Any]], shards: Path
) -> None:
    run, _ = real
    same = config(shards, run, *LARGE)
    loader = Loader(Dataset(str(shards), "train"), same, rank=0, world_size=1)
    vocabulary = loader.dataset.tokenizer.vocab_size
    with ThreadPoolExecutor(1) as decoders:
        for row in metrics(run):
            parts = loader.load(row["step"] - 1, decoders).micro_batches
            lengths = torch.cat([part.stream.n_words for part in parts]) + 2
            masks = [
                loader.masks(
                    part.uids,
                    part.stream,
                    part.epochs,
                    part.text_capacity,
                    step=part.step,
                )
                for part in parts
            ]
            counts = [mask.counts for mask in masks]
            scored = torch.cat(
                [same.model.scored_positions(one, loader.n_image) for one in counts]
            )
            work = Work(
                pairs=len(lengths),
                tokens=int((lengths + loader.n_image).sum()),
                squared_lengths=int((lengths + loader.n_image).square().sum()),
                scored_lengths=int(((lengths + loader.n_image) * scored).sum()),
                masked_words=sum(int(mask.text.sum()) for mask in masks),
                recon_images=sum(int(mask.image.any(1).sum()) for mask in masks),
            )
            flops = step_flops(
                same.model, work, vocab_size=vocabulary, image_size=same.image.size
            )
            expected = flops / row["step_s"] / 1e12
            assert row["model_tflops"] == pytest.approx(expected)
            assert row["mfu"] == pytest.approx(expected / 0.5)
