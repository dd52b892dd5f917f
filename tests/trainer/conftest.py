from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.datasets import preprocess, slices
from tests.trainer.tiny import launch


@pytest.fixture(scope="session")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two ranks by the deepspeed launcher, on a disk; not to be
    changed.
    """
    run = tmp_path_factory.mktemp("whole") / "run"
    launch(2, f"--data={shards}", f"--output={run}", "--checkpoint.every_steps=5")
    return run


@pytest.fixture(scope="session")
def mixed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two sources, `faces` (90 samples, weight 3) and `flags` (70, weight
    1), in shards of 16, with the tokenizer of `shards`.
    """
    folder = tmp_path_factory.mktemp("mixed")
    faces, flags = slices(folder, 90, 70)
    inputs = (
        f"[{{path: {faces}, name: faces, weight: 3}}, {{path: {flags}, name: flags}}]"
    )
    return preprocess(
        folder / "shards", f"--input={inputs}", tokenizer=shards / "tokenizer"
    )


@pytest.fixture(scope="session")
def extra(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one source, `signs` (60 samples), with the tokenizer of `shards`."""
    folder = tmp_path_factory.mktemp("extra")
    _, _, signs = slices(folder, 90, 70, 60)
    return preprocess(
        folder / "signs",
        f"--input=[{{path: {signs}, name: signs}}]",
        tokenizer=shards / "tokenizer",
    )
