"""What a run measures on held-out pairs while it trains.

Owns the fixed set of pairs, which of them are left out, its division over ranks, and
its losses. Does not own the pairs' bytes and masks (`trainer.probes`), the probes and
panels of the same pairs (`trainer.panels`), how much damage is borne
(`trainer.quarantine`) or where results are written (`trainer.metrics`).

Pairs, captions and masks depend on `eval.seed` alone, so runs of other seeds, ranks and
micro-batches are measured alike. A damaged pair is left out and none takes its place:
what is measured of the others stays as it was. A micro-batch holds pairs of one masking
mode: losses by mode are then sums that the model gives anyway.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.dataset import Dataset
from trainer.engine import World
from trainer.folder import DamagedError
from trainer.loader import Loader
from trainer.masking import Masks, Mode, drawn_modes
from trainer.matching import fixed_matching
from trainer.metrics import Metrics
from trainer.models.base import Inputs, ModelConfig, Output, as_matched
from trainer.options import PretrainConfig
from trainer.panels import Panels, pairs_wanted
from trainer.parameters import whole_model
from trainer.philox import signed_uids
from trainer.probes import Pairs, drawn_places, make_inputs, read_pairs, uids_among
from trainer.profiling import span
from trainer.quarantine import Quarantine, Quarantined
from trainer.rows import caption_choice

Build = Callable[[], nn.Module]

# What sums are divided by, summed for each mode behind the model's losses and figures.
_COUNTS = ("masked_words", "recon_pixels", "pairs")
_ITM, _ITM_FIGURE = "itm", "itm_accuracy"


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's micro-batches of the fixed set: as many as any other rank has."""

    pairs: Pairs
    """The rank's own pairs, and those whose images it needs."""
    batches: list[tuple[Mode, np.ndarray, bool]]
    """Mode, rows of `pairs`, and whether they count: a rank that has fewer pairs goes
    through one that does not, because ZeRO 3 gathers parameters from all ranks."""
    total: int
    """Pairs of the whole set, without damaged ones."""
    damaged: int
    """Damaged pairs, which are left out of it."""
    image_of: np.ndarray
    """Row of `pairs` whose image each row's text is matched with."""
    matched: np.ndarray
    """Which of them are their own."""
    numbers: np.ndarray
    """Which pair of the whole set each row is."""


class HeldOut:
    """Looks at held-out pairs at chosen steps.

    Args:
        share: this rank's part of the fixed set.
        panels: probes and panels, on the rank that makes them, if they are asked for.
        build: makes a model like the engine's.
    """

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        *,
        share: Share,
        panels: Panels | None,
        build: Build,
    ) -> None:
        self._config, self._world = config, world
        self._share, self._panels, self._build = share, panels, build

    def look(
        self,
        engine: Any,
        step: int,
        metrics: Metrics | None,
        alive: Callable[[], None] = lambda: None,
    ) -> float | None:
        """Measure what is due after `step` steps and write it down. Every rank calls
        this with the same step. The validation loss, if it was due. Calls `alive` now
        and then.
        """
        row: dict[str, Any] = {}
        if self._losses_due(step):
            row |= self.losses(engine, alive)
        if self._probes_due(step):
            model = whole_model(engine.module, self._build, first=self._world.first)
            if model is not None and self._panels and metrics:
                found, picture = self._panels.make(model, step)
                row |= found
                if picture is not None:
                    metrics.picture("reconstructions", picture, step)
            # Or the others would seem to hang in the next step.
            self._world.barrier()
        if row and metrics:
            metrics.validation({"step": step, **row})
        return row.get("val_loss")

    def due(self, step: int) -> bool:
        """Is anything to be measured after `step` steps?"""
        return self._losses_due(step) or self._probes_due(step)

    def _losses_due(self, step: int) -> bool:
        every = self._config.eval.every_steps
        return every > 0 and (step % every == 0 or step == self._config.last_step)

    def _probes_due(self, step: int) -> bool:
        every = self._config.eval.probes_every_steps
        return every > 0 and step % every == 0

    @span("validation")
    def losses(
        self, engine: Any, alive: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Losses of the whole set, the same on every rank: `VALIDATION_NAMES` but for
        the step, and each loss by mode.
        """
        share, model, device = self._share, self._config.model, self._world.device
        sums = torch.zeros(len(Mode), _size(model), dtype=torch.float64, device=device)
        features = torch.empty(0)
        engine.eval()
        try:
            with torch.no_grad():
                for mode, rows, counts in self._share.batches:
                    alive()
                    inputs, masks = self._inputs(mode, rows)
                    found = self._batch_sums(engine, mode, inputs, masks, rows)
                    if model.contrastive:
                        own = engine(inputs, None).features.float()
                        if not len(features):
                            features = own.new_zeros(share.total, own.shape[1])
                        if counts:
                            features[share.numbers[rows]] = own
                    if counts:
                        sums[mode] += found
                contrast = {}
                if model.contrastive:
                    table = self._world.sum(features)
                    contrast = engine.module.held_out_contrast(table)
        finally:
            engine.train()
        summed = self._world.sum(sums).cpu().numpy()
        row = losses_row(summed, self._config, share.total, contrast)
        return row | {"val_damaged": share.damaged}

    def _inputs(self, mode: Mode, rows: np.ndarray) -> tuple[Inputs, Masks]:
        pairs, config = self._share.pairs, self._config
        return make_inputs(
            config,
            uids=pairs.uids[rows],
            pixels=pairs.pixels[rows],
            texts=[pairs.texts[row] for row in rows],
            seed=config.eval.seed,
            draw_number=0,
            mode=mode,
            device=self._world.device,
        )

    def _batch_sums(
        self, engine: Any, mode: Mode, inputs: Inputs, masks: Masks, rows: np.ndarray
    ) -> Tensor:
        """Losses, figures and counts of a micro-batch, as `_COUNTS` has them."""
        model = self._config.model
        output: Output = engine(inputs, masks)
        losses, figures = dict(output.losses), dict(output.figures)
        if model.mismatched is not None:
            whole = self._matching(engine, inputs, masks, rows)
            losses[_ITM] = whole.losses[_ITM]
            figures[_ITM_FIGURE] = whole.figures[_ITM_FIGURE]
        _, _, words, positions = output.by_mode[:, mode]
        found = [losses[term.name] for term in model.terms]
        found += [figures[figure.name] for figure in model.figures]
        found += [words, positions * model.patch_size**2]
        found += [words.new_full((), len(rows))]
        return torch.stack([value.double() for value in found])

    def _matching(
        self, engine: Any, inputs: Inputs, masks: Masks, rows: np.ndarray
    ) -> Output:
        """ITM loss of some pairs, and how many are rightly told apart."""
        share, device = self._share, self._world.device
        whole = inputs._replace(
            pixels=torch.from_numpy(share.pairs.pixels[share.image_of[rows]]).to(
                device
            ),
            n_masked_words=1,
            n_recon_images=1,
            matching=as_matched(
                len(rows), torch.from_numpy(share.matched[rows]).to(device)
            ),
        )
        # Only the pass over whole pairs is wanted.
        nothing = Masks(
            mode=masks.mode,
            text=torch.zeros_like(masks.text),
            image=torch.zeros_like(masks.image),
        )
        found: Output = engine(whole, nothing)
        return found


def held_out(
    loader: Loader, world: World, build: Build, metrics: Metrics | None = None
) -> HeldOut | None:
    """The fixed set that a run is measured on, read into memory; None where nothing is
    to be measured. Every rank calls this. Damaged pairs are left out, which is said
    through `metrics`.

    Raises:
        ValueError: more are damaged than `damage.max_share` bears, or too few are
            left; the ranks that do not raise exit.
    """
    config = loader.config
    if not (config.eval.every_steps or config.eval.probes_every_steps):
        return None
    shards = world.broadcast(_shards(loader.dataset, config))
    if not any(shards):
        if metrics:
            metrics.note(
                f"no validation: {loader.dataset.name} has no split "
                f"{config.eval.split!r}; preprocess with --split.val 0.05 to hold "
                "pairs out (--eval.every_steps 0 hides this line)"
            )
        return None
    with closing(world.together(lambda: _opened(config, shards))) as dataset:
        share, panels = _sound(dataset, loader, world, metrics)
    return HeldOut(config, world, share=share, panels=panels, build=build)


def share_of(
    modes: np.ndarray, *, rank: int, size: int, micro_batch: int
) -> list[tuple[Mode, np.ndarray, bool]]:
    """Micro-batches of a rank as `Share.batches`, rows counted in the whole set, whose
    pairs have `modes` (N,). Each pair counts on one rank, and all ranks have as many
    micro-batches.
    """
    batches = []
    for mode in Mode:
        rows = np.flatnonzero(modes == mode)
        mine = rows[rank::size]
        count = -(-len(rows[::size]) // micro_batch)
        for part in np.array_split(mine, count) if count else []:
            batches.append((mode, part if len(part) else rows[:1], len(part) > 0))
    return batches


def losses_row(
    sums: np.ndarray,
    config: PretrainConfig,
    pairs: int,
    contrast: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float | int]:
    """Means of the sums (modes, losses and figures and `_COUNTS`) of `pairs` pairs.

    Args:
        contrast: what the model says of the features of all of them.
    """
    model = config.model
    of_terms = [(f"val_{term.name}_loss", term.count) for term in model.terms]
    names = of_terms + [(f"val_{one.name}", one.count) for one in model.figures]

    def means(suffix: str, of: np.ndarray) -> dict[str, float]:
        counts = dict(zip(_COUNTS, of[len(names) :].tolist(), strict=True))
        return {
            name + suffix: value / counts[count]
            for (name, count), value in zip(names, of.tolist(), strict=False)
            # What is of whole pairs does not depend on the mode of masking.
            if counts[count] and not (suffix and count == "pairs")
        }

    # Like a step's: an empty count gives loss 0.
    row = dict.fromkeys((name for name, _ in names), 0.0) | means("", sums.sum(0))
    row |= {f"val_{name}": value for name, value in contrast.items()}
    loss = sum(term.weight * row[f"val_{term.name}_loss"] for term in model.terms)
    by_mode: dict[str, float] = {}
    for mode in Mode:
        by_mode |= means(f"_{mode.name.lower()}", sums[mode])
    return {"val_loss": loss, **row, **by_mode, "val_pairs": pairs}


def _size(model: ModelConfig) -> int:
    """Numbers that are summed for each mode."""
    return len(model.terms) + len(model.figures) + len(_COUNTS)


def _shards(dataset: Dataset, config: PretrainConfig) -> list[int]:
    """Shards of the split in each directory that a run reads, as far as it knows."""
    split = config.eval.split
    return [
        sum(shard.split == split for shard in folder.manifest.shards)
        for folder in dataset.folders
    ]


def _opened(config: PretrainConfig, shards: list[int]) -> Dataset:
    """The split, of each directory the first `shards`: what rank 0 has seen, where a
    dataset grows.
    """
    given = [config.data] if isinstance(config.data, str) else config.data
    roots = [root for root, count in zip(given, shards, strict=True) if count]
    dataset = Dataset(roots, config.eval.split, growing=True, storage=config.storage)
    for folder, count in zip(dataset.folders, filter(None, shards), strict=True):
        del folder.shards[count:]
    return dataset


def _sound(
    dataset: Dataset, loader: Loader, world: World, metrics: Metrics | None
) -> tuple[Share, Panels | None]:
    """What this rank keeps of the set without the damaged pairs, which are those that
    any rank has found. Each pair is read by some rank, so all leave out the same.

    Raises:
        ValueError: more are damaged than the run bears.
    """
    config = loader.config
    read = _pairs_read(dataset, config)
    quarantine = Quarantine(
        read, max_share=config.damage.max_share, what="held-out pairs"
    )
    said: dict[int, str] = {}
    while True:
        share, panels, damage = world.together(
            lambda: _tried(dataset, loader, world, left_out=said)
        )
        found = [(f"{one.uid:016x}", str(one), one.shard, one.reason) for one in damage]
        found = sorted(itertools.chain(*world.gather(found)))
        if not found:
            break
        for uid, message, shard, reason in found:
            said.setdefault(int(uid, 16), message)
            entry = Quarantined(uid=uid, epoch=0, step=0, reason=reason, shard=shard)
            quarantine.add([entry])
        try:
            quarantine.check(0)
        except ValueError as error:
            # All ranks count alike.
            world.stop(
                ValueError(
                    f"{error}; one of them: {found[0][1]}; mend it, or raise "
                    "damage.max_share to measure without them"
                )
            )
    if said and metrics:
        metrics.note(_warning(list(said.values()), read, quarantine))
    return share, panels


def _pairs_read(dataset: Dataset, config: PretrainConfig) -> int:
    """Held-out pairs that ranks read, all together: losses and probes are of the first
    ones of one order.
    """
    limits = [config.eval.max_pairs]
    if config.eval.probes_every_steps:
        limits.append(pairs_wanted(config))
    held = len(dataset)
    return max(held if limit is None else min(limit, held) for limit in limits)


def _warning(said: list[str], read: int, quarantine: Quarantine) -> str:
    """What a user is told of damaged pairs."""
    more = f"; {len(said)} in all: {quarantine.where()}" if len(said) > 1 else ""
    return (
        f"warning: {len(said)} of {read} held-out pairs left out as damaged: "
        f"{said[0]}{more}"
    )


def _tried(
    dataset: Dataset, loader: Loader, world: World, *, left_out: Collection[int]
) -> tuple[Share, Panels | None, list[DamagedError]]:
    """This rank's part of the set without some uids, which is of no use where it finds
    more damage, and that damage.
    """
    config = loader.config
    damage: list[DamagedError] = []
    share = _share(dataset, loader, world, left_out=left_out, damage=damage)
    panels = None
    if world.first and config.eval.probes_every_steps > 0:
        panels = Panels.read(
            dataset,
            config,
            device=world.device,
            batch=loader.micro_batch,
            left_out=left_out,
            damage=damage,
        )
    return share, panels, damage


def _share(
    dataset: Dataset,
    loader: Loader,
    world: World,
    *,
    left_out: Collection[int],
    damage: list[DamagedError],
) -> Share:
    config, seed = loader.config, loader.config.eval.seed
    places = drawn_places(dataset, seed=seed, limit=config.eval.max_pairs)
    dataset.indexes_ahead(np.unique(places[:, 0]).tolist())
    records = dataset.records(places)
    uids = signed_uids(records["uid"])
    modes = drawn_modes(config.mask, seed=seed, epoch=0, uids=torch.from_numpy(uids))
    sound = ~uids_among(records, left_out)
    if not sound.any():
        raise ValueError(
            f"all {len(places)} held-out pairs that losses are measured on are damaged "
            f"(eval.max_pairs): `python -m pipeline.validate {dataset.name}` names "
            "every damage"
        )
    kept = np.flatnonzero(sound)
    batches = share_of(
        modes.numpy()[kept],
        rank=world.rank,
        size=world.size,
        micro_batch=loader.micro_batch,
    )
    batches = [(mode, kept[rows], counts) for mode, rows, counts in batches]
    mine = np.unique(np.concatenate([rows for _, rows, _ in batches]))
    image_of, matched = np.arange(len(uids)), np.ones(len(uids), dtype=bool)
    if config.model.mismatched is not None:
        same = _alike(dataset, config, places, records, damage)

        def unfit(one: int, other: int) -> bool:
            return not (sound[one] and sound[other]) or same(one, other)

        # Over the damaged ones too: nobody else's partner changes.
        image_of, matched = fixed_matching(
            uids, unfit, mismatched=config.model.mismatched, seed=seed
        )
        mine = np.union1d(mine, image_of[mine])
    return Share(
        pairs=read_pairs(dataset, config, places[mine], seed=seed, damage=damage),
        batches=[
            (mode, np.searchsorted(mine, rows), counts)
            for mode, rows, counts in batches
        ],
        total=int(sound.sum()),
        damaged=len(places) - int(sound.sum()),
        # Of a row that is only there for its image nobody asks.
        image_of=np.searchsorted(mine, image_of[mine]).clip(max=len(mine) - 1),
        matched=matched[mine],
        # Counted without the damaged ones.
        numbers=sound.cumsum()[mine] - 1,
    )


def _alike(
    dataset: Dataset,
    config: PretrainConfig,
    places: np.ndarray,
    records: np.ndarray,
    damage: list[DamagedError],
) -> Callable[[int, int], bool]:
    """Whether two of some pairs have the same image file or show the same caption.
    `damage` is told of captions that are damaged; what is said of these pairs then
    means nothing.
    """
    uids, longest = signed_uids(records["uid"]), config.text.max_tokens
    choice = caption_choice(records, uids, seed=config.eval.seed, epoch=0)
    shards = places[:, 0].tolist()

    @functools.cache
    def text(pair: int) -> bytes:
        try:
            words, _ = dataset.text(
                shards[pair], records[pair], int(choice[pair]), max_tokens=longest
            )
        except DamagedError as error:
            damage.append(error)
            return b""
        return words.tobytes()

    def alike(one: int, other: int) -> bool:
        images = records["jpg_crc32c"]
        return images[one] == images[other] or text(one) == text(other)

    return alike
