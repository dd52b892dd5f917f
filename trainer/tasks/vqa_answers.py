"""Answers of VQA v2: how they are compared, counted and scored.

Owns the normalisation and the accuracy of the official evaluation (Antol et al. 2015;
the code at github.com/GT-Vision-Lab/VQA decides where it differs from the text), the
answer vocabulary and its soft targets. Pure functions of texts. Does not own the files
(`trainer.tasks.vqa_files`) or the task (`trainer.tasks.vqa`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official expression was meant to keep the period of a decimal that a digit stands
# before, and looks only at what follows; and it takes away 32 at most.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
# Each is also recognised with any one of its apostrophes left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've
'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _spellings() -> dict[str, str]:
    found = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTIONS.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }
    # A slip of the official table, which takes this one's apostrophe away.
    return {**found, "somebody'd": "somebodyd"}


_SPELLINGS = _spellings()


def normalised(answer: str) -> str:
    """An answer as the official evaluation compares it: without punctuation and
    articles, in lower case, numbers to ten as digits, contractions with apostrophes.
    """
    text = _stripped(answer)
    words = [_DIGITS.get(word, word) for word in _bare(text).lower().split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(_SPELLINGS.get(word, word) for word in kept)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official accuracy of an answer to a question that people gave `answers` to:
    min(n / 3, 1) for n who said the same, a mean over leaving out each person in turn.

    As in the official code, nothing is normalised where all people agree to the letter.
    """
    given, theirs = _stripped(prediction), [_stripped(each) for each in answers]
    if len(set(theirs)) > 1:
        given, theirs = normalised(given), [normalised(each) for each in theirs]
    said = sum(each.lower() == given.lower() for each in theirs)
    others = len(theirs) - said
    # Who said it is left out `said` times, anybody else `others` times.
    total = said * min((said - 1) / 3, 1) + others * min(said / 3, 1)
    return total / len(theirs)


def vocabulary(answers: Iterable[str], *, at_least: int) -> tuple[str, ...]:
    """The normalised answers that stand `at_least` so often among `answers` (one for
    each question), the most frequent first.
    """
    counts = Counter(normalised(answer) for answer in answers)
    kept = [answer for answer, count in counts.items() if answer and count >= at_least]
    return tuple(sorted(kept, key=lambda answer: (-counts[answer], answer)))


def soft_targets(
    answers: Sequence[str], numbers: Mapping[str, int]
) -> dict[int, float]:
    """What each answer of the vocabulary, by its number, would score; those that score
    nothing are left out.

    Args:
        answers: of the people asked.
        numbers: number of each answer of the vocabulary.
    """
    spoken = {normalised(answer) for answer in answers}
    spoken |= {_stripped(answer).lower() for answer in answers}
    scores = {
        numbers[word]: accuracy(word, answers)
        for word in sorted(spoken)
        if word in numbers
    }
    return {number: score for number, score in scores.items() if score}


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _bare(text: str) -> str:
    """Punctuation becomes a blank; nothing where a blank stands beside it somewhere in
    the text, or the text has a number with a comma in it.
    """
    bare, numeric = text, bool(_COMMA_IN_NUMBER.search(text))
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside or numeric else " ")
    return _PERIOD.sub("", bare, count=_MOST_PERIODS)
