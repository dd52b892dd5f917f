"""Reading samples of a dataset directory: memory-mapped tars through the index.

Owns the bytes of a sample and the check of their CRC32C (law 5). Does not own which
sample comes when (`trainer.order`) or batches (`trainer.loader`).
"""

from __future__ import annotations

import json
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from pipeline.manifest import (
    TOKENIZER,
    captions_of,
    file_sha256,
    load_index,
    load_manifest,
    token_ids,
)

# Each open tar holds a file descriptor, of which a process has 1,024 by default.
_TARS_KEPT_OPEN = 256
_INDEXES_KEPT = 512


class Dataset:
    """One split of a dataset directory.

    Args:
        root: dataset directory.
        split: its split.
        tokenizer: directory of the tokenizer that the caller expects, if any.

    Raises:
        ValueError: no or unfinished dataset, no such split, a tokenizer that is not the
            one that made the tokens. The message has the cure.
    """

    def __init__(
        self, root: str | Path, split: str, *, tokenizer: str | None = None
    ) -> None:
        self.root = Path(root)
        self.manifest = load_manifest(self.root)
        self.shards = self.manifest.split(split)
        self.counts = [shard.samples for shard in self.shards]
        self._check_tokenizer(self.root / TOKENIZER)
        if tokenizer is not None:
            self._check_tokenizer(Path(tokenizer))
        self._indexes = _Kept(self._load_index, _INDEXES_KEPT)
        self._tars = _Kept(self._open_tar, _TARS_KEPT_OPEN)
        self._ids = _Kept(self._open_ids, _TARS_KEPT_OPEN)

    def __len__(self) -> int:
        return sum(self.counts)

    def places(self) -> np.ndarray:
        """All places (N, 2) of (shard, sample), in stored order."""
        shard = np.repeat(np.arange(len(self.counts)), self.counts)
        sample = np.concatenate([np.arange(count) for count in self.counts])
        return np.stack([shard, sample], axis=1)

    def records(self, places: np.ndarray) -> np.ndarray:
        """Index records (n,) at `places` (n, 2) of (shard, sample)."""
        rows = [self._indexes(int(shard))[sample] for shard, sample in places]
        return np.array(rows, dtype=rows[0].dtype)

    def jpeg(self, shard: int, record: np.void) -> memoryview:
        """Checked bytes of a sample's image: a JPEG, or as the tar had it."""
        return self._member(shard, record, "jpg")

    def captions(self, shard: int, record: np.void) -> list[np.ndarray]:
        """Token ids of each caption of a sample, separators kept, checked."""
        info = self.manifest.tokenizer
        member = self._member(shard, record, "ids")
        ids = token_ids(member, int(record["n_tokens"]), info.dtype)
        captions = captions_of(ids, info.special_ids["sep"])
        if len(captions) != record["n_captions"]:
            raise ValueError(
                f"{self._where(shard, record, 'ids')} holds {len(captions)} captions, "
                f"the index says {record['n_captions']}: {self._cure()}"
            )
        return list(captions)

    def text(
        self, shard: int, record: np.void, caption: int, *, max_tokens: int
    ) -> tuple[np.ndarray, bool]:
        """[CLS] words [SEP] of one caption of a sample, int64, cut to `max_tokens`; and
        whether it was cut.
        """
        special = self.manifest.tokenizer.special_ids
        words = self.captions(shard, record)[caption][:-1]
        room = max_tokens - 2
        text = np.empty(min(len(words), room) + 2, dtype=np.int64)
        text[0], text[1:-1], text[-1] = special["cls"], words[:room], special["sep"]
        return text, len(words) > room

    def json(self, shard: int, record: np.void) -> dict[str, Any]:
        """A sample's `json` member. Parses the tar, so not for the training path."""
        span = self._bytes(shard, record, "span")
        with tarfile.open(fileobj=BytesIO(span.tobytes()), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".json") and file is not None:
                    return json.load(file)
        raise ValueError(
            f"{self._where(shard, record, 'span')} has no json member: {self._cure()}"
        )

    def _load_index(self, shard: int) -> np.ndarray:
        # A copy in memory: a map would hold a file descriptor.
        return np.array(load_index(self.root, self.shards[shard]))

    def _member(self, shard: int, record: np.void, kind: str) -> memoryview:
        return self._bytes(shard, record, kind).data

    def _bytes(self, shard: int, record: np.void, kind: str) -> np.ndarray:
        offset, size = int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])
        sidecar = kind == "ids" and self.shards[shard].ids
        file = self._ids(shard) if sidecar else self._tars(shard)
        data = file[offset : offset + size]
        if len(data) != size or crc32c.crc32c(data.data) != record[f"{kind}_crc32c"]:
            raise ValueError(
                f"{self._where(shard, record, kind)} is damaged: {self._cure()}"
            )
        return data

    def _open_tar(self, shard: int) -> np.ndarray:
        return self._map(self.shards[shard].name)

    def _open_ids(self, shard: int) -> np.ndarray:
        return self._map(self.shards[shard].ids or self.shards[shard].name)

    def _map(self, name: str) -> np.ndarray:
        path = self.root / name
        # An empty file cannot be mapped.
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is missing or empty: {self._cure()}")
        return np.memmap(path, mode="r")

    def _where(self, shard: int, record: np.void, kind: str) -> str:
        name = {"ids": "input_ids.npy", "span": "sample"}.get(kind, kind)
        file = self.shards[shard].name
        if kind == "ids":
            file = self.shards[shard].ids or file
        place = f"{file}, offset {int(record[f'{kind}_offset'])}"
        return f"{place}: {name} of uid {int(record['uid']):016x}"

    def _cure(self) -> str:
        return f"`python -m pipeline.validate {self.root}` names every damage"

    def _check_tokenizer(self, directory: Path) -> None:
        path, info = directory / "tokenizer.json", self.manifest.tokenizer
        if not path.is_file():
            raise ValueError(f"{path} is missing: not a tokenizer directory")
        found = file_sha256(path)
        if found != info.sha256:
            raise ValueError(
                f"tokenizer {directory} has sha256 {found}, but the tokens of "
                f"{self.root} were made with {info.sha256}: preprocess again with this "
                "tokenizer, or train with the dataset's own"
            )


class _Kept:
    """The most recently used results of `make`, for several threads at once."""

    def __init__(self, make: Callable[[int], np.ndarray], most: int) -> None:
        self._make, self._most = make, most
        self._items: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: int) -> np.ndarray:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        item = self._make(key)
        with self._lock:
            self._items[key] = item
            while len(self._items) > self._most:
                self._items.popitem(last=False)
        return item
