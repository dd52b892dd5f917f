"""Every single flipped bit of a finished dataset is found.

The soak test tries 2,000; the others a few of the same kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.damage import copied, damages, flip

SOAK_FLIPS = 2_000


def drawn(paths: list[Path], seed: int, count: int) -> list[tuple[Path, int, int]]:
    """Places to flip: half drawn evenly over bytes, half evenly over files, so that the
    small files are hit as well.
    """
    generator = np.random.default_rng(seed)
    sizes = np.array([path.stat().st_size for path in paths])
    places = []
    for number in range(count):
        share = sizes / sizes.sum() if number % 2 else None
        which = int(generator.choice(len(paths), p=share))
        bit = int(generator.integers(8 * sizes[which]))
        places.append((paths[which], bit // 8, bit % 8))
    return places


def check_flips(root: Path, paths: list[Path], *, deep: bool, count: int) -> None:
    """Flip bits one at a time; each must be found, and named by its file."""
    assert damages(root, deep=deep) == []
    for path, offset, bit in drawn(paths, 0, count):
        flip(path, offset, bit)
        name = path.relative_to(root).as_posix()
        try:
            found = {damage.path for damage in damages(root, deep=deep)}
        except ValueError as error:
            # Without a manifest that can be read there is nothing to check against.
            assert name == "manifest.json", (name, offset, bit)
            found = {name} if "it is damaged" in str(error) else set()
        assert name in found, (name, offset, bit)
        flip(path, offset, bit)
    assert damages(root, deep=deep) == []


def files(root: Path) -> list[Path]:
    """Every file of a dataset, its state included."""
    paths = [path for path in sorted(root.rglob("*")) if path.stat().st_size]
    paths = [path for path in paths if path.is_file()]
    folders = {path.parent.name for path in paths}
    assert folders >= {root.name, "tokenizer", "rejected", ".nv-meta", "train", "val"}
    assert folders >= {".palimpsest", "ranges"}
    return paths


def test_a_flipped_bit_anywhere_is_found_by_deep(dataset: Path, tmp_path: Path) -> None:
    root = copied(dataset, tmp_path / "copy")
    check_flips(root, files(root), deep=True, count=40)


def test_a_flipped_bit_of_a_tar_is_found_by_the_index_check(
    dataset: Path, tmp_path: Path
) -> None:
    root = copied(dataset, tmp_path / "copy")
    check_flips(root, sorted(root.glob("*/*.tar")), deep=False, count=40)


@pytest.mark.soak
def test_thousands_of_flipped_bits_are_found(dataset: Path, tmp_path: Path) -> None:
    root = copied(dataset, tmp_path / "copy")
    check_flips(root, files(root), deep=True, count=SOAK_FLIPS)
    tars = sorted(root.glob("*/*.tar"))
    check_flips(root, tars, deep=False, count=SOAK_FLIPS)
