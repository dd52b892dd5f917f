"""What the tasks of a run share, and what they tell of themselves.

Owns no step of the work: that is `pipeline.ranges` and `pipeline.settle`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.compare import Comparison
from pipeline.filters import UidLists
from pipeline.options import (
    FetchOptions,
    FilterOptions,
    ImageOptions,
    TextOptions,
)
from pipeline.plan import Corpus, Plan
from pipeline.storage import Storage
from pipeline.tokenizer import StoredTokenizer


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is the same for every range of a run."""

    storage: Storage
    corpora: tuple[Corpus, ...]
    plan: Plan
    split_names: tuple[str, ...]
    """Held-out splits first; the place of a split is its rank."""
    image: ImageOptions
    text: TextOptions
    filter: FilterOptions
    fetch: FetchOptions
    where: str | None
    uids: UidLists
    tokenizer: StoredTokenizer
    comparison: Comparison
    run: str
    """sha256 of the transform: tells what this run stages from what others did."""
    watched: bool = True
    """Is there a driver whose end makes staging pointless?"""

    @property
    def kept(self) -> tuple[str, ...]:
        """Passthrough columns of all corpora: readers need every sample of a dataset to
        have the same fields, whichever source it is from.
        """
        names = (name for corpus in self.corpora for name in corpus.columns.keep)
        return tuple(dict.fromkeys(names))


@dataclass
class Tally:
    """What a task has done so far, for whoever watches."""

    done: int = 0
    written: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)

    def plain(self) -> dict[str, Any]:
        """The same as plain types, to be sent."""
        return {
            name: dict(value) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }


Report = Callable[[Mapping[str, Any]], None]
