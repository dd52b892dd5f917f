"""Published files are read as they are, and what is wrong with them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainer.published import coco, paint, write_lines, write_questions
from trainer.dataset import Dataset
from trainer.options import ImageConfig
from trainer.tasks.nlvr2_files import consistency, read_sentences
from trainer.tasks.pictures import Pictures, with_images
from trainer.tasks.snli_ve_files import CLASSES, read_hypotheses
from trainer.tasks.texts import TextEncoder
from trainer.tasks.vqa_files import read_questions

ASKED = [
    {
        "question_id": 100 + number,
        "image_id": number // 2,
        "question": f"What color is thing {number}?",
        "answers": ["red"] * 6 + ["dark red"] * 4,
    }
    for number in range(4)
]


def vqa(folder: Path, split: str = "train2014") -> tuple[str, str, str]:
    questions, annotations = write_questions(folder, split, ASKED)
    images = folder / "images" / split.replace("-dev", "")
    for number in (0, 1):
        paint(coco(images, images.name, number), "red", seed=number)
    return str(questions), str(annotations), str(images)


def test_questions_have_their_answers_and_images(tmp_path: Path) -> None:
    questions, annotations, images = vqa(tmp_path)
    found = read_questions(questions, annotations, images)
    assert [one.number for one in found] == [100, 101, 102, 103]
    assert [one.image.name[-7:] for one in found] == ["000.jpg"] * 2 + ["001.jpg"] * 2
    assert all(one.image.is_file() for one in found)
    said = found[0].answered
    assert said is not None
    assert said.answers == ("red",) * 6 + ("dark red",) * 4
    assert (said.most_frequent, said.answer_type) == ("red", "other")


@pytest.mark.parametrize(
    "form", ["{parent}", "{parent}/{{split}}/COCO_{{split}}_{{id:012d}}.jpg"]
)
def test_a_folder_of_splits_and_a_template_name_the_same_images(
    tmp_path: Path, form: str
) -> None:
    questions, annotations, images = vqa(tmp_path)
    plain = read_questions(questions, annotations, images)
    given = form.format(parent=Path(images).parent)
    assert read_questions(questions, annotations, given) == plain


def test_test_dev_has_no_answers_and_images_of_test(tmp_path: Path) -> None:
    questions, _, images = vqa(tmp_path, "test-dev2015")
    found = read_questions(questions, None, images)
    assert all(one.answered is None and one.image.is_file() for one in found)
    assert "COCO_test2015_" in found[0].image.name


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        (0, lambda file: file["questions"][2].pop("question"), "questions[2]: no 'que"),
        (0, lambda file: file["questions"][1].update(question_id=100), "questions[1]"),
        (0, lambda file: file["questions"][3].update(image_id="x"), "questions[3]"),
        (0, lambda file: file.update(questions={}), "questions is no list"),
        (0, lambda file: file.update(questions=[]), "no question"),
        (1, lambda file: file["annotations"].pop(), "103 has no answers in"),
        (1, lambda file: file["annotations"][1].update(answers=[]), "annotations[1]"),
        (
            1,
            lambda file: file["annotations"][0]["answers"][2].pop("answer"),
            "s[2]: no",
        ),
    ],
)
def test_malformed_questions_are_named(
    tmp_path: Path, file: int, change: Change, expected: str
) -> None:
    *files, images = vqa(tmp_path)
    path = Path(files[file])
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"again|of one split") as caught:
        read_questions(files[0], files[1], images)
    assert expected in str(caught.value)


def nlvr2(folder: Path) -> tuple[str, str]:
    """Two sentences about each two pairs of images, in folders as published."""
    rows = []
    for pair in (0, 1):
        for sentence in (0, 1):
            rows.append(
                {
                    "identifier": f"train-7-{pair}-{sentence}",
                    "sentence": f"Sentence {sentence}\u2028goes on.",
                    "label": str((pair + sentence) % 2 == 0),
                    "directory": 34,
                }
            )
        for side in (0, 1):
            name = f"train-7-{pair}-img{side}.png"
            paint(folder / "images" / "train" / "34" / name, "blue", seed=side)
    return str(write_lines(folder / "train.json", rows)), str(folder / "images")


def test_sentences_have_two_images_wherever_they_are_packed(tmp_path: Path) -> None:
    path, images = nlvr2(tmp_path)
    found = read_sentences(path, images)
    assert [one.label for one in found] == [True, False, False, True]
    for one in found:
        assert [image.name[-8:] for image in one.images] == ["img0.png", "img1.png"]
        assert all(image.is_file() for image in one.images)
    inner = [one.images for one in read_sentences(path, f"{images}/train")]
    assert [image for pair in inner for image in pair] == [
        image for one in found for image in one.images
    ]
    # Published by hand: the same names, all in one folder.
    flat = tmp_path / "flat"
    paint(flat / "train-7-0-img0.png", "red")
    assert read_sentences(path, str(flat))[0].images[0].parent == flat


def test_a_sentence_is_consistent_when_all_its_pairs_are_right(tmp_path: Path) -> None:
    path, images = nlvr2(tmp_path)
    found = read_sentences(path, images)
    assert len({one.group for one in found}) == 1
    right = np.array([True, True, False, True])
    assert consistency(found, right) == {"train-7--0": False, "train-7--1": True}


def snli_ve(folder: Path) -> tuple[str, str]:
    rows = [
        {"pairID": f"{number}.jpg#0r1e", "sentence2": "A dog.", "gold_label": label}
        for number, label in enumerate([*CLASSES, "-"])
    ]
    for number, name in enumerate(
        ["Flickr30K_ID", "flickr30k_id", "Flickr30kID", "Flickr30K_ID"]
    ):
        rows[number][name] = f"{number}" + ".jpg" * (number == 1)
        paint(folder / "images" / f"{number}.jpg", "green")
    return str(write_lines(folder / "dev.jsonl", rows)), str(folder / "images")


def test_undecided_hypotheses_are_left_out_and_counted(tmp_path: Path) -> None:
    found, undecided = read_hypotheses(*snli_ve(tmp_path))
    assert [one.label for one in found] == [0, 1, 2]
    assert undecided == 1
    assert all(one.image.is_file() for one in found)
    path, images = snli_ve(tmp_path)
    lines = Path(path).read_text().splitlines()
    rows = [json.loads(line) | {"gold_label": "-"} for line in lines]
    write_lines(Path(path), rows)
    with pytest.raises(ValueError, match=r"any of its 4 lines .* give a file that has"):
        read_hypotheses(path, images)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 holds no JSON object"),
        ('{"gold_label": "neutral", "sentence2": "x"}', "line 2: no 'Flickr30K_ID'"),
        ('{"gold_label": "maybe"}', "line 2: gold_label 'maybe'"),
        (
            '{"gold_label": "neutral", "sentence2": "x", "Flickr30K_ID": "../1"}',
            "line 2: 'Flickr30K_ID' is '../1'",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, expected: str) -> None:
    path, images = snli_ve(tmp_path)
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ValueError, match="again") as caught:
        read_hypotheses(path, images)
    assert f"{path} {expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"identifier": "train-7"}, "split-set-pair-sentence"),
        ({"identifier": "train-7-0-1"}, "stood in an earlier line"),
        ({"label": "Maybe"}, "neither True nor False"),
        ({"sentence": None}, "no 'sentence'"),
        ({"sentence": 5}, "'sentence' is 5, which says nothing"),
        ({"sentence": " "}, "'sentence' is ' ', which says nothing"),
    ],
)
def test_malformed_sentences_are_named(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path, images = nlvr2(tmp_path)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows[2] |= change
    write_lines(Path(path), rows)
    with pytest.raises(ValueError, match="line 3: ") as caught:
        read_sentences(path, images)
    assert expected in str(caught.value)


def test_files_and_folders_that_are_not_there_are_named(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    questions, annotations, images = vqa(tmp_path)
    for read in (
        lambda: read_questions(nowhere, annotations, images),
        lambda: read_questions(questions, nowhere, images),
        lambda: read_questions(questions, annotations, nowhere),
        lambda: read_questions(questions, annotations, nowhere + "/{number}.jpg"),
        lambda: read_sentences(nowhere, images),
        lambda: read_hypotheses(nowhere, images),
    ):
        with pytest.raises(ValueError, match=r"nowhere.*: give ") as caught:
            read()
        assert "Errno" not in str(caught.value)


def pictures(side: int, **keys: Any) -> Pictures:
    return Pictures(image=ImageConfig(size=side), key="vqa.unreadable", **keys)


def test_images_are_read_as_a_viewer_shows_them(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    # Stored a quarter turn to the left: a viewer turns it back.
    Image.fromarray(np.rot90(pixels)).save(turned, exif=exif, quality=95)
    paths = [upright, turned, upright]
    whole = ImageConfig(size=16, geometry="resize")
    found = Pictures(image=whole, key="").read(paths)
    assert found.shape == (3, 16, 16, 3)
    assert np.array_equal(found[0], found[2])
    assert found[0, :, :6].max() < 10
    assert found[0, :, -6:].min() > 245
    assert np.abs(found[1].astype(int) - found[0]).mean() < 8
    centre = pictures(16).read([upright])[0]
    assert centre[:, :7].max() == 0
    assert centre[:, 9:].min() == 255


def test_missing_damaged_and_huge_images_are_named(tmp_path: Path) -> None:
    whole = paint(tmp_path / "whole.jpg", "red")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    reader = pictures(16)
    bad = [cut, text, tmp_path / "nowhere.jpg"]
    assert reader.damaged([whole, *bad]) == set(bad)
    for path in bad:
        with pytest.raises(ValueError, match=r"--vqa\.unreadable leave_out") as caught:
            reader.read([whole, path])
        assert str(path) in str(caught.value)
        # Of Python's objects nobody has heard.
        assert "<_io" not in str(caught.value)
    with pytest.raises(ValueError, match="is damaged, or none of JPEG, PNG"):
        reader.read([text])
    with pytest.raises(ValueError, match="more than 500 pixels"):
        pictures(16, max_pixels=500).read([whole])
    Image.open(whole).save(text, "PNG")
    with pytest.raises(ValueError, match="more than 500 pixels"):
        pictures(16, max_pixels=500).read([text])


def test_examples_without_their_images_are_refused_or_counted(tmp_path: Path) -> None:
    good = [paint(tmp_path / f"{number}.jpg", "red") for number in range(3)]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 no more")
    gone = tmp_path / "gone.jpg"
    examples = [(good[0], good[1]), (good[1], gone), (bad, good[2]), (bad, gone)]
    with pytest.raises(ValueError, match=r"1 of 5 images are missing: .*gone\.jpg"):
        with_images(examples, lambda pair: pair, pictures(8), "refuse")
    kept, left_out = with_images(examples, lambda pair: pair, pictures(8), "leave_out")
    assert kept == examples[:1]
    assert left_out == {"missing_image": 2, "damaged_image": 1}
    with pytest.raises(ValueError, match="no image of 2 examples"):
        with_images(examples[2:], lambda pair: pair, pictures(8), "leave_out")


def test_texts_are_read_as_captions_in_shards_are(shards: Path) -> None:
    dataset = Dataset(shards, "train")
    places = dataset.places()[:20]
    records = dataset.records(places)
    captions = [
        dataset.json(shard, record)["caption"]
        for (shard, _), record in zip(places.tolist(), records, strict=True)
    ]
    for max_tokens in (64, 5):
        stored = [
            dataset.text(shard, record, 0, max_tokens=max_tokens)
            for (shard, _), record in zip(places.tolist(), records, strict=True)
        ]
        encoder = TextEncoder(
            dataset.tokenizer_file,
            dataset.tokenizer.special_ids,
            max_tokens=max_tokens,
        )
        ids, cut = encoder.encode([f"  {caption}\n" for caption in captions])
        assert [one.tolist() for one in ids] == [text.tolist() for text, _ in stored]
        assert cut == sum(was_cut for _, was_cut in stored)
    assert cut


def test_special_tokens_in_a_text_are_text(shards: Path) -> None:
    dataset = Dataset(shards, "train")
    special = dataset.tokenizer.special_ids
    encoder = TextEncoder(dataset.tokenizer_file, special, max_tokens=64)
    (ids, empty), _ = encoder.encode(["a [SEP] b", " "])
    assert ids.tolist().count(special["sep"]) == 1
    assert empty.tolist() == [special["cls"], special["sep"]]
