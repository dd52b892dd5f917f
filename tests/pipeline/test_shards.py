"""The bytes of a shard's parts are those that the standard writers give."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import INDEX_DTYPE
from pipeline.shards import Sample, ShardWriter, member_header

NAMES = ("", "000001000002.jpg", "a" * 99, "a" * 100, "folder/" + "b" * 96, "größe.txt")
SIZES = (0, 1, 511, 512, 4_096_001, 8**11 - 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_a_header_is_what_tarfile_writes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    assert member_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_a_member_that_ustar_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="overflow"):
        member_header("a.jpg", 8**11)
    with pytest.raises(ValueError, match="too long"):
        member_header("a" * 101, 1)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("tokens", [1, 12, 13, 1000])
def test_files_of_arrays_are_what_numpy_saves(
    tmp_path: Path, kind: type[np.generic], tokens: int
) -> None:
    ids = np.arange(tokens, dtype=kind)
    writer = ShardWriter(tmp_path, "train", (), "jpg")
    writer.add(
        Sample(
            key="000000000000",
            uid=1,
            ids=ids,
            image=b"jpeg",
            width=2,
            height=2,
            captions=["a"],
            json={},
        ),
        {"key": "000000000000", "status": "success"},
    )
    writer.close()
    with tarfile.open(tmp_path / "train.tar") as tar:
        stored = tar.extractfile("000000000000.input_ids.npy")
        assert stored is not None
        assert stored.read() == _saved(ids)
    index = np.load(tmp_path / "train.index.npy")
    assert (tmp_path / "train.index.npy").read_bytes() == _saved(
        index.astype(INDEX_DTYPE)
    )


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
