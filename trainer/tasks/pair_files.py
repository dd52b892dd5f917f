"""`pairs.npy`: which two samples are shown, and whether they match.

Owns reading and checking it. Does not own making it (`pipeline.pairs`) or its form
(`pipeline.manifest.PAIR_DTYPE`). A file of `left_uid`, `right_uid` and `label` alone
will do: captions are drawn then, and every pair is resampled by itself.

Shapes: N pairs.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.manifest import PAIR_DTYPE, file_sha256
from trainer.philox import signed_uids
from trainer.tasks.samples import DRAWN, Samples

_NEEDED = ("left_uid", "right_uid", "label")
_SIDES = ("left", "right")
_LABELS = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """N pairs, by rows of `Samples`."""

    name: str
    sha256: str
    rows: np.ndarray
    """(N, 2) row of the left and the right sample."""
    captions: np.ndarray
    """(N, 2) number of the caption that each shows, or `DRAWN`."""
    labels: np.ndarray
    """(N,) bool: they match."""
    groups: np.ndarray
    """(N,) equal for pairs that are resampled together."""
    uids: np.ndarray
    """(N,) int64, of a pair: what is drawn for it is a function of this."""
    both: np.ndarray
    """(N,) uint64, equal for pairs of the same two samples, whichever is the left."""

    def __len__(self) -> int:
        return len(self.rows)


def read_pairs(path: str, samples: Samples) -> Pairs:
    """The pairs of a file.

    Raises:
        ValueError: no such file, not of this form, nothing to tell apart, or samples
            that the dataset lacks. The message has the cure.
    """
    table = _read(path)
    _check(path, table)
    labels = table["label"].astype(np.int64)
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"{path}: all {len(table)} pairs have the same label, so that there is "
            "nothing to tell apart; make it with python -m pipeline.pairs"
        )
    rows = np.stack([samples.rows(table[f"{side}_uid"]) for side in _SIDES], axis=1)
    captions = np.stack([_or(table, f"{side}_caption") for side in _SIDES], axis=1)
    _check_has_caption(path, rows, captions, samples)
    alone = np.arange(len(table), dtype=np.uint64)
    left, right = (table[f"{side}_uid"].astype(np.uint64) for side in _SIDES)
    return Pairs(
        name=path,
        sha256=file_sha256(path),
        rows=rows,
        captions=captions,
        labels=labels.astype(bool),
        groups=table["group"] if "group" in (table.dtype.names or ()) else alone,
        uids=signed_uids(_mixed(left, right)),
        both=_mixed(np.minimum(left, right), np.maximum(left, right)),
    )


def as_text(pairs: Pairs) -> str:
    """Which pairs these are, for `among`."""
    return base64.b64encode(np.unique(pairs.both).astype("<u8").tobytes()).decode()


def among(pairs: Pairs, text: str) -> np.ndarray:
    """(N,) bool: is a pair one of those that `as_text` was told of?"""
    known = np.frombuffer(base64.b64decode(text), dtype="<u8")
    return np.isin(pairs.both, known)


def _read(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise ValueError(
            f"{path} is no file: make it with python -m pipeline.pairs DATASET "
            f"--column COLUMN --output {path}"
        )
    try:
        # numpy's own words advise to unpickle what might be anybody's.
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is no array of numpy (.npy): give the .npy file that python -m "
            "pipeline.pairs writes, not the table for people beside it"
        ) from error
    names = getattr(table, "dtype", np.dtype("u1")).names or ()
    missing = [name for name in _NEEDED if name not in names]
    if missing or table.ndim != 1 or not len(table):
        raise ValueError(
            f"{path} holds no pairs: it has to be a structured array with the fields "
            f"{', '.join(PAIR_DTYPE.names or ())}, of which {', '.join(_NEEDED)} are "
            "needed; make it with python -m pipeline.pairs"
        )
    return np.asarray(table)


def _check(path: str, table: np.ndarray) -> None:
    """Raise ValueError for a value that stands for no pair: a cast would make a wrong
    one of it.
    """
    for side in _SIDES:
        _require_whole(path, table, f"{side}_uid", "as the index and pipeline.pairs do")
    if (
        table.dtype["label"].kind not in "biuf"
        or not np.isin(table["label"], _LABELS).all()
    ):
        raise ValueError(
            f"{path}: a label is neither 0 nor 1: write 1 for pairs that match, 0 for "
            "the others"
        )
    for side in _SIDES:
        if f"{side}_caption" in (table.dtype.names or ()):
            _check_captions(path, table, f"{side}_caption")
    alike = np.flatnonzero(table["left_uid"] == table["right_uid"])
    if len(alike):
        raise ValueError(
            f"{path}: {len(alike)} of {len(table)} pairs are of a sample and itself, "
            f"the first is number {alike[0]}, from 0: leave them out"
        )


def _check_captions(path: str, table: np.ndarray, name: str) -> None:
    _require_whole(path, table, name, f"from 0, or {DRAWN}: one is drawn")
    low = table[name].min()
    if low < DRAWN:
        raise ValueError(
            f"{path}: a {name} is {low}: write its number, from 0, or {DRAWN} for one "
            "that is drawn"
        )


def _check_has_caption(
    path: str, rows: np.ndarray, captions: np.ndarray, samples: Samples
) -> None:
    """Raise ValueError where a sample lacks the caption (N, 2) that a pair asks for."""
    have = samples.n_captions(rows)
    wrong = np.argwhere(captions >= have)
    if len(wrong):
        number, side = wrong[0].tolist()
        raise ValueError(
            f"{path}: {len(np.unique(wrong[:, 0])):,} of {len(rows):,} pairs show a "
            "caption that their sample lacks; the first is number "
            f"{number}, from 0, whose {_SIDES[side]}_caption is "
            f"{captions[number, side]}, and the sample has {have[number, side]}: make "
            "the pairs of this dataset (python -m pipeline.pairs), or write -1 for one "
            "that is drawn"
        )


def _require_whole(path: str, table: np.ndarray, name: str, how: str) -> None:
    if table.dtype[name].kind not in "iu":
        raise ValueError(
            f"{path}: {name} is of type {table.dtype[name]}: write whole numbers "
            f"({PAIR_DTYPE[name]}), {how}"
        )


def _or(table: np.ndarray, name: str) -> np.ndarray:
    if name in (table.dtype.names or ()):
        return table[name].astype(np.int64)
    return np.full(len(table), DRAWN, dtype=np.int64)


def _mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One number (N,) of two uids (N,) uint64; that of (a, b) is not that of (b, a)."""
    mixed: np.ndarray = first * np.uint64(0x9E3779B97F4A7C15) ^ second
    return mixed
