"""Small files of the form that VQA v2, NLVR2 and SNLI-VE are published in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 40, 200),
    "yellow": (220, 210, 40),
}


def paint(path: Path, colour: str, *, seed: int = 0, side: int = 24) -> Path:
    """A JPEG, whatever it is called, of noise about one colour."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(-25, 26, (side, side, 3))
    pixels = (np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)
    return path


def coco(folder: Path, split: str, number: int) -> Path:
    """Where an image of MS COCO lies."""
    return folder / f"COCO_{split}_{number:012d}.jpg"


def write_questions(
    folder: Path, split: str, asked: Sequence[Mapping[str, Any]]
) -> tuple[Path, Path]:
    """questions.json and annotations.json of questions, each with `question_id`,
    `image_id`, `question` and the `answers` of ten people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    annotations = folder / f"v2_mscoco_{split}_annotations.json"
    about = {"data_type": "mscoco", "data_subtype": split, "info": {}, "license": {}}
    listed = [
        {name: one[name] for name in ("question_id", "image_id", "question")}
        for one in asked
    ]
    questions.write_text(
        json.dumps({**about, "task_type": "Open-Ended", "questions": listed})
    )
    said = [
        {
            "question_id": one["question_id"],
            "image_id": one["image_id"],
            "question_type": "what color",
            "answer_type": one.get("answer_type", "other"),
            "multiple_choice_answer": max(
                sorted(set(one["answers"])), key=one["answers"].count
            ),
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(one["answers"], 1)
            ],
        }
        for one in asked
    ]
    annotations.write_text(json.dumps({**about, "annotations": said}))
    return questions, annotations


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def colour_questions(folder: Path, split: str, count: int) -> tuple[str, str, str]:
    """Questions whose answer is the colour of their image; two about each image.
    Returns their two files and the folder of images.
    """
    images, asked = folder / "images" / split, []
    for number in range(count):
        image = number // 2
        colour = list(COLOURS)[image % len(COLOURS)]
        if number % 2 == 0:
            paint(coco(images, split, image), colour, seed=image)
        asked.append(
            {
                "question_id": 1000 + number,
                "image_id": image,
                "question": ("What color is it?", "Which color is the face?")[
                    number % 2
                ],
                "answers": [colour] * 8 + ["dark"] + ["a thing"],
                "answer_type": ("other", "number")[number % 2],
            }
        )
    questions, annotations = write_questions(folder, split, asked)
    return str(questions), str(annotations), str(images)


def colour_sentences(folder: Path, split: str, count: int) -> tuple[str, str]:
    """Sentences that hold where the left image is red and the right one blue, and not
    the other way round; two to a pair of images. Returns their file and the folder of
    images.
    """
    rows = []
    for pair in range(count // 2):
        colours = ("red", "blue") if pair % 2 == 0 else ("blue", "red")
        # Four pairs of images belong together.
        stem = f"{split}-{pair // 4}-{pair % 4}"
        for side, colour in enumerate(colours):
            paint(folder / "images" / f"{stem}-img{side}.png", colour, seed=pair + side)
        rows += [
            {"identifier": f"{stem}-{number}", "sentence": text, "label": str(truth)}
            for number, text in enumerate(
                ("The left face is red.", "The right face is blue.")
            )
            for truth in (colours[0] == "red",)
        ]
    return str(write_lines(folder / f"{split}.json", rows)), str(folder / "images")


def colour_hypotheses(folder: Path, split: str, count: int) -> tuple[str, str]:
    """Hypotheses of which the image's colour says whether they hold, and one line in
    ten on which people did not agree. Returns their file and the folder of images.
    """
    rows, names = [], ("entailment", "neutral", "contradiction")
    for number in range(count):
        label = number % 3
        name = f"{split}{number}"
        paint(folder / "images" / f"{name}.jpg", list(COLOURS)[label], seed=number)
        rows.append(
            {
                "Flickr30K_ID": name,
                "pairID": f"{name}.jpg#0r1e",
                "sentence1": "A caption.",
                "sentence2": "A smiling face.",
                "gold_label": "-" if number % 10 == 9 else names[label],
            }
        )
    return str(write_lines(folder / f"{split}.jsonl", rows)), str(folder / "images")
