"""One dataset directory: its manifest, its shards, spans of their tars.

Owns the bytes of a sample and the check of their CRC32C (law 5). Does not own how its
files become local (`trainer.storage`), several directories in one run
(`trainer.dataset`), which sample comes when (`trainer.order`) or what takes the place
of a damaged sample (`trainer.loader`).

Tars are read, not mapped: a mapped file that somebody truncates kills the process.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Generic, TypeVar

import crc32c
import numpy as np

from pipeline.manifest import (
    INDEX_DTYPE,
    MANIFEST,
    Shard,
    captions_of,
    file_sha256,
    load_index,
    token_ids,
    words_file,
)
from trainer import descriptors
from trainer.storage import (
    LocalFiles,
    NoRoomError,
    StorageConfig,
    StorageError,
    Wanted,
    open_files,
    read_manifest,
    read_seal,
)

_TARS_KEPT_OPEN = 256
# Indexes in memory, unless more are needed at once; of those a quarter more, because
# what is needed no more goes only once it is the one that was longest not asked for.
_INDEXES_KEPT = 512
_SPARE = 4
# Storage may fail for a moment: an error is one after this many reads.
_READS = 4
_PAUSE_SECONDS = 0.5
_LOOK_AGAIN_SECONDS = 1.0
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Item = TypeVar("Item")


class DamagedError(ValueError):
    """A sample whose bytes are not those that the index was made of. `reason` is
    missing, truncated, crc, captions or undecodable.
    """

    def __init__(self, message: str, *, uid: int, shard: str, reason: str) -> None:
        super().__init__(message)
        self.uid, self.shard, self.reason = uid, shard, reason
        self.also: list[DamagedError] = []
        """Other samples of the same batch, by row."""


class Folder:
    """One split of a dataset directory. Its shards are numbered from 0, in the order in
    which they were committed; more may be appended.

    Args:
        root: dataset directory, or its URL.
        split: its split.
        growing: take a dataset that is still being written.
        storage: how one behind a URL is read.
        among: folders that are read together, this one included.

    Raises:
        ValueError: no or unfinished dataset, no such split, tokens of another tokenizer
            than the one beside them. The message has the cure.
        OSError: storage failed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        growing: bool = False,
        storage: StorageConfig | None = None,
        among: int = 1,
    ) -> None:
        self.storage = open_files(root, storage or StorageConfig())
        self.name = self.storage.root
        self.split = split
        self.manifest, self._seal = read_manifest(self.storage)
        if not (growing or self.manifest.complete):
            raise ValueError(
                f"{self.name} is still being written: wait for preprocess, or resume "
                "it with the same command; trainer.pretrain --grow starts on the "
                "shards committed so far"
            )
        self.shards = list(self.manifest.split(split))
        self._check_storage()
        self.tokenizer_folder = self._own_tokenizer()
        tokenizer = self.check_tokenizer(self.tokenizer_folder)
        manifest = self.storage.at(MANIFEST).stat().st_size
        self._check_storage(manifest + tokenizer.stat().st_size)
        self._fetched_anew: set[str] = set()
        self._sample = threading.local()
        self._fetching = threading.Lock()
        self._counting = threading.Lock()
        self._indexes_s = 0.0
        self._indexes = _Kept(self._timed_index, _INDEXES_KEPT)
        open_at_once = min(_TARS_KEPT_OPEN, descriptors.kept_by(among))
        self._tars = _Kept(self._open_tar, open_at_once)
        self._ids = _Kept(self._open_ids, open_at_once)

    @property
    def manifest_hash(self) -> str:
        """sha256 of `manifest.json`, which opening it has checked."""
        return self._seal.split()[0].decode()

    @property
    def last_name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.name).name

    def appended(self) -> list[Shard]:
        """Shards that have been committed since this was opened, in order. The manifest
        is read again only where its seal has changed.

        Raises:
            ValueError: the dataset is not the same and more: it was made anew.
        """
        if read_seal(self.storage) == self._seal:
            return []
        manifest, seal = read_manifest(self.storage)
        shards = [shard for shard in manifest.shards if shard.split == self.split]
        same = manifest.tokenizer == self.manifest.tokenizer
        if not same or shards[: len(self.shards)] != self.shards:
            raise ValueError(
                f"{self.name} was made anew while a run reads it: stop the run, and "
                "start it again to be told what can be done"
            )
        self._seal, self.manifest = seal, manifest
        return shards[len(self.shards) :]

    def ahead(self, shards: Sequence[int]) -> None:
        """Say which shards will be read, in this order, in place of what was said
        before: they are fetched in the background, and no others are held open.
        """
        wanted = []
        for shard in shards:
            entry = self.shards[shard]
            tar, ids = entry.sha256["tar"], entry.sha256.get("ids", "")
            wanted.append(_index_of(entry))
            wanted.append(Wanted(entry.name, tar, entry.bytes, streamed=True))
            if entry.ids:
                wanted.append(Wanted(entry.ids, ids, streamed=True))
        # What is open has a place in the cache that others may need.
        for kept in (self._tars, self._ids):
            kept.keep_only(set(shards))
        self.storage.ahead(wanted)

    def close(self) -> None:
        """Fetch nothing more, and hold nothing open: whoever waits for a file gets an
        OSError.
        """
        for kept in (self._tars, self._ids):
            kept.keep_only(set())
        self.storage.close()

    def indexes_ahead(self, shards: Sequence[int]) -> None:
        """As `ahead`, of what is asked of their indexes alone."""
        self.storage.ahead([_index_of(self.shards[shard]) for shard in shards])

    def expect(self, shards: int) -> None:
        """Say that samples of so many shards at once will be asked for: as many indexes
        stay in memory.
        """
        self._indexes.keep(shards + shards // _SPARE)

    def index(self, shard: int) -> np.ndarray:
        """Index records (samples,) of a shard, checked against the manifest."""
        return self._indexes(shard)

    def files(self, shard: int) -> tuple[BinaryIO, BinaryIO | None]:
        """A shard's tar, and the sidecar with its token ids if it has one, open for
        reading at any place. Keep them no longer than it takes.

        Raises:
            OSError: not there, or storage failed.
        """
        sidecar = self._fresh(self._ids, shard) if self.shards[shard].ids else None
        return self._fresh(self._tars, shard), sidecar

    def jpeg(self, shard: int, record: np.void) -> memoryview:
        """Checked bytes of a sample's image: a JPEG, or as the tar had it.

        Raises:
            DamagedError: they are not what the index says, twice.
            OSError: storage failed.
        """
        return self._bytes(shard, record, "jpg")

    def check_members(self, shard: int, record: np.void) -> None:
        """Read all members of a sample, those that training does not use included.

        Raises:
            DamagedError, OSError: as `jpeg`.
        """
        self._bytes(shard, record, "span")

    def undecodable(
        self, shard: int, record: np.void, error: Exception
    ) -> DamagedError:
        """The damage of an image whose bytes are right and do not decode."""
        where = self._where(shard, record, "jpg")
        return self._damage(shard, record, "undecodable", f"{where} {error}")

    def captions(self, shard: int, record: np.void) -> list[np.ndarray]:
        """Token ids of each caption of a sample, separators kept, checked.

        Raises:
            DamagedError, OSError: as `jpeg`.
        """
        info = self.manifest.tokenizer
        member = self._bytes(shard, record, "ids")
        ids = token_ids(member, int(record["n_tokens"]), info.dtype)
        captions = captions_of(ids, info.special_ids["sep"])
        if len(captions) != record["n_captions"]:
            raise self._damage(
                shard,
                record,
                "captions",
                f"{self._where(shard, record, 'ids')} holds {len(captions)} captions, "
                f"the index says {record['n_captions']}",
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
        with tarfile.open(fileobj=BytesIO(span), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".json") and file is not None:
                    return json.load(file)
        raise ValueError(
            f"{self._where(shard, record, 'span')} has no json member: {self._cure()}"
        )

    def spent_on_indexes(self) -> float:
        """Seconds that loading indexes has taken since this was last asked."""
        with self._counting:
            spent, self._indexes_s = self._indexes_s, 0.0
        return spent

    def _timed_index(self, shard: int) -> np.ndarray:
        begun = time.perf_counter()
        try:
            return self._load_index(shard)
        finally:
            with self._counting:
                self._indexes_s += time.perf_counter() - begun

    def _load_index(self, shard: int) -> np.ndarray:
        """A copy in memory: a map would hold a file descriptor. One that was damaged on
        its way is fetched once more.
        """
        entry, storage = self.shards[shard], self.storage
        fetch, problem = storage.local, ""
        for _ in range(_READS):
            try:
                path = fetch(entry.index, entry.sha256["index"])
            except FileNotFoundError:
                problem = f"{self.name}/{entry.index} is missing: {self._cure()}"
                break
            root = path.parents[entry.index.count("/")]
            try:
                return np.array(load_index(root, entry))
            except (ValueError, FileNotFoundError) as error:
                problem = str(error).replace(str(root), self.name)
            # One that is not there any more made room for what others fetch.
            if path.is_file():
                if fetch == storage.refresh:
                    break
                fetch = storage.refresh
        else:
            if not isinstance(storage, LocalFiles):
                raise StorageError(
                    f"{self.name}/{entry.index} went from the cache {_READS} times "
                    "before it was read: give more as --storage.cache_bytes"
                )
        raise ValueError(problem)

    def _own_tokenizer(self) -> Path:
        """Local folder of the tokenizer that made the ids."""
        name = self.manifest.tokenizer.path + "/tokenizer.json"
        sha256 = self.manifest.tokenizer.sha256
        try:
            path = self.storage.pin(name, sha256)
            if path.is_file() and file_sha256(path) != sha256:
                path = self.storage.refresh(name, sha256)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name}/{name} is missing: {self._cure()}"
            ) from error
        return path.parent

    def _check_storage(self, pinned: int = 0) -> None:
        """Raise ValueError where a shard could never be had beside small files, so many
        bytes of them pinned.
        """
        largest = max(shard.bytes for shard in self.shards)
        samples = max(shard.samples for shard in self.shards)
        # Of an index, one version may be read while another is fetched.
        indexes = 2 * samples * INDEX_DTYPE.itemsize
        self.storage.check(largest, beside=pinned + indexes)

    def _bytes(self, shard: int, record: np.void, kind: str) -> memoryview:
        """Bytes with the CRC of the index, read twice before they are called wrong."""
        size = int(record[f"{kind}_size"])
        reason = ""
        for anew in (False, True):
            try:
                data = self._read(shard, record, kind, anew=anew)
            except _GONE:
                reason = "missing"
            else:
                whole = len(data) == size
                if whole and crc32c.crc32c(data) == record[f"{kind}_crc32c"]:
                    return data
                reason = "crc" if whole else "truncated"
        where = self._where(shard, record, kind)
        if reason == "missing":
            where = f"{self.name}/{self._file(shard, kind)[0]} is missing: {where}"
        raise self._damage(shard, record, reason, f"{where} is damaged")

    def _read(
        self, shard: int, record: np.void, kind: str, *, anew: bool
    ) -> memoryview:
        """A kind of member as it is, fewer bytes where the file ends; `anew` where it
        is damaged as it was read before.
        """
        files = self._ids if self._in_sidecar(shard, kind) else self._tars
        offset, size = int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])
        try:
            if anew:
                # Its place may be needed, and another thread may open it meanwhile.
                files.forget(shard)
                self._fetch_anew(shard, kind)
                files.forget(shard)
            return _span(lambda: self._fresh(files, shard), offset, size)
        except NoRoomError:
            return self._read_remote(shard, record, kind, anew=anew)

    def _read_remote(
        self, shard: int, record: np.void, kind: str, *, anew: bool
    ) -> memoryview:
        """As `_read`, from where storage has it: all members of the tar in one request,
        as the other kinds will be asked for next.
        """
        name, _ = self._file(shard, kind)
        offset, size = int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])
        at = int(record["span_offset"])
        end = at + int(record["span_size"])
        if self._in_sidecar(shard, kind) or not at <= offset <= offset + size <= end:
            return memoryview(self.storage.span(name, offset, size))
        have: tuple[tuple[str, int], bytes] | None = getattr(self._sample, "read", None)
        if anew or have is None or have[0] != (name, at):
            have = (name, at), self.storage.span(name, at, end - at)
            self._sample.read = have
        return memoryview(have[1])[offset - at :][:size]

    def _fetch_anew(self, shard: int, kind: str) -> None:
        """Have a file as storage has it now: what is damaged may be the local copy.
        Once a file, because the next sample may well be damaged too.
        """
        name, version = self._file(shard, kind)
        with self._fetching:
            if name not in self._fetched_anew:
                with suppress(FileNotFoundError):
                    self.storage.refresh(name, version, streamed=True)
                self._fetched_anew.add(name)

    def _damage(
        self, shard: int, record: np.void, reason: str, what: str
    ) -> DamagedError:
        return DamagedError(
            f"{what}: {self._cure()}",
            uid=int(record["uid"]),
            shard=self.shards[shard].name,
            reason=reason,
        )

    def _open_tar(self, shard: int) -> _Opened:
        return self._opened(*self._file(shard, "jpg"))

    def _open_ids(self, shard: int) -> _Opened:
        return self._opened(*self._file(shard, "ids"))

    def _opened(self, name: str, version: str) -> _Opened:
        path = self.storage.at(name, version)
        return _Opened(self.storage.open(name, version), path)

    def _fresh(self, files: _Kept[_Opened], shard: int) -> BinaryIO:
        """The open file, opened again where another lies in its place by now."""
        opened = files(shard)
        if opened.replaced():
            files.forget(shard)
            opened = files(shard)
        return opened.file

    def _file(self, shard: int, kind: str) -> tuple[str, str]:
        """Name and sha256 of the file that holds a kind of member."""
        entry = self.shards[shard]
        if entry.ids and self._in_sidecar(shard, kind):
            return entry.ids, entry.sha256["ids"]
        return entry.name, entry.sha256["tar"]

    def _in_sidecar(self, shard: int, kind: str) -> bool:
        return kind == "ids" and bool(self.shards[shard].ids)

    def _where(self, shard: int, record: np.void, kind: str) -> str:
        name = {"ids": "input_ids.npy", "span": "sample"}.get(kind, kind)
        file, _ = self._file(shard, kind)
        place = f"{file}, offset {int(record[f'{kind}_offset'])}"
        return f"{place}: {name} of uid {int(record['uid']):016x}"

    def _cure(self) -> str:
        return f"`python -m pipeline.validate {self.name}` names every damage"

    def check_tokenizer(self, directory: Path) -> Path:
        """The file of the tokenizer in `directory`. Raises ValueError unless it made
        the tokens.
        """
        path, info = words_file(directory), self.manifest.tokenizer
        if not path.is_file():
            raise ValueError(f"{path} is missing: not a tokenizer directory")
        found = file_sha256(path)
        if found != info.sha256:
            raise ValueError(
                f"tokenizer {directory} has sha256 {found}, but the tokens of "
                f"{self.name} were made with {info.sha256}: preprocess again with this "
                "tokenizer, or train with the dataset's own"
            )
        return path


def read_into(memory: memoryview, descriptor: int, offset: int) -> memoryview:
    """As much of `memory` as the file has from `offset` on."""
    have = os.preadv(descriptor, [memory], offset)
    while 0 < have < len(memory):
        more = os.preadv(descriptor, [memory[have:]], offset + have)
        if not more:
            break
        have += more
    return memory[:have]


def in_page_cache(descriptor: int, offset: int) -> bool:
    """Whether a byte of a file can be had at once. False too where the storage does not
    tell; True where nothing can be done about it (`read_ahead`).
    """
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "posix_fadvise"):
        return True
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def read_ahead(descriptor: int, offset: int, size: int) -> None:
    """Have the kernel read a span of a file, without waiting for it. Only Linux can be
    asked.
    """
    # What is wrong with the file says whoever reads it.
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _index_of(entry: Shard) -> Wanted:
    size = entry.samples * INDEX_DTYPE.itemsize
    return Wanted(entry.index, entry.sha256["index"], size)


def _span(opened: Callable[[], BinaryIO], offset: int, size: int) -> memoryview:
    """`size` bytes from `offset` of a file, fewer where it ends; tried again where
    storage may have failed for a moment.
    """
    for left in reversed(range(_READS)):
        try:
            memory = memoryview(bytearray(size))
            # Whoever else forgets the file does not close it meanwhile.
            file = opened()
            return read_into(memory, file.fileno(), offset)
        except (*_GONE, NoRoomError, StorageError):
            raise
        except OSError:
            if not left:
                raise
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("the last read returns or raises")


class _Opened:
    """An open file, and whether it is still the one at its path."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._path = path
        self.file = file
        self._identity = os.fstat(self.file.fileno())
        self._looked = time.monotonic()

    def replaced(self) -> bool:
        """Has it been deleted, or another put in its place? Looks once a second: an
        open file reads as before whatever becomes of its name.
        """
        if time.monotonic() < self._looked + _LOOK_AGAIN_SECONDS:
            return False
        self._looked = time.monotonic()
        try:
            return not os.path.samestat(os.stat(self._path), self._identity)
        except _GONE:
            return True


class _Kept(Generic[Item]):
    """The most recently used results of `make`, for several threads at once."""

    def __init__(self, make: Callable[[int], Item], most: int) -> None:
        self._make, self._most = make, most
        self._items: OrderedDict[int, Item] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: int) -> Item:
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

    def keep(self, most: int) -> None:
        """Keep at least so many from now on."""
        with self._lock:
            self._most = max(self._most, most)

    def forget(self, key: int) -> None:
        """Make it anew the next time."""
        with self._lock:
            self._items.pop(key, None)

    def keep_only(self, keys: Collection[int]) -> None:
        """Forget all others."""
        with self._lock:
            for key in self._items.keys() - keys:
                del self._items[key]
