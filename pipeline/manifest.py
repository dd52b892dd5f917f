"""The schema of a dataset directory: manifest, shard names, index records, accounting.

Owns what every other part reads a dataset by. Needs only numpy, because `trainer` and
`cluster` import it too. Does not own of which kind its values are
(`pipeline.manifest_checks`), how shards are made (`pipeline.shards`) or the order they
are read in (`trainer.order`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.manifest_checks import check_fields, is_inside, read_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.json.sha256"
TOKENIZER = "tokenizer"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
DATASET_JSON = "dataset_tokenizer.json"
"""In an exported model, the tokenizer of the dataset that it was trained on, where
`tokenizer.json` adds special tokens to its texts."""
SPECIAL_TOKENS = ("pad", "unk", "cls", "sep", "mask")

# One record per sample, little-endian and packed, so that a memory map of
# `X.index.npy` is the trainer's whole view of a shard. Offsets and sizes in bytes;
# `span_*` covers the sample's headers, padding and all members.
INDEX_DTYPE = np.dtype(
    [
        ("uid", "<u8"),
        ("span_offset", "<u8"),
        ("span_size", "<u8"),
        ("span_crc32c", "<u4"),
        ("jpg_offset", "<u8"),
        ("jpg_size", "<u4"),
        ("jpg_crc32c", "<u4"),
        ("ids_offset", "<u8"),
        ("ids_size", "<u4"),
        ("ids_crc32c", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("n_captions", "<u4"),
        ("n_tokens", "<u4"),
    ]
)

# One record per pair of samples, in `pairs.npy`: do they match?
PAIR_DTYPE = np.dtype(
    [
        ("left_uid", "<u8"),
        ("right_uid", "<u8"),
        ("label", "u1"),
        # Number of the caption that a side shows; -1: one that is drawn.
        ("left_caption", "<i2"),
        ("right_caption", "<i2"),
        # Equal for pairs that are no independent evidence.
        ("group", "<u8"),
    ]
)

# A shard's files by the name of their digest in the manifest, and how they end.
SHARD_FILES = {
    "tar": ".tar",
    "index": ".index.npy",
    "parquet": ".parquet",
    "stats": "_stats.json",
    "idx": ".tar.idx",
}
# Token ids of a shard whose tar has none, end to end: `pipeline.index` describes tars
# that it leaves as they are.
IDS_FILES = {"ids": ".ids"}

_SHARD_NAME = re.compile(r"([a-z0-9_]+)/shard-(\d{6})\.tar")
_SPLIT_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Where every input went (law 2). Counts inputs: an image with its captions."""

    inputs: int = 0
    written: int = 0
    filtered: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0

    def __add__(self, other: Accounting) -> Accounting:
        return Accounting(
            inputs=self.inputs + other.inputs,
            written=self.written + other.written,
            filtered=_add_counts(self.filtered, other.filtered),
            failed=_add_counts(self.failed, other.failed),
            duplicates=self.duplicates + other.duplicates,
        )

    def check(self) -> None:
        """Raise ValueError unless inputs = written + filtered + failed + duplicates."""
        parts = self.written + self.duplicates
        parts += sum(self.filtered.values()) + sum(self.failed.values())
        if parts != self.inputs:
            raise ValueError(
                f"accounting does not add up: {self.inputs} inputs, but {parts} "
                f"accounted for ({self}); the dataset is not to be trusted"
            )


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One committed shard. `name` is the tar's path below the dataset directory."""

    name: str
    split: str
    source: str
    range: int
    samples: int
    captions: int
    tokens: int
    bytes: int
    sha256: Mapping[str, str]
    """Hex digests of the files beside each other, by the names in `SHARD_FILES` and,
    where there is a sidecar with token ids, `IDS_FILES`."""

    def sidecar(self, suffix: str) -> str:
        """Path of a file beside the tar, below the dataset directory."""
        return self.name.removesuffix(".tar") + suffix

    @property
    def index(self) -> str:
        """Path of the index, below the dataset directory."""
        return self.sidecar(".index.npy")

    @property
    def ids(self) -> str | None:
        """Path of the sidecar that `ids_*` of the index speak of, below the dataset
        directory; None where the ids are members of the tar.
        """
        return self.sidecar(IDS_FILES["ids"]) if "ids" in self.sha256 else None

    @property
    def files(self) -> Mapping[str, str]:
        """Paths of all its files below the dataset directory, by the name of their
        digest.
        """
        suffixes = {**SHARD_FILES, **IDS_FILES}
        return {name: self.sidecar(suffixes[name]) for name in self.sha256}


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that made a dataset's ids."""

    path: str
    """Directory below the dataset; loads with `transformers.AutoTokenizer`."""
    sha256: str
    """Of its `tokenizer.json`."""
    vocab_size: int
    special_ids: Mapping[str, int]
    """Ids of pad, unk, cls, sep and mask."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of stored ids: uint16, or uint32 above 65,536 entries."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: the source of truth of a dataset directory."""

    schema_version: int
    complete: bool
    """False while preprocessing is still committing shards."""
    shards: tuple[Shard, ...]
    sources: Mapping[str, float]
    """Sampling weight of each source: the loader's default mixture."""
    accounting: Accounting
    rows: int
    """Rows of the corpus; inputs are rows grouped by image."""
    tokenizer: TokenizerInfo
    transform: Mapping[str, Any]
    """Everything that decides bytes: image, text and shard keys, codec versions."""
    transform_sha256: str
    files: Mapping[str, str]
    """Hex digests of every file that belongs to no shard, by path below the dataset
    directory; the companions only once it is complete."""
    indexed: bool = False
    """Made by `pipeline.index` from tars that were there: they have the names, members
    and headers that they had, and may have a sidecar with token ids."""

    def split(self, name: str) -> tuple[Shard, ...]:
        """Shards of split `name`, in order.

        Raises:
            ValueError: the dataset has no such split.
        """
        shards = tuple(shard for shard in self.shards if shard.split == name)
        if not shards:
            have = ", ".join(sorted({shard.split for shard in self.shards})) or "none"
            raise ValueError(f"no split {name!r} in this dataset; it has: {have}")
        return shards

    def samples(self, split: str) -> int:
        """Number of samples of a split, 0 where there is no such split."""
        return sum(shard.samples for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """Canonical text: the bytes of `manifest.json`."""
        return canonical_json({**dataclasses.asdict(self), "totals": self.totals()})

    @property
    def sha256(self) -> str:
        """The manifest hash of law 1: sha256 of `manifest.json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def totals(self) -> dict[str, dict[str, int]]:
        """Shards, samples, captions, tokens and tar bytes of each split."""
        totals: dict[str, dict[str, int]] = {}
        for shard in self.shards:
            row = totals.setdefault(shard.split, {"shards": 0})
            row["shards"] += 1
            for key in ("samples", "captions", "tokens", "bytes"):
                row[key] = row.get(key, 0) + getattr(shard, key)
        return totals


def shard_name(split: str, number: int) -> str:
    """`train/shard-000012.tar`."""
    return f"{split}/shard-{number:06d}.tar"


def sample_key(range_number: int, position: int) -> str:
    """Key of an input: `{range:06d}{position in range:06d}`, fixed at planning."""
    return f"{range_number:06d}{position:06d}"


def sample_uid(source: str, locator: str) -> int:
    """uint64 identity of a sample: first 8 bytes of sha256(source name, locator)."""
    digest = hashlib.sha256(f"{source}\0{locator}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and a final newline: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True) + "\n"


def load_manifest(root: str | Path, *, allow_incomplete: bool = False) -> Manifest:
    """Read and check `root/manifest.json` against its sha256 and the schema.

    Raises:
        ValueError: no manifest, damage, another schema version, counts that do not add
            up, names that are not contiguous or leave the directory, or (unless
            `allow_incomplete`) a dataset still being written. The message has the cure.
    """
    root = Path(root)
    path, seal = root / MANIFEST, root / MANIFEST_SHA256
    if not path.is_file() or not seal.is_file():
        missing = MANIFEST_SHA256 if path.is_file() else MANIFEST
        raise ValueError(
            f"{root} has no {missing}: not a finished dataset. Make one with "
            "`python -m pipeline.preprocess --input ... --output ...`"
        )
    text = path.read_bytes()
    if seal.read_bytes() != manifest_seal(text).encode():
        raise ValueError(
            f"{path} does not match {MANIFEST_SHA256}: one of them is damaged. "
            "Run the same `python -m pipeline.preprocess` again to rewrite both"
        )
    manifest = manifest_from_json(read_json(text, str(path)))
    if not manifest.complete and not allow_incomplete:
        raise ValueError(
            f"{root} is still being written; wait for preprocess, or resume it with "
            "the same command"
        )
    return manifest


def manifest_seal(text: bytes) -> str:
    """Text of `manifest.json.sha256`, as `sha256sum --check` reads it."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"


def manifest_from_json(value: Any) -> Manifest:
    """The checked `Manifest` of parsed JSON. Raises ValueError as `load_manifest`."""
    version = value.get("schema_version") if isinstance(value, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"manifest has schema version {version!r}, this code reads "
            f"{SCHEMA_VERSION}: preprocess the corpus again with this version"
        )
    check_fields(value)
    try:
        fields = {key: value[key] for key in value if key != "totals"}
        manifest = Manifest(
            **{
                **fields,
                "shards": tuple(Shard(**shard) for shard in value["shards"]),
                "accounting": Accounting(**value["accounting"]),
                "tokenizer": TokenizerInfo(**value["tokenizer"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"manifest does not follow the schema: {error}") from error
    _check_digests(manifest)
    _check_tokenizer(manifest)
    if manifest.indexed:
        _check_given_names(manifest.shards)
    else:
        _check_names(manifest.shards)
    manifest.accounting.check()
    written = sum(shard.samples for shard in manifest.shards)
    if written != manifest.accounting.written:
        raise ValueError(
            f"manifest lists {written} samples but accounts for "
            f"{manifest.accounting.written} written"
        )
    if value.get("totals") != manifest.totals():
        raise ValueError(
            f"manifest has totals {value.get('totals')}, but its shards add up to "
            f"{manifest.totals()}: preprocess the corpus again"
        )
    return manifest


def load_index(root: str | Path, shard: Shard, *, verify: bool = True) -> np.ndarray:
    """Memory-map a shard's index: a structured array (samples,) of `INDEX_DTYPE`.

    With `verify` its sha256 is checked against the manifest.

    Raises:
        ValueError: missing, damaged, or not the records the manifest counts.
    """
    path = Path(root) / shard.index
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: `python -m pipeline.validate {root}` names every "
            "damage"
        )
    if verify and file_sha256(path) != shard.sha256["index"]:
        raise ValueError(
            f"{path} does not match the sha256 in the manifest: it is damaged; "
            f"`python -m pipeline.validate {root}` names every damage"
        )
    index = np.load(path, mmap_mode="r", allow_pickle=False)
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise ValueError(
            f"{path} holds {index.shape} records of {index.dtype}, expected "
            f"({shard.samples},) of the schema's"
        )
    return index


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_ids(member: bytes | memoryview, n_tokens: int, dtype: np.dtype) -> np.ndarray:
    """Ids (n_tokens,) of an `input_ids.npy` member without parsing its npy header: the
    payload is the member's end, and `n_tokens` comes from the index.
    """
    size = n_tokens * dtype.itemsize
    return np.frombuffer(member, dtype=dtype, offset=len(member) - size)


def _add_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({**a, **b})}


def _check_digests(manifest: Manifest) -> None:
    more = IDS_FILES.keys() if manifest.indexed else set()
    for shard in manifest.shards:
        if shard.sha256.keys() - more != SHARD_FILES.keys():
            raise ValueError(
                f"manifest has digests of {', '.join(sorted(shard.sha256))} for "
                f"{shard.name}, not of {', '.join(sorted(SHARD_FILES))}: preprocess "
                "the corpus again with this version"
            )


def _check_tokenizer(manifest: Manifest) -> None:
    info = manifest.tokenizer
    if manifest.files.get(f"{info.path}/tokenizer.json") != info.sha256:
        raise ValueError(
            f"manifest lists no {info.path}/tokenizer.json with the sha256 of the "
            "tokenizer: preprocess the corpus, or index the folder, again"
        )


def _check_names(shards: Iterable[Shard]) -> None:
    seen: dict[str, int] = {}
    for shard in shards:
        match = _SHARD_NAME.fullmatch(shard.name)
        if not match or match[1] != shard.split:
            raise ValueError(f"{shard.name!r} is not a shard of split {shard.split!r}")
        expected = seen.get(shard.split, 0)
        if int(match[2]) != expected:
            raise ValueError(
                f"{shard.name} follows {expected} shards of its split: names are not "
                "contiguous"
            )
        seen[shard.split] = expected + 1


def _check_given_names(shards: Iterable[Shard]) -> None:
    """Names as they were, as long as they stay inside the directory."""
    seen: set[str] = set()
    for shard in shards:
        name = shard.name
        plain = is_inside(name) and name.endswith(".tar")
        if not (plain and _SPLIT_NAME.fullmatch(shard.split)):
            raise ValueError(
                f"{name!r} is not the name of a tar inside the dataset, of a split: "
                "index the folder again"
            )
        if name in seen:
            raise ValueError(f"manifest lists {name} twice: index the folder again")
        seen.add(name)


def captions_of(ids: np.ndarray, sep: int) -> Sequence[np.ndarray]:
    """Split a sample's ids into one array per caption, separators kept."""
    ends = np.flatnonzero(ids == sep) + 1
    return np.split(ids, ends)[: len(ends)]


def words_file(directory: Path) -> Path:
    """The `tokenizer.json` that ids are made with, by whose sha256 datasets and models
    know each other: in an exported model that of its dataset.
    """
    of_dataset = directory / DATASET_JSON
    return of_dataset if of_dataset.is_file() else directory / TOKENIZER_JSON
