from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from tests.trainer.kernels.against_reference import check, close, outputs_and_gradients
from trainer.kernels import cross_entropy
from trainer.kernels.case import Case
from trainer.kernels.cross_entropy import (
    CASES,
    masked_cross_entropy,
    masked_cross_entropy_fused,
    reference,
)

SMALL = [case for case in CASES if case.small]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-3},
}


def drawn(
    rows: int, n_words: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, n_words, generator=generator)
    target = torch.randint(n_words, (rows,), generator=generator)
    valid = torch.rand(rows, generator=generator) < 0.7
    return logits.to(dtype).requires_grad_(), target, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kernel} {case.shape}")
def test_kernel_is_its_reference_in_fp64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    logits, target, valid = drawn(23, 150, dtype)
    exact = logits.detach().double().requires_grad_()
    found, wanted = (
        outputs_and_gradients(
            lambda x, f=function: f(x, target, valid, **OPTIONS[name]), [each]
        )
        for function, each in (
            (masked_cross_entropy_fused, logits),
            (reference, exact),
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs, CASES[0].tolerances[dtype])


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_the_reference_is_right(name: str) -> None:
    logits, target, valid = drawn(5, 11)
    assert torch.autograd.gradcheck(
        lambda x: reference(x, target, valid, **OPTIONS[name])[0],
        (logits.detach().double().requires_grad_(),),
    )


def test_the_reference_is_the_plain_loss_bit_for_bit() -> None:
    """It is what trains on a CPU."""
    logits, target, valid = drawn(40, 77)
    loss, correct = masked_cross_entropy(logits, target, valid)
    plain = F.cross_entropy(logits.float(), target, reduction="none") * valid
    assert torch.equal(loss, plain)
    assert torch.equal(correct, (logits.argmax(1) == target) & valid)
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [0, 1, 13])
def test_rows_beyond_the_count_give_nothing_and_are_not_read(count: int) -> None:
    logits, target, _ = drawn(13, 50)
    valid = torch.arange(13) < count
    with torch.no_grad():
        logits[count:] = torch.nan
        target[count:] = -100
    loss, correct = masked_cross_entropy_fused(logits, target, valid)
    loss.sum().backward()
    assert torch.equal(loss[count:], torch.zeros(13 - count))
    assert not correct[count:].any()
    assert torch.equal(logits.grad[count:], torch.zeros(13 - count, 50))
    assert (loss[:count] > 0).all()
    assert (logits.grad[:count] != 0).all()


def test_one_row_of_one_word_is_certain() -> None:
    logits = torch.full((1, 1), 3.0, requires_grad=True)
    loss, correct = masked_cross_entropy_fused(
        logits, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    )
    loss.sum().backward()
    assert loss.tolist() == [0]
    assert correct.tolist() == [True]
    assert logits.grad.tolist() == [[0]]


def test_of_equally_likely_words_the_first_is_chosen() -> None:
    """In bf16 they are common."""
    logits = torch.zeros(3, 9)
    logits[:, [2, 5]] = 1
    target = torch.tensor([2, 5, 0])
    _, correct = masked_cross_entropy_fused(
        logits, target, torch.ones(3, dtype=torch.bool)
    )
    assert correct.tolist() == [True, False, False]


def test_logits_of_any_strides_are_read() -> None:
    logits, target, valid = drawn(12, 30)
    wanted = outputs_and_gradients(reference, (logits, target, valid))
    wide = torch.full((24, 60), torch.nan)
    for view in (wide[::2, ::2], wide.view(60, 24).T[:12, :30], wide[3:15, 5:35]):
        view.copy_(logits.detach())
        strided = (view.detach().requires_grad_(), target, valid)
        found = outputs_and_gradients(masked_cross_entropy_fused, strided)
        for ours, theirs in zip(found, wanted, strict=True):
            close(ours, theirs, 1e-5)


def test_strided_targets_and_masks_are_read() -> None:
    logits, target, valid = drawn(12, 30)
    wanted = reference(logits, target, valid)
    target = torch.stack([target, target + 1], 1)[:, 0]
    valid = torch.stack([valid, ~valid], 1)[:, 0]
    found = masked_cross_entropy_fused(logits, target, valid)
    close(found[0], wanted[0], 1e-5)
    assert torch.equal(found[1], wanted[1])


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    leaf, target, valid = drawn(8, 20)
    logits = 2 * leaf
    before = logits.detach().clone()
    loss, _ = masked_cross_entropy_fused(logits, target, valid)
    assert torch.equal(logits, before)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert slope.data_ptr() == logits.data_ptr()
    before.requires_grad_()
    plain, _ = reference(before, target, valid)
    close(slope, *torch.autograd.grad(plain.sum(), before), 1e-5)


def test_a_leaf_keeps_its_values() -> None:
    leaf, target, valid = drawn(8, 20)
    before = leaf.detach().clone()
    masked_cross_entropy_fused(leaf, target, valid)[0].sum().backward()
    assert torch.equal(leaf, before)


def test_logits_that_are_needed_twice_are_an_error_never_a_wrong_number() -> None:
    leaf, target, valid = drawn(8, 20)
    loss = masked_cross_entropy_fused(2 * leaf, target, valid)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # An operation that keeps the logits for a backward pass that comes after ours.
    logits = 2 * leaf
    kept = logits.square().sum()
    loss = masked_cross_entropy_fused(logits, target, valid)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_logits_that_changed_since_the_loss_are_an_error() -> None:
    leaf, target, valid = drawn(8, 20)
    logits = 2 * leaf
    loss = masked_cross_entropy_fused(logits, target, valid)[0].sum()
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_it_is_the_same() -> None:
    case = next(case for case in SMALL if "head" in case.kernel)
    wanted, found = (
        outputs_and_gradients(
            function, case.inputs(torch.device("cpu"), torch.float32, 0)
        )
        for function in (
            case.reference,
            torch.compile(case.fused, backend="aot_eager", fullgraph=True),
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_torchs_contract(dtype: torch.dtype) -> None:
    logits, target, valid = drawn(6, 33, dtype)
    options = (0.1, 0.01)
    library.opcheck(cross_entropy._forward_op, (logits, target, valid, *options))
    _, log_sum, _ = cross_entropy._forward_op(logits, target, valid, *options)
    grad = torch.randn(6)
    inputs = (grad, logits.detach(), target, valid, log_sum.detach(), *options)
    library.opcheck(cross_entropy._backward_op, inputs)
    library.opcheck(cross_entropy._backward_op_, inputs)
