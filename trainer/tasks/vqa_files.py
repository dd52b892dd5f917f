"""VQA v2's published files: questions, what people answered, where the images lie.

Owns their fields. Does not own JSON (`trainer.tasks.annotations`), answers
(`trainer.tasks.vqa_answers`) or pixels (`trainer.tasks.pictures`).

Goyal et al., "Making the V in VQA matter", 2017; files of visualqa.org:
`v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json`, and
MS COCO's images, `COCO_{split}_{id:012d}.jpg`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.tasks.annotations import Row, read_object
from trainer.tasks.pictures import first_file

_IMAGE = "COCO_{split}_{id:012d}.jpg"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What people said to a question."""

    answers: tuple[str, ...]
    """Of each person asked; ten in the published files."""
    most_frequent: str
    answer_type: str
    """yes/no, number or other."""
    question_type: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image."""

    number: int
    text: str
    image: Path
    answered: Answered | None
    """None in a split whose answers are kept back."""


def read_questions(
    questions: str, annotations: str | None, images: str
) -> list[Question]:
    """The questions of a split, in the order of their file.

    Args:
        questions: its questions.json.
        annotations: its annotations.json; None where answers are kept back.
        images: folder with the split's images, or with a folder of that split; or a
            template of their paths with `{id}` (or `{id:012d}`) and maybe `{split}`.

    Raises:
        ValueError: a file is missing or malformed, or the two do not belong together;
            the message names the entry and the cure. Images are not looked at.
    """
    whole = read_object(Path(questions))
    split = whole.text("data_subtype") if whole.has("data_subtype") else ""
    # Questions of test-dev2015 are about images of test2015.
    paths = ImagePaths(images, split.replace("-dev", ""))
    answered = None if annotations is None else _answered(annotations)
    found: dict[int, Question] = {}
    for row in whole.rows("questions"):
        number = row.number("question_id")
        if number in found:
            raise row.wrong(f"question_id {number} stood in an earlier entry too")
        if answered is not None and number not in answered:
            raise row.wrong(
                f"question_id {number} has no answers in {annotations}: are the two "
                "files of one split?"
            )
        found[number] = Question(
            number=number,
            text=row.words("question"),
            image=paths.of(row),
            answered=None if answered is None else answered[number],
        )
    if not found:
        raise whole.wrong("no question in it")
    return list(found.values())


class ImagePaths:
    """Where the images of a split lie.

    Args:
        images: as `read_questions` has it.
        split: in names of files, such as train2014.

    Raises:
        ValueError: no such folder, or a template that cannot be filled in.
    """

    def __init__(self, images: str, split: str) -> None:
        self._split = split
        if "{" in images:
            self._templates = [images]
            try:
                images.format(split=split, id=1)
            except (KeyError, ValueError, IndexError) as error:
                raise ValueError(
                    f"images {images} is no template of paths ({error}): give for "
                    f"instance coco/{{split}}/{_IMAGE}, or a folder"
                ) from error
            return
        if not Path(images).is_dir():
            raise ValueError(
                f"images {images} is no folder: give the one that holds {_IMAGE}, or a "
                "template of the images' paths"
            )
        # Braces can only be the template's from here on.
        self._templates = [f"{images}/{_IMAGE}", f"{images}/{{split}}/{_IMAGE}"]

    def of(self, question: Row) -> Path:
        """That of a question."""
        image = question.number("image_id")
        return first_file(
            [
                Path(template.format(split=self._split, id=image))
                for template in self._templates
            ]
        )


def _answered(path: str) -> dict[int, Answered]:
    """What people said, by question_id."""
    found = {}
    for row in read_object(Path(path)).rows("annotations"):
        # Half of all answers are one of a few words.
        answers = tuple(sys.intern(one.text("answer")) for one in row.rows("answers"))
        if not answers:
            raise row.wrong("no answers in it")
        found[row.number("question_id")] = Answered(
            answers=answers,
            most_frequent=row.text("multiple_choice_answer"),
            answer_type=row.text("answer_type") if row.has("answer_type") else "other",
            question_type=row.text("question_type") if row.has("question_type") else "",
        )
    return found
