"""Dropout is drawn by law 1: the same whatever stands beside a pair, and none at 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer import test_maskvlm, test_mlim
from tests.trainer.sequence import launch_all
from tests.trainer.test_maskvlm import step
from tests.trainer.tiny import column
from trainer.dropout import SITES, Draws, Dropout, beyond
from trainer.kernels import dropout
from trainer.kernels.dropout import dropout_ref, dropped, kept
from trainer.masking import Masks
from trainer.models.base import Inputs, Sizes
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.models.mlim import MlimConfig
from trainer.philox import Use, draw
from trainer.plan_memory import Shapes

SHARE = 0.3
# As an int64, and as the generator has it.
SIGNED = -(7 << 32) + 5
SEED = SIGNED + (1 << 64)
LENGTHS = [7, 2, 12, 9, 3, 15, 8, 6]
UIDS = torch.arange(len(LENGTHS)) * 7919 - (3 << 60)
EPOCHS = torch.arange(len(LENGTHS)) % 3
MLIM = dataclasses.replace(test_mlim.TINY, dropout=SHARE)
MASKVLM = dataclasses.replace(test_maskvlm.TINY, dropout=SHARE)


def some(
    rows: int, *, share: float = SHARE, seed: int = SIGNED, site: int = 0
) -> Dropout:
    """Rows of a few samples."""
    number = torch.arange(rows)
    return Dropout(
        share=share,
        seed=seed,
        use=(Use.DROPOUT + site) << 24 | number % 3,
        uid=(number // 5) * 7919 - (1 << 62),
        place=number % 5,
    )


@contextmanager
def recorded() -> Iterator[list[tuple[Dropout, Tensor]]]:
    """What is drawn meanwhile: rows of a site, and which of their channels stay."""
    found: list[tuple[Dropout, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:

        def drawn(drop: Dropout, width: int) -> Tensor:
            found.append((drop, kept(drop, width)))
            return found[-1][1]

        patch.setattr(dropout, "kept", drawn)
        yield found


def by_row(found: list[tuple[Dropout, Tensor]]) -> dict[tuple[int, ...], list[bool]]:
    """The channels that stay, by all that a row is counted by."""
    return {
        key: row
        for drop, mask in found
        for key, row in zip(
            zip(*(each.tolist() for each in drop[2:]), strict=True),
            mask.tolist(),
            strict=True,
        )
    }


# --- draws ---------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 6, 16])
def test_a_channel_is_kept_by_its_own_word_of_the_generator(width: int) -> None:
    drop = some(13, site=3)
    found = kept(drop, width)
    assert found.shape == (13, width)
    for row in range(13):
        for channel in range(width):
            words = draw(
                seed=SEED,
                use=Use.DROPOUT + 3,
                epoch=int(drop.use[row]) & 0xFFFFFF,
                uid=int(drop.uid[row]),
                index=int(drop.place[row]) * -(-width // 4) + channel // 4,
            )
            stays = words[channel % 4] >= int(SHARE * 2**32)
            assert bool(found[row, channel]) == stays


def test_as_much_is_dropped_as_asked_for_and_the_rest_grows() -> None:
    x = torch.ones(2000, 64)
    out = dropout_ref(x, some(2000, share=0.25)._replace(place=torch.arange(2000)))
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert torch.equal(out[out != 0].unique(), torch.tensor([1 / 0.75]))
    assert float(out.mean()) == pytest.approx(1, abs=0.01)


def test_seed_epoch_sample_site_and_place_each_change_the_draws() -> None:
    base = some(40)
    others = [
        some(40, seed=SIGNED + 1),
        some(40, seed=SIGNED + (1 << 32)),
        base._replace(use=base.use + 1),
        base._replace(uid=base.uid + 1),
        base._replace(uid=base.uid + (1 << 32)),
        base._replace(place=base.place + 1),
        beyond(base, 1),
    ]
    masks = [kept(each, 32) for each in (base, *others) if each is not None]
    for number, mask in enumerate(masks):
        assert torch.equal(mask, masks[0]) == (number == 0)
        agree = float((mask == masks[0]).float().mean())
        # Draws that do not hang together: 0.3^2 + 0.7^2.
        assert number == 0 or agree == pytest.approx(0.58, abs=0.06)


def test_the_gradient_is_that_of_the_function() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout_ref(x, some(7)), [x])


def test_a_share_that_leaves_nothing_or_is_none_is_refused_with_the_cure() -> None:
    for share in (1.0, -0.1, float("nan")):
        for keys in (test_mlim.TINY, test_maskvlm.TINY):
            with pytest.raises(ValueError, match=r"model\.dropout .* give a number"):
                dataclasses.replace(keys, dropout=share)  # type: ignore[type-var]


def test_more_sites_than_the_generator_numbers_are_refused_with_the_cure() -> None:
    assert MlimConfig(layers=95, itm_weight=0.0, dropout=0.1).dropout_stack.sites == 191
    with pytest.raises(ValueError, match=f"193 sites .* {SITES}: .*model.layers"):
        MlimConfig(layers=96, dropout=0.1)
    # The paper's size has room.
    paper = MaskVlmConfig(image_layers=12, text_layers=12, dropout=0.1)
    last = paper.dropout_stacks["mim_decoder"]
    assert last.first + last.sites == 178
    with pytest.raises(ValueError, match=r"model\.image_layers"):
        MaskVlmConfig(image_layers=24, text_layers=12, dropout=0.1)
    # Without dropout there are none to number.
    MlimConfig(layers=96)


# --- models --------------------------------------------------------------------------


class MaskVlmPairs(test_maskvlm.Pairs):
    """The pairs of its test, with what their dropout follows from."""

    def micro(
        self, config: MaskVlmConfig, first: int = 0, count: int | None = None
    ) -> tuple[Inputs, Masks]:
        """As there."""
        inputs, masks = super().micro(config, first, count)
        rows = slice(first, first + inputs.stream.pairs)
        return inputs._replace(draws=Draws(SEED, EPOCHS[rows], self.uids[rows])), masks


def mlim_micro(pairs: list[int]) -> tuple[Inputs, Masks]:
    """A micro-batch of some pairs, in this order."""
    whole, masks = test_mlim.batch(LENGTHS)
    parts = [test_mlim.one(whole, masks, pair) for pair in pairs]
    stream = test_mlim.lay_out(np.array([LENGTHS[pair] for pair in pairs]), 16)
    ids = torch.zeros(len(stream.text_pair), dtype=torch.int64)
    used = [own.token_ids[: own.stream.text_used] for own, _ in parts]
    ids[: stream.text_used] = torch.cat(used)
    words = int(masks.text[pairs].sum())
    inputs = Inputs(
        stream=stream,
        token_ids=ids,
        pixels=whole.pixels[pairs],
        n_masked_words=words,
        n_recon_images=len(pairs),
        draws=Draws(SEED, EPOCHS[pairs], UIDS[pairs]),
    )
    return inputs, Masks(
        mode=masks.mode[pairs], text=masks.text[pairs], image=masks.image[pairs]
    )


def mlim_step(
    model: nn.Module, micros: list[tuple[Inputs, Masks]]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a step."""
    model.zero_grad()
    losses = [model(*micro).total for micro in micros]
    torch.stack(losses).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack(losses).sum().detach(), gradients


SPLITS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[3, 1, 2, 0], [4, 5, 7, 6]],
    [[0, 1], [6, 7], [2, 3], [4, 5]],
]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_mlim_takes_the_same_step_however_pairs_are_split_and_ordered(
    norm: Any,
) -> None:
    model = test_mlim.build(dataclasses.replace(MLIM, norm=norm))
    steps, drawn = [], []
    for split in SPLITS:
        with recorded() as found:
            steps.append(mlim_step(model, [mlim_micro(pairs) for pairs in split]))
        drawn.append(by_row(found))
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=1e-4, atol=1e-4)
    for rows in drawn[1:]:
        both = rows.keys() & drawn[0].keys()
        assert len(both) > 0.8 * len(drawn[0])
        assert all(rows[key] == drawn[0][key] for key in both)
    plain = test_mlim.build(dataclasses.replace(MLIM, norm=norm, dropout=0.0))
    assert not torch.isclose(
        mlim_step(plain, [mlim_micro(SPLITS[0][0])])[0], steps[0][0]
    )


def test_maskvlm_takes_the_same_step_however_pairs_are_split() -> None:
    """ITC among all pairs included: features that are made twice are made alike."""
    model = test_maskvlm.build(MASKVLM)
    pairs = MaskVlmPairs(LENGTHS)
    whole, whole_gradients, _ = step(model, pairs, 8)
    parts, gradients, _ = step(model, pairs, 4)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, whole_gradients, rtol=1e-3, atol=1e-4)
    plain, _, _ = step(test_maskvlm.build(), pairs, 8)
    for name, loss in plain.losses.items():
        assert not torch.isclose(loss, whole.losses[name])


def test_every_pass_of_every_layer_has_draws_of_its_own() -> None:
    # Texts of one length: no rows are left over, which would be counted like others.
    pairs = MaskVlmPairs([8] * 8)
    model = test_maskvlm.build(MASKVLM)
    inputs, masks = pairs.micro(MASKVLM)
    with recorded() as found:
        model(inputs._replace(contrast=test_maskvlm.ALONE), masks)
    rows = [len(drop.place) for drop, _ in found]
    assert len(by_row(found)) == sum(rows)
    stacks = MASKVLM.dropout_stacks
    uses = {int(use) >> 24 for drop, _ in found for use in drop.use}
    last = stacks["mim_decoder"]
    assert uses == {Use.DROPOUT + n for n in range(last.first + last.sites)}

    itm = dataclasses.replace(MLIM, itm_weight=1.0)
    inputs, masks = mlim_micro(SPLITS[0][0])
    with recorded() as found:
        test_mlim.build(itm)(inputs._replace(matching=test_mlim.matching(8)), masks)
    uses = {int(use) >> 24 for drop, _ in found for use in drop.use}
    assert uses == {Use.DROPOUT + n for n in range(2 * itm.dropout_stack.sites)}


def models() -> list[tuple[nn.Module, tuple[Inputs, Masks]]]:
    """Both, with a micro-batch each."""
    pairs = MaskVlmPairs(LENGTHS).micro(MASKVLM)
    return [
        (test_mlim.build(MLIM), mlim_micro(SPLITS[0][0])),
        (test_maskvlm.build(MASKVLM), pairs),
    ]


def test_nothing_is_dropped_in_evaluation_or_without_draws() -> None:
    for model, (inputs, masks) in models():
        none = inputs._replace(draws=None)
        with torch.no_grad():
            dropping = model(inputs, masks)
            without = model(none, masks)
            model.eval()
            evaluated = model(inputs, masks)
        torch.testing.assert_close(evaluated.losses, without.losses, rtol=0, atol=0)
        assert not torch.isclose(dropping.total, without.total)


def test_activations_that_are_computed_again_are_the_same() -> None:
    for model, micro in models():
        kept_whole = mlim_step(model, [micro])
        model.recompute = True
        torch.testing.assert_close(
            mlim_step(model, [micro]), kept_whole, rtol=0, atol=0
        )


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_share_of_0_adds_no_operator() -> None:
    for model, (inputs, masks) in models():
        counts = []
        for share, draws in ((0.0, None), (0.0, inputs.draws), (SHARE, inputs.draws)):
            model.config = dataclasses.replace(model.config, dropout=share)  # type: ignore[arg-type, type-var]
            model.zero_grad()
            with Operators() as ran:
                model(inputs._replace(draws=draws), masks).total.backward()
            counts.append(ran.names)
        assert counts[0] == counts[1]
        assert len(counts[2]) > len(counts[0])


def test_compiled_layers_drop_the_same() -> None:
    deep = dataclasses.replace(MLIM, layers=3)
    plain, compiled = test_mlim.build(deep), test_mlim.build(deep)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Not the embedder and the decoder, whose code would be counted too.
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    micros = [mlim_micro(SPLITS[0][0])]
    torch.testing.assert_close(
        mlim_step(compiled, micros), mlim_step(plain, micros), rtol=1e-4, atol=1e-4
    )
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Layers of all rows share their code: a site's number is in a tensor.
    assert 0 < counters["frames"]["ok"] <= 2


def test_no_value_is_read_on_the_host() -> None:
    """On the meta device there are none."""
    away = torch.device("meta")
    drop = some(9)
    moved = Dropout(drop.share, drop.seed, *(each.to(away) for each in drop[2:]))
    assert dropped(torch.zeros(9, 6, device=away), moved).shape == (9, 6)
    inputs, _ = mlim_micro([0, 1])
    assert inputs.draws is not None
    draws = Draws(SEED, *(each.to(away) for each in inputs.draws[1:]))
    rows = MLIM.dropout_stack.rows(SHARE, draws, inputs.stream.to(away))
    assert rows.seed == SIGNED
    assert len(rows.place) == len(inputs.stream.source)


def test_memory_is_measured_with_dropout_and_is_that_without() -> None:
    """Of numbers: masks of bools are kept on CPUs alone."""
    shapes = Shapes(pairs=4, rows=100, table=0, masked_words=8, recon_images=4)
    sizes = Sizes(50, {"mask": 4}, 20, test_maskvlm.SIZE)
    with recorded() as found:
        dropping = MASKVLM.activations(shapes, sizes=sizes, bf16=True)
    assert found
    plain = test_maskvlm.TINY.activations(shapes, sizes=sizes, bf16=True)
    assert dropping.blocks == plain.blocks


# --- runs ----------------------------------------------------------------------------

STEPS = 4


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`; `again`, that stopped on the way; `split`, with other micro-batches and
    activations computed again; `none` is the first step without dropout.
    """
    folder = tmp_path_factory.mktemp("dropout")

    def call(name: str, *words: str) -> list[str]:
        where = (f"--data={shards}", f"--output={folder / name}")
        often = ("--checkpoint.every_steps=2", "--eval.every_steps=0")
        keys = (f"--model.dropout={SHARE}", "--micro_batch=12", f"--max_steps={STEPS}")
        return [*where, *often, *keys, *words]

    again = "--deepspeed.activation_checkpointing=true"
    calls = [
        call("whole"),
        *(call("again", "--max_steps=2"), call("again")),
        call("split", "--micro_batch=6", again),
        call("none", "--model.dropout=0", "--max_steps=1"),
    ]
    launch_all(2, calls, folder / "calls.json")
    return folder


def losses(run: Path, steps: int = STEPS) -> list[float]:
    """Losses and gradient norms of the first steps."""
    names = ("mlm_loss", "recon_loss", "grad_norm")
    return [value for name in names for value in column(run, name)[:steps]]


def test_a_run_with_dropout_resumes_bitwise(runs: Path) -> None:
    assert len(losses(runs / "whole")) == 3 * STEPS
    assert losses(runs / "again") == losses(runs / "whole")


def test_a_run_with_dropout_takes_the_same_steps_however_it_is_split(
    runs: Path,
) -> None:
    found = losses(runs / "split")
    assert found == pytest.approx(losses(runs / "whole"), rel=2e-4)
    none = losses(runs / "none")
    assert none != pytest.approx(losses(runs / "whole", steps=1), rel=2e-3)
