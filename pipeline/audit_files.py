"""Are the files of a dataset that belong to no shard as they were written?

Owns the manifest and its seal, the files it has digests of, files it does not know, and
the state below `.palimpsest/` (plan, commit records, retries, verdicts). Does not own
shards (`pipeline.audit_shard`) or the sums over them (`pipeline.audit`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

from pipeline.attempts import retry_names, unrecorded
from pipeline.companions import companion_files
from pipeline.damages import Damage, first_difference
from pipeline.indexed import RECORDS
from pipeline.manifest import (
    MANIFEST,
    MANIFEST_SHA256,
    Manifest,
    canonical_json,
    file_sha256,
    manifest_from_json,
    manifest_seal,
)
from pipeline.manifest_checks import read_json
from pipeline.staging import SEALS, STATE
from pipeline.storage import Storage

# What every dataset of either command has.
_PLANS = {f"{STATE}/plan.json", f"{STATE}/index.json"}
# What stays there when a run is over; the rest is staging and leases.
_LASTING = (
    *("plan", "ranges/", "retries/", "verdicts/", "files.json"),
    *("index.json", "indexed/"),
)
# What a retry places before the manifest tells of it, and where it keeps its state.
_PLACED = re.compile(r"[^/]+/(shard-\d{6}|range-\d{6}-.+)\.(tar|parquet)")
_OF_RETRIES = tuple(f"{STATE}/{name}/" for name in ("retries", "ranges", "verdicts"))
# A seal that differs in no more characters than this was damaged itself: another
# manifest would have another digest altogether.
_SEAL_SLIPS = 8


def read_manifest(storage: Storage) -> tuple[Manifest, list[Damage]]:
    """The manifest of a dataset, also where it does not match its seal, and what is
    wrong with the two.

    Raises:
        ValueError: there is none, it cannot be read, or the dataset is unfinished.
    """
    try:
        text = storage.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{storage.url} has no {MANIFEST}: not a finished dataset. Make one with "
            "`python -m pipeline.preprocess --input ... --output ...`"
        ) from None
    damages = list(_check_seal(storage, text))
    try:
        manifest = manifest_from_json(read_json(text, f"{storage.url}/{MANIFEST}"))
    except ValueError as error:
        if not damages:
            raise
        raise ValueError(
            f"{storage.url}/{MANIFEST} does not match {MANIFEST_SHA256} and cannot be "
            f"read ({error}): it is damaged. Run the same "
            "`python -m pipeline.preprocess` again to rewrite both"
        ) from error
    if not manifest.complete:
        raise ValueError(
            f"{storage.url} is still being written; wait for preprocess, or resume it "
            "with the same command"
        )
    if canonical_json(json.loads(text)).encode() != text:
        damages = damages or [
            Damage(path=MANIFEST, offset=None, message="not in canonical form")
        ]
    return manifest, damages


def _check_seal(storage: Storage, text: bytes) -> Iterator[Damage]:
    right = manifest_seal(text).encode()
    try:
        seal = storage.read(MANIFEST_SHA256)
    except FileNotFoundError:
        message = "the file is missing"
        yield Damage(path=MANIFEST_SHA256, offset=None, message=message)
        return
    if seal == right:
        return
    place = first_difference(seal, right)
    slips = sum(a != b for a, b in zip(seal, right, strict=False))
    if len(seal) == len(right) and slips <= _SEAL_SLIPS:
        message = f"not the sha256 of {MANIFEST}, but all but equal to it: damaged"
        yield Damage(path=MANIFEST_SHA256, offset=place, message=message)
        return
    message = (
        f"does not match {MANIFEST_SHA256}: it is damaged, nothing else is checked"
    )
    yield Damage(path=MANIFEST, offset=None, message=message)


def check_files(storage: Storage, manifest: Manifest) -> Iterator[Damage]:
    """Tokenizer, companions and tables of rejected inputs, by their digests."""
    companions = companion_files(manifest)
    for name, digest in sorted(manifest.files.items()):
        try:
            # Not read at once: a tar without samples is among them, of any size.
            with storage.fetch(name) as path:
                found = file_sha256(path)
        except FileNotFoundError:
            yield Damage(path=name, offset=None, message="the file is missing")
            continue
        if found == digest:
            continue
        right = companions.get(name, "").encode()
        known = hashlib.sha256(right).hexdigest() == digest
        place = first_difference(storage.read(name), right) if known else None
        message = "sha256 does not match the manifest"
        yield Damage(path=name, offset=place, message=message)


def check_strays(storage: Storage, manifest: Manifest) -> Iterator[Damage]:
    """Shards and tables that no record names would be read by all loaders but ours.

    An indexed folder is its owner's, who may keep other tars and tables in it: only
    what an index left there is a stray.
    """
    known = {name for shard in manifest.shards for name in shard.files.values()}
    known |= manifest.files.keys()
    begun = retry_begun(storage)
    for name in storage.names():
        read = name.endswith((".tar", ".parquet")) and not name.startswith(f"{STATE}/")
        if not read or name in known or (begun and _PLACED.fullmatch(name)):
            continue
        if not manifest.indexed or is_leftover(storage, name):
            yield Damage(path=name, offset=None, message="not in the manifest")


def retry_begun(storage: Storage) -> bool:
    """Is there a retry of failed inputs that the manifest does not tell of yet? What it
    has placed so far is no damage: the same command finishes it.
    """
    seals = read_seals(storage)
    return bool(seals) and not seals.keys() >= set(retry_names(storage))


def is_leftover(storage: Storage, name: str) -> bool:
    """Is a file of an indexed dataset the table that an index wrote for a tar which is
    gone? Only one that has the digest in the record of that tar.
    """
    tar = f"{name.removesuffix('.parquet')}.tar"
    record = f"{RECORDS}/{tar}.json"
    if not name.endswith(".parquet") or storage.size(tar) is not None:
        return False
    try:
        digest = json.loads(storage.read(record))["sha256"]["parquet"]
        with storage.fetch(name) as path:
            return file_sha256(path) == digest
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError):
        return False


def check_state(storage: Storage, manifest: Manifest) -> Iterator[Damage]:
    """Plan, records, retries and verdicts by the digests that lie beside them."""
    names = {name for name in storage.names(STATE) if _lasting(name)}
    names.difference_update(unrecorded(names))
    if not names:
        return
    try:
        data = storage.read(SEALS)
    except FileNotFoundError:
        if _PLANS & names:
            yield Damage(path=SEALS, offset=None, message="the file is missing")
        return
    try:
        digests = json.loads(data)
        place = first_difference(data, canonical_json(digests).encode())
        texts = place is None and all(isinstance(d, str) for d in digests.values())
    except (ValueError, AttributeError, RecursionError) as error:
        place, texts = getattr(error, "pos", None), False
    if not texts:
        message = "not the digests of the state that were written"
        yield Damage(path=SEALS, offset=place, message=message)
        return
    if retry_begun(storage):
        names = {name for name in names if not name.startswith(_OF_RETRIES)}
    for name in sorted(names - digests.keys() - {SEALS} - manifest.files.keys()):
        yield Damage(path=name, offset=None, message=f"not in {SEALS}")
    for name, digest in digests.items():
        yield from _check_sealed(storage, name, digest, data)


def read_seals(storage: Storage) -> dict[str, str]:
    """Digests of the files of the state; none where they cannot be read."""
    try:
        digests = json.loads(storage.read(SEALS))
        return {name: str(digest) for name, digest in digests.items()}
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return {}


def sealed_digest(storage: Storage) -> str | None:
    """The sha256 of the manifest that its seal names."""
    try:
        words = storage.read(MANIFEST_SHA256).decode("ascii").split()
    except (FileNotFoundError, UnicodeError):
        return None
    return words[0] if words else None


def _lasting(name: str) -> bool:
    """Is it no trace of a run that was killed, or is under way?"""
    rest = name.removeprefix(f"{STATE}/")
    return rest.startswith(_LASTING)


def _check_sealed(
    storage: Storage, name: str, digest: str, seals: bytes
) -> Iterator[Damage]:
    try:
        found = hashlib.sha256(storage.read(name)).hexdigest()
    except (FileNotFoundError, ValueError):
        yield Damage(path=name, offset=None, message="the file is missing")
        return
    slips = sum(a != b for a, b in zip(found, digest, strict=False))
    if found == digest:
        return
    if slips <= _SEAL_SLIPS and len(found) == len(digest):
        place = seals.find(digest.encode())
        message = f"the digest of {name} is damaged"
        yield Damage(path=SEALS, offset=place, message=message)
        return
    message = f"sha256 does not match {SEALS}"
    yield Damage(path=name, offset=None, message=message)
