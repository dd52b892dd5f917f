from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

from trainer.kernels import layer_norm
from trainer.kernels.case import Case
from trainer.kernels.dropout import kept
from trainer.kernels.layer_norm import CASES, add_layer_norm, add_layer_norm_ref
from trainer.kernels.layer_norm import add_layer_norm_fused as fused
from trainer.models.dense import Unbiased
from trainer.models.layers import ResidualNorm

CPU = torch.device("cpu")
SMALL = [case for case in CASES if case.small]
EPS = 1e-12


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, as cases count it."""
    assert found.isfinite().all()
    distance = (found.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(distance)


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    given: tuple[Any, ...],
    *,
    seed: int = 1,
    used: str = "both",
) -> list[Tensor]:
    """Both outputs, and gradients of all tensors under fixed ones of `used`."""
    given = tuple(
        part.detach().clone().requires_grad_() if isinstance(part, Tensor) else part
        for part in given
    )
    leaves = [part for part in given if isinstance(part, Tensor)]
    total, normed = function(*given)
    draw = torch.Generator().manual_seed(seed)
    ups = [torch.randn(total.shape, generator=draw).to(total.dtype) for _ in range(2)]
    chosen = {"both": (total, normed), "normed": (normed,), "total": (total,)}[used]
    ups = {"both": ups, "normed": ups[1:], "total": ups[:1]}[used]
    gradients = torch.autograd.grad(chosen, leaves, ups, allow_unused=True)
    return [total.detach(), normed.detach(), *(g for g in gradients if g is not None)]


def detached(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same without gradients."""
    return tuple(part.detach() if isinstance(part, Tensor) else part for part in given)


def exact(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in fp64."""
    return tuple(
        part.double() if isinstance(part, Tensor) else part for part in detached(given)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kernel} {case.shape}")
def test_the_kernel_is_its_reference_within_the_stated_tolerance(
    case: Case, dtype: torch.dtype
) -> None:
    given = case.inputs(CPU, dtype, 0)
    # Triton's interpreter cuts off to 16 bits what a GPU rounds.
    tolerance = case.tolerances[dtype] * (1 + (dtype == torch.bfloat16))
    for used in ("both", "normed", "total"):
        found = outputs_and_gradients(case.fused, given, used=used)
        expected = outputs_and_gradients(case.reference, exact(given), used=used)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            assert error(one, other) < tolerance


def test_the_sum_alone_has_the_gradient_of_a_sum() -> None:
    given = SMALL[0].inputs(CPU, torch.float32, 0)
    found = outputs_and_gradients(fused, given, used="total")
    expected = outputs_and_gradients(add_layer_norm_ref, given, used="total")
    assert len(found) == len(expected) == 4
    del found[1], expected[1]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_rows_need_not_lie_side_by_side() -> None:
    x, residual = torch.randn(2, 48, 40).unbind(0)
    weight, bias = torch.randn(40, 2).unbind(1)
    spread = (x.T.contiguous().T, residual[:, ::1].T.contiguous().T, weight, bias, EPS)
    assert not spread[0].is_contiguous()
    assert not weight.is_contiguous()
    found = outputs_and_gradients(fused, spread)
    expected = outputs_and_gradients(add_layer_norm_ref, exact(spread))
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 2e-6
    # The gradient that comes in need not either.
    leaves = [part.clone().requires_grad_() for part in spread[:4]]
    up = torch.randn(40, 48).T
    gradient = torch.autograd.grad(fused(*leaves, EPS)[1], leaves[0], up)[0]
    wide = [part.double().requires_grad_() for part in spread[:4]]
    other = torch.autograd.grad(
        add_layer_norm_ref(*wide, EPS)[1], wide[0], up.double()
    )[0]
    assert error(gradient, other) < 2e-6


def test_no_rows_have_gradients_of_zero() -> None:
    vector = torch.ones(8)
    given = (*torch.ones(2, 0, 8).unbind(0), vector, vector, EPS, vector)
    found = outputs_and_gradients(fused, given)
    assert [tuple(part.shape) for part in found] == [(0, 8)] * 4 + [(8,)] * 3
    assert not any(each.any() for each in found[4:])


def test_the_same_inputs_give_the_same_bits() -> None:
    given = CASES[2].inputs(CPU, torch.float32, 0)
    first, second = (outputs_and_gradients(fused, given) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_more_rows_than_programs_are_all_counted(
    monkeypatch: pytest.MonkeyPatch, drops: bool, biased: bool
) -> None:
    monkeypatch.setattr(layer_norm, "_PROGRAMS", 4)
    case = layer_norm._case(11, 16, drops=drops, biased=biased)
    given = case.inputs(CPU, torch.float32, 0)
    found = outputs_and_gradients(case.fused, given)
    expected = outputs_and_gradients(case.reference, exact(given))
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 2e-6


def test_the_reference_has_its_own_gradient() -> None:
    case = layer_norm._case(3, 5, biased=True)
    given = exact(case.inputs(CPU, torch.float32, 0))
    leaves = [part.requires_grad_() for part in given if isinstance(part, Tensor)]
    assert torch.autograd.gradcheck(
        lambda *tensors: add_layer_norm_ref(*tensors[:4], 1e-6, tensors[4]), leaves
    )


@pytest.mark.parametrize("biased", [False, True])
def test_the_operators_are_registered_as_torch_wants_them(biased: bool) -> None:
    given = layer_norm._case(3, 20, biased=biased).inputs(CPU, torch.float32, 0)
    given = given if biased else (*given, None)
    library.opcheck(layer_norm._forward, given)
    plain = detached(given)
    total, normed, mean, rstd = layer_norm._forward(*plain)
    for d_total in (None, total):
        library.opcheck(
            layer_norm._backward, (normed, d_total, total, mean, rstd, plain[2], biased)
        )


@pytest.mark.parametrize("drops", [False, True])
def test_a_bias_of_the_branch_is_as_if_the_branch_had_it(drops: bool) -> None:
    case = layer_norm._case(7, 24, drops=drops, biased=True)
    *given, bias = case.inputs(CPU, torch.float32, 0)
    found = outputs_and_gradients(case.fused, (*given, bias))
    given[1] = given[1] + bias
    expected = outputs_and_gradients(case.fused, tuple(given))
    for one, other in zip(found, expected, strict=False):
        assert error(one, other.double()) < 2e-6
    assert error(found[-1], expected[3].double().sum(0)) < 2e-6


def test_a_bias_that_is_frozen_is_not_summed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    launch = layer_norm.sum_parts

    def counted(parts: Tensor, dtype: torch.dtype) -> Tensor:
        asked.append(len(parts))
        return launch(parts, dtype)

    monkeypatch.setattr(layer_norm, "sum_parts", counted)
    *given, bias = layer_norm._case(3, 20, biased=True).inputs(CPU, torch.float32, 0)
    for wanted in (True, False):
        fused(*given, bias.detach().requires_grad_(wanted))[1].sum().backward()
    assert asked == [3, 2]


@pytest.mark.parametrize("drops", [False, True])
def test_a_gradient_that_is_given_is_not_handed_on(drops: bool) -> None:
    """What adds to the gradient of `x` in place must not reach the caller's."""
    case = layer_norm._case(3, 20, drops=drops, biased=True)
    given = case.inputs(CPU, torch.float32, 0)
    ups = torch.randn(2, 3, 20)
    for used in (slice(0, 1), slice(1, 2), slice(0, 2)):
        outputs = case.fused(*given)[used]
        (d_x,) = torch.autograd.grad(outputs, given[:1], [*ups[used]])
        kept_ups = ups.clone()
        d_x.zero_()
        assert torch.equal(ups, kept_ups)


def test_a_cpu_uses_the_reference() -> None:
    given = SMALL[0].inputs(CPU, torch.float32, 0)
    found = outputs_and_gradients(add_layer_norm, given)
    expected = outputs_and_gradients(add_layer_norm_ref, given)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def dropping(rows: int, width: int, *, biased: bool = False) -> tuple[Any, ...]:
    """Arguments of the kernels with dropout."""
    case = layer_norm._case(rows, width, drops=True, biased=biased)
    return case.inputs(CPU, torch.float32, 0)


def test_dropped_channels_are_those_of_the_reference_bit_for_bit() -> None:
    given = dropping(9, 21)
    drop = given[5]._replace(share=0.4)
    branch = torch.ones(9, 21, requires_grad=True)
    x, weight = torch.zeros(9, 21), torch.ones(21)
    total, normed = layer_norm.dropout_add_layer_norm_fused(
        x, branch, weight, weight, EPS, drop
    )
    stays = kept(drop, 21)
    assert 0 < int(stays.sum()) < stays.numel()
    assert torch.equal(total != 0, stays)
    for output in (total, normed):
        up = torch.randn(9, 21)
        (gradient,) = torch.autograd.grad(output, branch, up, retain_graph=True)
        assert torch.equal(gradient != 0, stays)


def test_a_sum_with_dropout_alone_has_its_gradient() -> None:
    given = dropping(4, 12)
    functions = (
        layer_norm.dropout_add_layer_norm_fused,
        layer_norm.dropout_add_layer_norm_ref,
    )
    for used in ("total", "normed"):
        found, expected = (
            outputs_and_gradients(each, given, used=used) for each in functions
        )
        torch.testing.assert_close(found, expected)


def test_a_share_of_0_is_the_kernel_without_dropout() -> None:
    given = dropping(6, 40)
    none = (*given[:5], given[5]._replace(share=0.0))
    found = outputs_and_gradients(layer_norm.dropout_add_layer_norm_fused, none)
    expected = outputs_and_gradients(fused, given[:5])
    # And so the gradient of the branch is that of the stream.
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("biased", [False, True])
def test_the_operators_with_dropout_are_registered_as_torch_wants_them(
    biased: bool,
) -> None:
    *given, drop, bias = (*dropping(3, 20, biased=biased), None)[:7]
    drawn = (*drop[2:], drop.share, 5)
    library.opcheck(layer_norm._forward_dropping, (*given, bias, *drawn))
    plain = detached((*given, bias))
    total, normed, mean, rstd = layer_norm._forward_dropping(*plain, *drawn)
    kept_for_it = (total, mean, rstd, plain[2], *drawn, biased)
    for d_total in (None, total):
        library.opcheck(layer_norm._backward_dropping, (normed, d_total, *kept_for_it))


def test_a_layer_adds_and_norms_as_the_kernel_does() -> None:
    norm = ResidualNorm(24, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, branch = torch.randn(2, 7, 24)
    given = (x, branch, norm.weight, norm.bias, norm.eps)
    drop = dropping(7, 24)[5]
    for bias in (None, torch.randn(24)):
        unbiased = Unbiased(branch, bias)
        found = fused(*given, bias)
        for one, other in zip(found, norm(x, unbiased), strict=True):
            torch.testing.assert_close(one, other)
        found = layer_norm.dropout_add_layer_norm_fused(*given, drop, bias)
        for one, other in zip(found, norm(x, unbiased, drop), strict=True):
            torch.testing.assert_close(one, other)
