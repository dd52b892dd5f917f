"""Branches whose gradients are added in place are those of plain autograd."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import variants
from benchmarks.gpu.record import Setting
from tests.trainer.kernels.numbers import interpreted
from trainer.dropout import Dropout
from trainer.kernels import attention, bias_gelu, layer_norm, take_rows
from trainer.kernels.dropout import rows_drawn
from trainer.models import dense, layers
from trainer.models.layers import Block, CrossBlock, Keys
from trainer.models.residual import linear_beside
from trainer.models.scored_rows import Rows, keep
from trainer.models.segments import Segments, of_images

CPU = torch.device("cpu")
PAIRS, LONG, WIDTH = 2, 4, 32
APART = ("residual gradients added apart", "bias sums apart")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has layers take the kernels on a CPU from its call on, as they do on CUDA."""

    def take() -> None:
        monkeypatch.setattr(dense, "fuses", lambda x: True)
        monkeypatch.setattr(dense, "bias_gelu", bias_gelu.bias_gelu_fused)
        norms = ("add_layer_norm", "dropout_add_layer_norm")
        for name in norms:
            monkeypatch.setattr(layers, name, getattr(layer_norm, f"{name}_fused"))
        monkeypatch.setattr(layers, "take_rows", take_rows.take_rows_fused)
        packed = attention.attention_packed_fused
        monkeypatch.setattr(attention, "attention_packed", packed)
        monkeypatch.setattr(layers, "sums_bias", lambda *_: True)

    return take


class Two(nn.Module):
    """Two blocks, one after the other, the second of some rows."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        sizes = {"width": WIDTH, "heads": 2, "ffn_width": 36}
        self.blocks = nn.ModuleList(
            Block(**sizes, norm=norm, eps=1e-5) for _ in range(2)
        )

    def forward(
        self, x_td: Tensor, rows: Rows | None = None, drop: Dropout | None = None
    ) -> Tensor:
        first, second = self.blocks
        x_td = first(x_td, stream(), None, drop)
        return second(x_td, stream(), rows, drop)


def stream() -> Segments:
    """Of segments as long as one another: PAIRS * LONG rows."""
    return of_images(PAIRS, LONG, CPU)


def some_rows() -> Rows:
    """Every other row."""
    needed = torch.arange(PAIRS * LONG) % 2 == 0
    found = keep(needed, int(needed.sum()), stream())
    assert found is not None
    return found


def drawn(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights every time, none of them 0."""
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        value = 0.3 * torch.randn(weight.shape, generator=draw)
        weight.data = value + ("norm.weight" in name)
    return model.to(dtype)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows (T, D), and the gradient of a result of as many."""
    draw = torch.Generator().manual_seed(1)
    x, up = torch.randn(2, PAIRS * LONG, WIDTH, generator=draw)
    return x.to(dtype).requires_grad_(), up.to(dtype)


def step(model: nn.Module, x: Tensor, up: Tensor, *rest: Any) -> list[Tensor]:
    """The result, and the gradients of `x` and all weights that ask for one."""
    wanting = [each for each in (x, *model.parameters()) if each.requires_grad]
    result = model(x, *rest)
    found = torch.autograd.grad(result, wanting, up[: len(result)])
    return [result.detach(), *found]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative, of each."""
    assert len(found) == len(wanted)
    return [
        float((one.double() - other.double()).norm() / other.double().norm())
        for one, other in zip(found, wanted, strict=True)
    ]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(map(torch.equal, found, wanted))


def variant(name: str) -> Any:
    (found,) = (
        one for one in variants.variants(Setting(device=CPU)) if one.name == name
    )
    return found


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("last", ["whole", "some rows"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_are_those_of_the_plain_layers_in_fp64(
    fused: Callable[[], None],
    norm: str,
    last: str,
    drops: bool,
    dtype: torch.dtype,
) -> None:
    rest = (
        None if last == "whole" else some_rows(),
        rows_drawn(PAIRS * LONG, CPU, 2) if drops else None,
    )
    x, up = given(dtype)
    model = drawn(Two(norm), dtype)
    wide = (x.detach().double().requires_grad_(), up.double())
    exact = step(copy.deepcopy(model).double(), *wide, *rest)
    plain = step(model, x, up, *rest)
    fused()
    found = step(model, x, up, *rest)
    assert all(each.dtype == dtype for each in found)
    # Triton's interpreter cuts off to 16 bits what a GPU rounds.
    slack, least = {torch.float32: (3, 1e-6), torch.bfloat16: (3, 1e-2)}[dtype]
    for ours, theirs in zip(errors(found, exact), errors(plain, exact), strict=True):
        assert ours < slack * theirs + least


@interpreted
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", APART)
def test_each_can_be_taken_away_and_gradients_stay(
    fused: Callable[[], None], name: str, drops: bool
) -> None:
    rest = (some_rows(), rows_drawn(PAIRS * LONG, CPU, 2) if drops else None)
    model, (x, up) = drawn(Two("post")), given()
    fused()
    found = step(model, x, up, *rest)
    calls = variants.Calls()
    with variant(name).entered(calls):
        apart = step(model, x, up, *rest)
    assert calls.count == (4 if name == APART[0] else 5)
    assert max(errors(found, apart)) < 2e-6
    assert equal(step(model, x, up, *rest), found)


class Operators(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.ran[str(func)] += 1
        return func(*args, **(kwargs or {}))


@interpreted
def test_no_gradients_are_added_apart_and_no_branch_is_read_again_for_its_bias(
    fused: Callable[[], None],
) -> None:
    model, (x, up) = drawn(Two("post")), given()
    fused()
    with Operators() as counted:
        step(model, x, up)
    assert counted.ran["aten.addmm_.default"] == 4
    assert not any(name.startswith("aten.add") for name in apart_from_it(counted))
    assert not counted.ran["aten.sum.dim_IntList"]
    for name in APART:
        with variant(name).entered(variants.Calls()), Operators() as counted:
            step(model, x, up)
        sums = counted.ran["aten.sum.dim_IntList"]
        added = any(name.startswith("aten.add.") for name in counted.ran)
        assert (added, sums) == ((True, 0) if name == APART[0] else (False, 6))


def apart_from_it(counted: Operators) -> list[str]:
    """Operators other than the product that is added in place, and than that of a
    layer's bias.
    """
    own = ("aten.addmm_.default", "aten.addmm.default")
    return [name for name in counted.ran if name not in own]


@interpreted
@pytest.mark.parametrize("drops", [False, True])
def test_layers_that_are_computed_again_have_the_same_gradients(
    fused: Callable[[], None], drops: bool
) -> None:
    drop = rows_drawn(PAIRS * LONG, CPU, 2) if drops else None
    rest = (some_rows(), drop)
    model, (x, up) = drawn(Two("post")), given()
    fused()
    found = step(model, x, up, *rest)

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x_td: Tensor, rows: Rows, drop: Dropout | None) -> Tensor:
            first, second = model.blocks
            x_td = checkpoint(first, x_td, stream(), None, drop, use_reentrant=False)
            return checkpoint(second, x_td, stream(), rows, drop, use_reentrant=False)

    assert equal(step(Again(), x, up, *rest), found)


@interpreted
def test_a_graph_may_be_gone_through_twice(fused: Callable[[], None]) -> None:
    model, (x, up) = drawn(Two("post")), given()
    wanting = (x, *model.parameters())
    fused()
    kept = up.clone()
    result = model(x)
    first = torch.autograd.grad(result, wanting, up, retain_graph=True)
    first_bits = [each.clone() for each in first]
    second = torch.autograd.grad(result, wanting, up)
    assert equal([*second], first_bits)
    # Nor does the second pass write where the first one's gradients lie.
    assert equal([*first], first_bits)
    assert torch.equal(up, kept)


@interpreted
def test_a_gradient_is_not_differentiated(fused: Callable[[], None]) -> None:
    model, (x, up) = drawn(Two("post")), given()
    fused()
    (gradient,) = torch.autograd.grad(model(x), x, up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@interpreted
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "all weights"])
def test_what_is_frozen_has_no_gradient_and_the_others_have_theirs(
    fused: Callable[[], None], frozen: str
) -> None:
    model, (x, up) = drawn(Two("post")), given()
    x.requires_grad_(frozen != "x")
    for name, weight in model.named_parameters():
        weight.requires_grad_(frozen != "all weights" and not name.endswith(frozen))
    wanted = step(model, x, up)
    fused()
    assert max(errors(step(model, x, up), wanted)) < 1e-5


@interpreted
def test_a_block_across_modalities_has_the_gradients_of_plain_layers(
    fused: Callable[[], None],
) -> None:
    block = CrossBlock(
        width=WIDTH, heads=2, ffn_width=36, eps=1e-5, self_attention=True
    )
    model, (x, up) = drawn(block), given()
    keys = Keys(torch.arange(PAIRS * LONG), stream())
    other = torch.randn(PAIRS * LONG, WIDTH)
    rest = (other, stream(), keys, some_rows())
    wanted = step(model, x, up, *rest)
    fused()
    with Operators() as counted:
        found = step(model, x, up, *rest)
    assert max(errors(found, wanted)) < 1e-5
    # A residual that is read again goes on: nothing may be added to its gradient.
    assert not counted.ran["aten.addmm_.default"]


@pytest.mark.parametrize("read", ["both", "product", "passed", "neither"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_product_and_what_it_passes_on_have_the_gradients_of_torch(
    rows: int, read: str
) -> None:
    leaves = [torch.randn(rows, 6), torch.randn(4, 6), torch.randn(4)]
    leaves = [each.double().requires_grad_() for each in leaves]
    ups = torch.randn(rows, 4).double(), torch.randn(rows, 6).double()
    chosen = {"both": [0, 1], "product": [0], "passed": [1], "neither": []}[read]

    def loss(product: Tensor, passed: Tensor) -> Tensor:
        parts = [(product * ups[0]).sum(), (passed * ups[1]).sum()]
        return sum((parts[each] for each in chosen), torch.zeros(()))

    found, wanted = (
        loss(*outputs)
        for outputs in (
            linear_beside(*leaves),
            (nn.functional.linear(*leaves), leaves[0]),
        )
    )
    assert found.requires_grad == wanted.requires_grad == bool(chosen)
    if chosen:
        ours, theirs = (
            torch.autograd.grad(each, leaves, allow_unused=True)
            for each in (found, wanted)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_layers_are_as_they_were() -> None:
    block, (x, _) = drawn(Two("post")).blocks[0], given()
    product, passed = block.up.beside(x)
    assert passed is x
    assert torch.equal(product, block.up(x))
    assert block.attention.beside(x, stream(), None)[1] is x
    table, bias = block.down.unbiased(product)
    assert bias is None
    assert torch.equal(table, block.down(product))


def test_a_bias_is_attentions_only_where_our_kernel_is_what_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.empty(PAIRS * LONG, WIDTH, dtype=torch.bfloat16)
    assert not layers.sums_bias(x, stream(), 16)
    monkeypatch.setattr(layers, "fuses", lambda x: True)
    assert layers.sums_bias(x, stream(), 16)
    assert not layers.sums_bias(x.float(), stream(), 16)
    assert not layers.sums_bias(x, stream(), 10)
    assert not layers.sums_bias(x, of_images(1, layers.SHORT + 1, CPU), 16)
    with variant("FlashAttention").entered(variants.Calls()):
        assert not layers.sums_bias(x, stream(), 16)
