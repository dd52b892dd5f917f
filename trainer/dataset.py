"""What a run reads: one or several dataset directories.

Owns how shards of several directories are told apart, and reading any of them. Does not
own the bytes of a shard (`trainer.folder`), sources and their weights
(`trainer.sources`) or which sample comes when (`trainer.order`).

A shard is called by one number: directory << 32 | its number in the directory's split.
So that of a single directory is called by its number alone.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.manifest import INDEX_DTYPE, TOKENIZER, Manifest, Shard, TokenizerInfo
from trainer.folder import DamagedError, Folder
from trainer.storage import LocalFiles, StorageConfig

_SHARD_BITS = 32
_NUMBER_MASK = (1 << _SHARD_BITS) - 1
# An index record as bytes: numpy copies records field by field, which takes twice as
# long.
_RECORD = np.dtype((np.void, INDEX_DTYPE.itemsize))


class Dataset:
    """One split of one or several dataset directories, with tokens of one tokenizer.

    Args:
        roots: dataset directories or their URLs; a single one may be given bare.
        split: their split.
        tokenizer: directory of the tokenizer that the caller expects, if any.
        growing: take datasets that are still being written.
        storage: how those behind a URL are read.

    Raises:
        ValueError: no or unfinished dataset, no such split, a tokenizer that is not the
            one that made the tokens, two datasets of different tokenizers. The message
            has the cure.
        OSError: storage failed.
    """

    def __init__(
        self,
        roots: str | Path | Sequence[str],
        split: str,
        *,
        tokenizer: str | None = None,
        growing: bool = False,
        storage: StorageConfig | None = None,
    ) -> None:
        given = [roots] if isinstance(roots, str | Path) else roots
        self.folders = [
            Folder(root, split, growing=growing, storage=storage, among=len(given))
            for root in given
        ]
        self._check_tokenizers(tokenizer)

    def __len__(self) -> int:
        return sum(shard.samples for _, shard in self.numbered())

    @property
    def name(self) -> str:
        """The directories, as the user gave them."""
        return ", ".join(folder.name for folder in self.folders)

    @property
    def manifest(self) -> Manifest:
        """Of the first directory: its tokenizer is every one's."""
        return self.folders[0].manifest

    @property
    def manifest_hash(self) -> str:
        """The manifest hash of law 1; of several directories, that of their hashes."""
        hashes = [folder.manifest_hash for folder in self.folders]
        if len(hashes) == 1:
            return hashes[0]
        return sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """Nothing is being appended to any directory."""
        return all(folder.manifest.complete for folder in self.folders)

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer that made all ids."""
        return self.manifest.tokenizer

    @property
    def tokenizer_file(self) -> Path:
        """Its `tokenizer.json`."""
        return self.folders[0].tokenizer_folder / "tokenizer.json"

    def numbered(self) -> Iterator[tuple[int, Shard]]:
        """Every shard, with the number that places call it by, in stored order."""
        for number, folder in enumerate(self.folders):
            for shard, entry in enumerate(folder.shards):
                yield number << _SHARD_BITS | shard, entry

    def shard(self, shard: int) -> Shard:
        """What the manifest says of a shard."""
        folder, number = self._of(shard)
        return folder.shards[number]

    @property
    def remote(self) -> bool:
        """Are files fetched from anywhere before they are read?"""
        return not all(
            isinstance(folder.storage, LocalFiles) for folder in self.folders
        )

    def ahead(self, shards: Iterable[int]) -> None:
        """Say which shards will be read, in this order, in place of what was said
        before, so that they are there in time. Does not block.
        """
        for folder, numbers in self._by_folder(shards):
            folder.ahead(numbers)

    def ahead_in_order(self, shards: np.ndarray) -> Callable[[int], None]:
        """As `ahead`, for samples of `shards` (N,) that are read about in this order,
        each once. To be called with the row of each that has been read: what none after
        it needs makes room.
        """
        if not self.remote:
            return lambda row: None
        left, lock = Counter(shards.tolist()), threading.Lock()
        self.ahead(left)

        def was_read(row: int) -> None:
            shard = int(shards[row])
            with lock:
                left[shard] -= 1
                if not left[shard]:
                    del left[shard]
                    self.ahead(left)

        return was_read

    def indexes_ahead(self, shards: Iterable[int]) -> None:
        """As `ahead`, of shards of which no more than `records` is known to be read."""
        for folder, numbers in self._by_folder(shards):
            folder.indexes_ahead(numbers)

    def _by_folder(self, shards: Iterable[int]) -> Iterator[tuple[Folder, list[int]]]:
        found: list[list[int]] = [[] for _ in self.folders]
        for shard in shards:
            found[shard >> _SHARD_BITS].append(shard & _NUMBER_MASK)
        yield from zip(self.folders, found, strict=True)

    def expect(self, shards: int, sources: Sequence[np.ndarray]) -> None:
        """Say that samples of so many shards at once of each of some sources, given by
        all their shards, will be asked for: as many indexes stay in memory, and at
        least 512 of each directory.
        """
        for number, folder in enumerate(self.folders):
            inside = [one for one in sources if (one >> _SHARD_BITS == number).any()]
            folder.expect(shards * len(inside))

    def spent_on_indexes(self) -> float:
        """Seconds that loading indexes has taken since this was last asked."""
        return sum(folder.spent_on_indexes() for folder in self.folders)

    def close(self) -> None:
        """Fetch nothing more, and hold nothing open: whoever waits for a file gets an
        OSError.
        """
        for folder in self.folders:
            folder.close()

    def places(self) -> np.ndarray:
        """All places (N, 2) of (shard, sample), in stored order."""
        numbered = list(self.numbered())
        counts = [entry.samples for _, entry in numbered]
        shard = np.repeat([number for number, _ in numbered], counts)
        sample = np.concatenate([np.arange(count) for count in counts])
        return np.stack([shard, sample], axis=1)

    def records(self, places: np.ndarray) -> np.ndarray:
        """Index records (n,) at `places` (n, 2) of (shard, sample)."""
        shards, which = np.unique(places[:, 0], return_inverse=True)
        order = np.argsort(which, kind="stable")
        ends = np.cumsum(np.bincount(which, minlength=len(shards)))
        samples = places[order, 1]
        found = np.empty(len(places), dtype=_RECORD)
        start = 0
        for shard, end in zip(shards.tolist(), ends.tolist(), strict=True):
            folder, number = self._of(shard)
            index = folder.index(number).view(_RECORD)
            found[order[start:end]] = index[samples[start:end]]
            start = end
        return found.view(INDEX_DTYPE)

    def files(self, shard: int) -> tuple[BinaryIO, BinaryIO | None]:
        """A shard's tar, and the sidecar with its token ids if it has one."""
        folder, number = self._of(shard)
        return folder.files(number)

    def jpeg(self, shard: int, record: np.void) -> memoryview:
        """Checked bytes of a sample's image: a JPEG, or as the tar had it.

        Raises:
            DamagedError: they are not what the index says, twice.
            OSError: storage failed.
        """
        folder, number = self._of(shard)
        return folder.jpeg(number, record)

    def check_members(self, shard: int, record: np.void) -> None:
        """Read all members of a sample, those that training does not use included.

        Raises:
            DamagedError, OSError: as `jpeg`.
        """
        folder, number = self._of(shard)
        folder.check_members(number, record)

    def undecodable(
        self, shard: int, record: np.void, error: Exception
    ) -> DamagedError:
        """The damage of an image whose bytes are right and do not decode."""
        folder, number = self._of(shard)
        return folder.undecodable(number, record, error)

    def captions(self, shard: int, record: np.void) -> list[np.ndarray]:
        """Token ids of each caption of a sample, separators kept, checked.

        Raises:
            DamagedError, OSError: as `jpeg`.
        """
        folder, number = self._of(shard)
        return folder.captions(number, record)

    def text(
        self, shard: int, record: np.void, caption: int, *, max_tokens: int
    ) -> tuple[np.ndarray, bool]:
        """[CLS] words [SEP] of one caption of a sample, int64, cut to `max_tokens`; and
        whether it was cut.
        """
        folder, number = self._of(shard)
        return folder.text(number, record, caption, max_tokens=max_tokens)

    def json(self, shard: int, record: np.void) -> dict[str, Any]:
        """A sample's `json` member. Parses the tar, so not for the training path."""
        folder, number = self._of(shard)
        return folder.json(number, record)

    def indexed(self, shard: int) -> bool:
        """Is a shard one of anybody's tars, which `pipeline.index` described?"""
        return self._of(shard)[0].manifest.indexed

    def appended(self) -> tuple[list[list[Shard]], list[str]]:
        """Of each directory, the shards committed since this was last asked; and what
        is wrong with directories that could not say. Does not append them.
        """
        found: list[list[Shard]] = []
        problems = []
        for folder in self.folders:
            try:
                found.append(folder.appended())
            except (ValueError, OSError) as error:
                found.append([])
                problems.append(str(error))
        return found, problems

    def append(self, shards: Sequence[Sequence[Shard]]) -> None:
        """Take in what `appended` gave, here or on another rank."""
        for folder, more in zip(self.folders, shards, strict=True):
            folder.shards.extend(more)

    def folder_of(self, shard: int) -> int:
        """Number of the directory that a shard lies in."""
        return shard >> _SHARD_BITS

    def _of(self, shard: int) -> tuple[Folder, int]:
        return self.folders[shard >> _SHARD_BITS], shard & _NUMBER_MASK

    def _check_tokenizers(self, expected: str | None) -> None:
        first = self.folders[0]
        for folder in self.folders:
            if expected is not None:
                folder.check_tokenizer(Path(expected))
            if folder.manifest.tokenizer != first.manifest.tokenizer:
                raise ValueError(
                    f"the tokens of {folder.name} and of {first.name} were made by "
                    "different tokenizers: make one anew with the other's, python -m "
                    f"pipeline.retokenize {folder.name} --tokenizer "
                    f"{first.name}/{TOKENIZER} --output NEW"
                )
