"""Sources of a run: which shards of a dataset are drawn from together, and how often.

Owns names and weights of sources. Does not own the draws (`trainer.mixture`) or the
shards (`trainer.dataset`).

A shard holds samples of one source; the manifest has a weight for each, which is the
default. A source that two datasets have is called by its dataset's folder too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pipeline.config import nearest
from pipeline.manifest import Shard
from trainer.dataset import Dataset
from trainer.order import Source

MixtureKey = Literal["weights", "none"] | dict[str, float]
EVERYTHING = "*"


def sources_of(dataset: Dataset, mixture: MixtureKey) -> list[Source]:
    """What a run with the key `mixture` draws from `dataset`.

    Raises:
        ValueError: a weight for an unknown source or none for a known one, all weights
            0, several datasets that are to be no mixture, a source that has no shard
            yet.
    """
    if mixture == "none":
        if len(dataset.folders) > 1:
            raise ValueError(
                f"mixture none reads one dataset, and {len(dataset.folders)} are given "
                f"({dataset.name}): give each source a weight, --mixture '{{name: 3, "
                "other: 1}'"
            )
        shards = list(dataset.numbered())
        return [_source(shards, name=EVERYTHING, weight=1.0)]
    grouped = _grouped(dataset)
    _refuse_unborn(dataset)
    defaults = {
        name: dataset.folders[dataset.folder_of(shards[0][0])].manifest.sources[
            shards[0][1].source
        ]
        for name, shards in grouped.items()
    }
    weights = defaults if isinstance(mixture, str) else _given(mixture, defaults)
    return [
        _source(grouped[name], name=name, weight=weight)
        for name, weight in weights.items()
        if weight
    ]


def grown(dataset: Dataset, sources: Sequence[Source]) -> list[Source]:
    """The sources with the shards that `dataset` has by now."""
    if [source.name for source in sources] == [EVERYTHING]:
        grouped = {EVERYTHING: list(dataset.numbered())}
    else:
        grouped = _grouped(dataset)
    return [
        _source(grouped[source.name], name=source.name, weight=source.weight)
        for source in sources
    ]


def _grouped(dataset: Dataset) -> dict[str, list[tuple[int, Shard]]]:
    """The shards of each source, by its name in the run."""
    names = _names(dataset)
    grouped: dict[str, list[tuple[int, Shard]]] = {}
    for number, entry in dataset.numbered():
        name = names[dataset.folder_of(number), entry.source]
        grouped.setdefault(name, []).append((number, entry))
    return dict(sorted(grouped.items()))


def _refuse_unborn(dataset: Dataset) -> None:
    """A mixture needs all of its sources; one that is still to be written cannot join
    later.
    """
    for folder in dataset.folders:
        have = {entry.source for entry in folder.shards}
        missing = [name for name in folder.manifest.sources if name not in have]
        if missing and not folder.manifest.complete:
            raise ValueError(
                f"{folder.name} is still being written and has no shard of "
                f"{', '.join(missing)} yet: wait for one, or say --mixture none to "
                "read its sources as if they were one"
            )


def _source(shards: Sequence[tuple[int, Shard]], *, name: str, weight: float) -> Source:
    return Source(
        name=name,
        shards=np.array([number for number, _ in shards], dtype=np.int64),
        counts=np.array([entry.samples for _, entry in shards], dtype=np.int64),
        weight=weight,
    )


def _names(dataset: Dataset) -> dict[tuple[int, str], str]:
    """What the run calls the source `name` of directory `number`, by (number, name)."""
    known = [
        (number, name)
        for number, folder in enumerate(dataset.folders)
        for name in folder.manifest.sources
    ]
    plain = Counter(name for _, name in known)
    folders = {
        number: folder.last_name for number, folder in enumerate(dataset.folders)
    }
    found = {
        (number, name): name if plain[name] == 1 else f"{folders[number]}/{name}"
        for number, name in known
    }
    twice = [name for name, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"source {twice[0]!r} is in two datasets whose folders have the same name "
            f"({dataset.name}): rename one of the folders"
        )
    return found


def _given(
    weights: Mapping[str, float], known: Mapping[str, float]
) -> dict[str, float]:
    """The user's weights in the order of the known sources."""
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(
                f"mixture: no source {name!r} here; there are {', '.join(known)}."
                f"{nearest(name, list(known))}"
            )
        if not 0 <= weight < float("inf"):
            raise ValueError(f"mixture: weight {weight} of {name!r}: give 0 or more")
    missing = [name for name in known if name not in weights]
    if missing:
        raise ValueError(
            f"mixture: no weight for {', '.join(missing)}: give one, or 0 to leave it "
            "out"
        )
    if not any(weights.values()):
        raise ValueError("mixture: every weight is 0, so there is nothing to draw")
    return {name: weights[name] for name in known}
