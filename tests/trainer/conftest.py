from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.trainer.datasets import preprocess, slices
from tests.trainer.tiny import launch


@pytest.fixture(scope="session")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two ranks by the deepspeed launcher, on a disk; not to be
    changed.
    """

    def make(folder: Path) -> None:
        often = "--checkpoint.every_steps=5"
        launch(2, f"--data={shards}", f"--output={folder / 'run'}", often)

    return made_once(tmp_path_factory, "whole", make) / "run"


@pytest.fixture(scope="session")
def mixed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two sources, `faces` (90 samples, weight 3) and `flags` (70, weight
    1), in shards of 16, with the tokenizer of `shards`.
    """

    def make(folder: Path) -> None:
        faces, flags = slices(folder, 90, 70)
        first = f"{{path: {faces}, name: faces, weight: 3}}"
        preprocess(
            folder / "shards",
            f"--input=[{first}, {{path: {flags}, name: flags}}]",
            tokenizer=shards / "tokenizer",
        )

    return made_once(tmp_path_factory, "mixed", make) / "shards"


@pytest.fixture(scope="session")
def extra(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one source, `signs` (60 samples), with the tokenizer of `shards`."""

    def make(folder: Path) -> None:
        _, _, signs = slices(folder, 90, 70, 60)
        preprocess(
            folder / "signs",
            f"--input=[{{path: {signs}, name: signs}}]",
            tokenizer=shards / "tokenizer",
        )

    return made_once(tmp_path_factory, "extra", make) / "signs"
