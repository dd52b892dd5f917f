"""NLVR2's published files: a sentence about two images, true or false.

Owns their fields, the names of their images and the two official scores. Does not own
JSON lines (`trainer.tasks.annotations`) or pixels (`trainer.tasks.pictures`).

Suhr et al., "A corpus for reasoning about natural language grounded in photographs",
2019; files of github.com/lil-lab/nlvr: `train.json`, `dev.json`, `test1.json`, a line
for each sentence and pair of images, and images called by a line's identifier:
`dev-850-0-1` is about `dev-850-0-img0.png` and `dev-850-0-img1.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.tasks.annotations import Row, read_lines
from trainer.tasks.pictures import first_file

_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence about a left and a right image."""

    identifier: str
    text: str
    images: tuple[Path, Path]
    label: bool | None
    """Is it true? None where labels are kept back."""

    @property
    def written(self) -> str:
        """Equal for the pairs of images that one sentence was written about: the
        identifier but for its third part.
        """
        split, group, _, sentence = self.identifier.rsplit("-", _PARTS - 1)
        return f"{split}-{group}--{sentence}"

    @property
    def group(self) -> str:
        """Equal for everything about one set of eight images."""
        return "-".join(self.identifier.rsplit("-", _PARTS - 1)[:2])


def read_sentences(path: str, images: str) -> list[Sentence]:
    """The lines of a file, in their order.

    Args:
        images: folder with the images; with train/NN/ as the training images are
            packed (the line's `directory`); or with a folder of the split.

    Raises:
        ValueError: the file is missing or malformed, with the line and the cure; no
            such folder. Images are not looked at.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise ValueError(f"images {images} is no folder: give the one with *-img0.png")
    found: dict[str, Sentence] = {}
    for row in read_lines(Path(path)):
        identifier = row.name("identifier")
        if len(identifier.rsplit("-", _PARTS - 1)) != _PARTS:
            raise row.wrong(
                f"identifier {identifier!r} is not of the form split-set-pair-sentence"
            )
        if identifier in found:
            raise row.wrong(f"{identifier} stood in an earlier line too")
        left, right = (_image(row, identifier, folder, side) for side in (0, 1))
        found[identifier] = Sentence(
            identifier=identifier,
            text=row.words("sentence"),
            images=(left, right),
            label=_label(row),
        )
    return list(found.values())


def consistency(sentences: Sequence[Sentence], correct: np.ndarray) -> dict[str, bool]:
    """Of each sentence that was written: are all its pairs of images, of which
    `correct` (N,) says whether each is, answered rightly?
    """
    whole: dict[str, bool] = {}
    for sentence, right in zip(sentences, correct.tolist(), strict=True):
        whole[sentence.written] = whole.get(sentence.written, True) and right
    return whole


def _image(row: Row, identifier: str, folder: Path, side: int) -> Path:
    name = f"{identifier.rsplit('-', 1)[0]}-img{side}.png"
    split = identifier.split("-", maxsplit=1)[0]
    places = [folder / name, folder / split / name]
    if row.has("directory"):
        packed = row.name("directory")
        places += [folder / packed / name, folder / split / packed / name]
    return first_file(places)


def _label(row: Row) -> bool | None:
    if not row.has("label"):
        return None
    value = row.values["label"]
    # Published as the texts "True" and "False".
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise row.wrong(f"label is {value!r}, neither True nor False")
    return known[str(value).lower()]
