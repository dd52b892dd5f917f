"""A step of a run, made again: its pairs as the model got or will get them.

Owns collecting them from their owners and the comparison with the recorded digest. Does
not own order, captions, crops or masks (`trainer.loader` and what it uses), nor how
anything is shown (`trainer.replay_text`, `trainer.replay_page`).

Steps count from 1 here, as in `metrics.jsonl`; the loader counts from 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from trainer import checkpoint, freezes
from trainer.contract import check_world_size, read_metrics
from trainer.data_state import DataState, difference
from trainer.dataset import Dataset
from trainer.loader import Counts, Loader, sum_counts
from trainer.masking import Mode
from trainer.options import PretrainConfig, load_config
from trainer.quarantine import Quarantined, from_plain
from trainer.replay_pairs import Made, Pair, mode_name, pair_as_json
from trainer.sources import sources_of


@dataclass(frozen=True, kw_only=True)
class Digest:
    """The step's `sample_digest`, made again and as it was recorded."""

    computed: str
    covers: Literal["samples", "full"]
    """The key `digest` that `computed` was made with."""
    recorded: str | None
    cure: str
    """What to try where they differ."""

    @property
    def matches(self) -> bool | None:
        """None where nothing is recorded."""
        return None if self.recorded is None else self.recorded == self.computed


@dataclass(frozen=True, kw_only=True)
class ReplayedStep:
    """One step of a run, or a part of it."""

    run: Path
    config: PretrainConfig
    step: int
    epoch: int
    """From 0, as in `metrics.jsonl`."""
    step_in_epoch: int | None
    """From 1; None in a mixture, whose sources have epochs of their own."""
    steps_per_epoch: int | None
    provisional: bool
    """Its epoch is not frozen yet and may take in more shards; then the step has other
    pairs than these."""
    counts: Counts
    """Of the whole step, as the trainer adds them up."""
    modes: Mapping[Mode, int]
    """Pairs of the whole step in each mode."""
    words: int
    """Tokens of the whole step that could be masked."""
    squares: int
    """Image positions of the whole step."""
    masked_squares: int
    sources: Mapping[str, int]
    """Pairs of the whole step from each source of a mixture; empty without one."""
    digest: Digest
    lanes: range
    """Lanes that `pairs` are from."""
    pairs: Sequence[Pair]
    metrics: Sequence[Mapping[str, Any]]
    """Every line of `metrics.jsonl`."""

    @property
    def part_pairs(self) -> int:
        """Pairs that `lanes` have, shown or not."""
        return self.counts.pairs // self.config.lanes * len(self.lanes)

    @property
    def row(self) -> Mapping[str, Any] | None:
        """What `metrics.jsonl` says about the step, if it has come that far."""
        return _row_of(self.metrics, self.step)


def replay(
    run: Path,
    *,
    step: int,
    data: Sequence[str] | str | None = None,
    lane: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    limit: int | None = None,
    pictures: bool = False,
) -> ReplayedStep:
    """Make step `step` (from 1) of `run` again.

    Args:
        data: dataset directory, or several, instead of those in the run's
            configuration.
        lane: show only its pairs.
        rank, world_size: show only the pairs of this rank.
        limit: show at most this many pairs.
        pictures: keep the pixels of the pairs that are shown.

    Raises:
        ValueError: no run, no dataset or another than the run's, no such step, lane or
            rank, a damaged sample. The message has the cure.
    """
    if step < 1:
        raise ValueError(
            f"{step} is no step: they are counted from 1, as in metrics.jsonl; name 1 "
            "or more"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} pairs show nothing: name 1 or more")
    config = load_config(run, data=data)
    found = checkpoint.newest(run)
    marker = found[1] if found else None
    marked = DataState.from_plain(marker) if marker else None
    if marked:
        _require_known(run, step, marked)
    try:
        dataset, state = _open_dataset(run, config, marked, step)
    except ValueError as error:
        raise ValueError(f"{error}{_fewer(run, config)}") from error
    quarantined: list[Quarantined] = []
    if marker and marked and marked.began == state.began:
        # What was damaged of other data says nothing of this.
        quarantined = from_plain(marker["quarantine"])
    loader = Loader(
        dataset,
        config,
        rank=0,
        world_size=1,
        quarantined=quarantined,
        state=state,
    )
    if step > loader.order.beyond:
        raise ValueError(
            f"{step} is no step of this run, whose order is defined up to step "
            f"{loader.order.beyond}: name that or a lower one"
        )
    lanes = _chosen_lanes(loader, lane=lane, rank=rank, world_size=world_size)
    wanted = loader.order.samples_of(step - 1, loader.lanes)
    within = loader.order.epoch_steps(step - 1)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_file))
    parts: list[Counts] = []
    modes: Counter[Mode] = Counter()
    words = masked_squares = place = 0
    pairs: list[Pair] = []
    with ThreadPoolExecutor(config.threads, "decode") as decoders:
        for part in loader.micros(step - 1, decoders):
            batch = part.batch
            ordered = wanted.rows(slice(place, place + len(part.places)))
            made = Made.of(loader, tokenizer, ordered, part.places, batch)
            parts.append(part.counts)
            modes.update(map(Mode, made.masks.mode.tolist()))
            words += int(batch.stream.n_words.sum())
            masked_squares += int(made.masks.image.sum())
            for row in range(len(part.places)):
                shown = int(ordered.lanes[row]) in lanes
                if shown and (limit is None or len(pairs) < limit):
                    pairs.append(made.pair(row, pictures=pictures))
            place += len(part.places)
    metrics = read_metrics(run)
    recorded = _row_of(metrics, step)
    total = sum_counts(parts)
    return ReplayedStep(
        run=run,
        config=config,
        step=step,
        epoch=loader.order.epoch_of(step - 1),
        step_in_epoch=within[0] + 1 if within else None,
        steps_per_epoch=within[1] if within else None,
        provisional=recorded is None and _may_grow(loader, step, state),
        counts=total,
        modes=modes,
        words=words,
        squares=total.pairs * loader.n_image,
        masked_squares=masked_squares,
        sources=_by_source(loader, total),
        digest=_compare(
            loader,
            step,
            total,
            row=recorded or {},
            known=marker is not None or state.decided > 0,
        ),
        lanes=lanes,
        pairs=pairs,
        metrics=metrics,
    )


def as_json(found: ReplayedStep) -> dict[str, Any]:
    """What JSON can hold of a step: all but the pixels."""
    return {
        "run": str(found.run),
        "data": found.config.data,
        "step": found.step,
        "epoch": found.epoch,
        "step_in_epoch": found.step_in_epoch,
        "steps_per_epoch": found.steps_per_epoch,
        "provisional": found.provisional,
        "global_batch": found.config.global_batch,
        "sample_digest": found.digest.computed,
        "digest_covers": found.digest.covers,
        "recorded_digest": found.digest.recorded,
        "matches": found.digest.matches,
        "words": found.words,
        "masked_words": found.counts.masked_words,
        "squares": found.squares,
        "masked_squares": found.masked_squares,
        "sources": dict(found.sources),
        "cut_captions": found.counts.cut_captions,
        "replaced": found.counts.replaced,
        "modes": {mode_name(mode): found.modes.get(mode, 0) for mode in Mode},
        "metrics": found.row,
        "pairs": [pair_as_json(pair) for pair in found.pairs],
    }


def _by_source(loader: Loader, counts: Counts) -> dict[str, int]:
    if loader.order.mixture is None:
        return {}
    names = [source.name for source in loader.order.sources]
    return dict(zip(names, counts.sources, strict=True))


def _chosen_lanes(
    loader: Loader, *, lane: int | None, rank: int | None, world_size: int | None
) -> range:
    """The lanes to show, of all that `loader` reads."""
    if (rank is None) != (world_size is None):
        raise ValueError("--rank and --world_size belong together: give both")
    if lane is not None and rank is not None:
        raise ValueError("--lane and --rank name two parts: give one of them")
    if lane is not None:
        if lane not in loader.lanes:
            last = loader.lanes[-1]
            raise ValueError(f"no lane {lane}: this run has lanes 0 to {last}")
        return range(lane, lane + 1)
    if rank is None or world_size is None:
        return loader.lanes
    check_world_size(world_size, lanes=len(loader.lanes))
    if not 0 <= rank < world_size:
        raise ValueError(
            f"no rank {rank}: a world of {world_size} has ranks 0 to {world_size - 1}"
        )
    dataset, config = loader.dataset, loader.config
    return Loader(dataset, config, rank=rank, world_size=world_size).lanes


def _may_grow(loader: Loader, step: int, state: DataState) -> bool:
    """Whether the epoch of a step is not frozen, and there are or may come shards that
    it would take in.
    """
    order, dataset = loader.order, loader.dataset
    # Of a run that has not begun nothing is.
    if state.step + state.decided and step - 1 < order.undecided:
        return False
    tables = zip(order.epochs, order.sources, strict=True)
    more = any(table.frozen[-1].shards < len(own.shards) for table, own in tables)
    return more or not dataset.complete


def _require_known(run: Path, step: int, state: DataState) -> None:
    """Raise ValueError for a step of before a change of data: the state has forgotten
    what it drew from.
    """
    began = state.began.step
    if step <= began:
        raise ValueError(
            f"{run} went on with other data after step {began}, and its newest "
            f"checkpoint knows the data of later steps only: name step {began + 1} or "
            f"more; or replay step {step} with a copy of the run without the "
            f"checkpoints after step {began}, and the dataset of then as --data"
        )


def _open_dataset(
    run: Path, config: PretrainConfig, marked: DataState | None, step: int
) -> tuple[Dataset, DataState]:
    """The dataset that the run took a step with, for which its newest checkpoint, if
    there is one yet, and what it has frozen vouch; and where its data stands.
    """
    for data in _listed(config.data):
        if "://" not in data and not Path(data).is_dir():
            raise ValueError(
                f"{data}, the dataset of {run}, is not there: name where it is now "
                "with --data"
            )
    dataset = Dataset(config.data, config.split, growing=True, storage=config.storage)
    sources, frozen = sources_of(dataset, config.mixture), freezes.read(run, config)
    if marked is None:
        fresh = DataState.fresh(dataset, sources, seed=config.seed)
        return dataset, freezes.begun(fresh, frozen, dataset, sources)
    state = freezes.restored(marked, frozen, dataset, sources)
    if step <= marked.step and difference(state, dataset, sources):
        # What was frozen since says nothing of what was taken before.
        state = marked
    elif frozen and marked.step == frozen.began.step < step:
        # --changed_data new_epoch came to no checkpoint.
        state = replace(frozen, decided=frozen.step)
    what = difference(state, dataset, sources)
    if what:
        raise ValueError(
            f"{run} was trained on a dataset with manifest hash "
            f"{state.manifest_hash} and {dataset.name} has "
            f"{dataset.manifest_hash}: {what}. Name the one it was trained on with "
            "--data, or preprocess the same corpus again with the same keys and "
            "versions"
        )
    return dataset, state


def _listed(data: Sequence[str] | str) -> Sequence[str]:
    return [data] if isinstance(data, str) else data


def _fewer(run: Path, config: PretrainConfig) -> str:
    """What to add to an error where fewer datasets are given than the run is on."""
    known = _listed(load_config(run).data)
    if len(_listed(config.data)) >= len(known):
        return ""
    return (
        f". The run is on {len(known)} datasets: give all of them, in the same order, "
        f"--data '[{', '.join(known)}]' where they are now"
    )


def _compare(
    loader: Loader, step: int, counts: Counts, *, row: Mapping[str, Any], known: bool
) -> Digest:
    """The digest beside the recorded one. `digest` may change between the calls that
    make up a run, so what it covers now need not be what it covered at that step.
    """
    covers, computed = loader.config.digest, counts.digest_text
    recorded = row.get("sample_digest")
    if recorded not in (None, computed):
        other: Literal["samples", "full"] = "full" if covers == "samples" else "samples"
        again = _digest_covering(loader, step, other)
        if again == recorded:
            computed, covers = again, other
    if counts.replaced != row.get("replaced", counts.replaced):
        cure = (
            f"{counts.replaced} damaged samples are replaced now, and "
            f"{row['replaced']} were then: `python -m pipeline.validate "
            f"{loader.dataset.name}` names what is damaged; replay with the dataset as "
            "it was"
        )
    elif known:
        cure = (
            "The dataset is the run's, so another version of this code drew these "
            "samples or masks, or config.yaml was edited: replay with the version and "
            "the configuration that trained the run"
        )
    else:
        cure = (
            "Nothing in the run says which dataset it was trained on, and this is "
            "likely another: name the right one with --data"
        )
    return Digest(computed=computed, covers=covers, recorded=recorded, cure=cure)


def _digest_covering(
    loader: Loader, step: int, covers: Literal["samples", "full"]
) -> str:
    """The step's digest with another value of the key `digest`."""
    config = replace(loader.config, digest=covers)
    quarantined = loader.quarantine.until(step)
    state = DataState.of(loader.dataset, loader.order, step=step)
    other = Loader(
        loader.dataset,
        config,
        rank=0,
        world_size=1,
        quarantined=quarantined,
        state=state,
    )
    with ThreadPoolExecutor(config.threads, "decode") as decoders:
        counts = [part.counts for part in other.micros(step - 1, decoders)]
    return sum_counts(counts).digest_text


def _row_of(
    metrics: Sequence[Mapping[str, Any]], step: int
) -> Mapping[str, Any] | None:
    return next((row for row in reversed(metrics) if row.get("step") == step), None)
