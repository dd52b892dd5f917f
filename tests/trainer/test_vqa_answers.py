"""Answers are compared as the official VQA evaluation compares them."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.tasks.vqa_answers import accuracy, normalised, soft_targets, vocabulary

# What the official evaluation (github.com/GT-Vision-Lab/VQA) makes of them.
OFFICIAL = {
    "The Dog.": "dog",
    "a an the": "",
    "Two dogs": "2 dogs",
    "none": "0",
    "eleven": "eleven",
    "dont": "don't",
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "Im": "im",
    "black/white": "black white",
    "black / white": "black  white".replace("  ", " "),
    "black-and-white": "black and white",
    "yes, sir": "yes sir",
    "1,000": "1000",
    "1,000/day": "1000day",
    "3.5": "3.5",
    "5.": "5",
    ".5": ".5",
    "U.S.": "us",
    "." * 40: "." * 8,
    "what?\n": "what",
    "9:30": "9:30",
    "it's": "it's",
}


@pytest.mark.parametrize("answer", OFFICIAL)
def test_answers_are_normalised_as_the_official_evaluation_does(answer: str) -> None:
    assert normalised(answer) == OFFICIAL[answer]


def naive(prediction: str, answers: list[str]) -> float:
    """The text of the evaluation, person by person."""
    if len({answer.strip() for answer in answers}) > 1:
        answers = [normalised(answer) for answer in answers]
        prediction = normalised(prediction)
    shares = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        same = [
            other
            for other in others
            if other.strip().lower() == prediction.strip().lower()
        ]
        shares.append(min(len(same) / 3, 1))
    return sum(shares) / len(shares)


def test_accuracy_is_a_mean_over_leaving_out_each_person() -> None:
    generator = np.random.default_rng(0)
    pool = ["yes", "Yes.", "no", "a dog", "dog", "two", "2", "THE cat", "cats"]
    values = set()
    for people in (10, 10, 10, 3, 1):
        for _ in range(200):
            some = generator.choice(pool, size=generator.integers(1, 5))
            answers = generator.choice(some, size=people).tolist()
            prediction = str(generator.choice(pool))
            found = accuracy(prediction, answers)
            assert found == pytest.approx(naive(prediction, answers), abs=1e-12)
            values.add(round(found, 6))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= values


@pytest.mark.parametrize(
    ("said", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_ten_people_give_the_soft_scores_of_the_field(said: int, score: float) -> None:
    others = [f"word{number}" for number in range(10 - said)]
    assert accuracy("dog", ["dog"] * said + others) == pytest.approx(score)


def test_nothing_is_normalised_where_all_agree_to_the_letter() -> None:
    assert accuracy("dog", ["a dog"] * 10) == 0
    assert accuracy("A DOG", ["a dog"] * 10) == 1
    assert accuracy("dog", ["a dog"] * 9 + ["dog"]) == 1


def test_the_vocabulary_holds_frequent_answers_in_a_fixed_order() -> None:
    answers = ["yes"] * 3 + ["Yes."] + ["two", "2", "no", "no"] + ["rare", "the"] * 1
    assert vocabulary(answers, at_least=2) == ("yes", "2", "no")
    assert vocabulary(reversed(answers), at_least=2) == ("yes", "2", "no")
    assert vocabulary(answers, at_least=5) == ()


def test_soft_targets_are_what_each_answer_would_score() -> None:
    words = ("yes", "no", "dog", "a dog")
    numbers = {word: number for number, word in enumerate(words)}
    answers = ["yes"] * 2 + ["No!"] * 3 + ["blue"] * 5
    found = soft_targets(answers, numbers)
    assert found == {
        numbers[word]: pytest.approx(accuracy(word, answers)) for word in ("yes", "no")
    }
    # To the letter, as it is scored.
    assert soft_targets(["a dog"] * 10, numbers) == {3: 1.0}
