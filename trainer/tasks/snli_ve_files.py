"""SNLI-VE's published files: does an image entail a sentence?

Owns their fields. Does not own JSON lines (`trainer.tasks.annotations`) or pixels
(`trainer.tasks.pictures`).

Xie et al., "Visual entailment", 2019; files of github.com/necla-ml/SNLI-VE:
`snli_ve_train.jsonl`, `snli_ve_dev.jsonl`, `snli_ve_test.jsonl`, and Flickr30k's images
`{id}.jpg`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.tasks.annotations import read_lines

CLASSES = ("entailment", "neutral", "contradiction")
# People did not agree.
UNDECIDED = "-"


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A sentence about an image."""

    pair: str
    """The line's pairID, or its place in the file."""
    text: str
    image: Path
    label: int
    """Place in `CLASSES`."""


def read_hypotheses(path: str, images: str) -> tuple[list[Hypothesis], int]:
    """The lines of a file, in their order, and how many others have no label because
    people did not agree (`-`).

    Args:
        images: folder with the images.

    Raises:
        ValueError: the file is missing or malformed, with the line and the cure; no
            such folder. Images are not looked at.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise ValueError(f"images {images} is no folder: give the one with Flickr30k's")
    found, undecided = [], 0
    for row in read_lines(Path(path)):
        label = row.text("gold_label")
        if label == UNDECIDED:
            undecided += 1
            continue
        if label not in CLASSES:
            raise row.wrong(f"gold_label {label!r} is none of {', '.join(CLASSES)}, -")
        image = row.name("Flickr30K_ID", "flickr30k_id", "Flickr30kID", "Flikr30kID")
        found.append(
            Hypothesis(
                pair=row.text("pairID") if row.has("pairID") else row.where,
                text=row.words("sentence2"),
                image=folder / f"{image.removesuffix('.jpg')}.jpg",
                label=CLASSES.index(label),
            )
        )
    if not found:
        raise ValueError(
            f"{path}: people did not agree on any of its {undecided:,} lines "
            f"(gold_label {UNDECIDED}), and none is left; give a file that has lines "
            f"of {', '.join(CLASSES)}"
        )
    return found, undecided
