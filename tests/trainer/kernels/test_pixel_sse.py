from __future__ import annotations

import pytest
import torch
from torch import Tensor, library

from tests.trainer.kernels.against_reference import check, close, outputs_and_gradients
from trainer.kernels import pixel_sse
from trainer.kernels.case import Case
from trainer.kernels.pixel_sse import (
    CASES,
    Error,
    masked_pixel_error,
    masked_pixel_error_fused,
    reference,
)

SMALL = [case for case in CASES if case.small]
SIZE, SIDE = 12, 4
P = (SIZE // SIDE) ** 2
ERRORS: list[Error] = ["squared", "absolute"]


def drawn(
    images: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    raw = 2 * torch.randn(images, 3, SIZE, SIZE, generator=generator)
    pixels = torch.randint(
        256, (images + 2, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator
    )
    image = torch.randperm(images + 2, generator=generator)[:images]
    scored = torch.rand(images, P, generator=generator) < 0.5
    return raw.to(dtype).requires_grad_(), pixels, image, scored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.shape)
def test_kernel_is_its_reference_in_fp64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("error", ERRORS)
def test_the_reference_is_a_naive_loop(error: Error) -> None:
    raw, pixels, image, scored = drawn()
    found = reference(raw, pixels, image, scored, side=SIDE, error=error)
    for number in range(3):
        total = 0.0
        for y in range(SIZE):
            for x in range(SIZE):
                if scored[number, y // SIDE * (SIZE // SIDE) + x // SIDE]:
                    true = pixels[int(image[number]), y, x] / 255
                    off = (raw[number, :, y, x].detach().sigmoid() - true).double()
                    each = off.square() if error == "squared" else off.abs()
                    total += float(each.sum())
        assert float(found[number].detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("error", ERRORS)
def test_gradient_of_the_reference_is_right(error: Error) -> None:
    raw, pixels, image, scored = drawn(2)
    assert torch.autograd.gradcheck(
        lambda x: reference(x, pixels, image, scored, side=SIDE, error=error),
        (raw.detach().double().requires_grad_(),),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_do_not_matter(dtype: torch.dtype) -> None:
    raw, pixels, image, scored = drawn(3, dtype)
    exact = raw.detach().double().requires_grad_()
    wanted = outputs_and_gradients(
        lambda x: reference(x, pixels, image, scored, side=SIDE), [exact]
    )
    wide = torch.empty(3, 6, 2 * SIZE, SIZE, dtype=dtype)[:, ::2, ::2]
    for layout in (
        raw.detach().contiguous(memory_format=torch.channels_last),
        raw.detach().transpose(2, 3).contiguous().transpose(2, 3),
        wide.copy_(raw.detach()),
    ):
        found = outputs_and_gradients(
            lambda x: masked_pixel_error_fused(
                x,
                pixels.transpose(1, 2).contiguous().transpose(1, 2),
                image.repeat_interleave(2)[::2],
                scored.T.contiguous().T,
                side=SIDE,
            ),
            [layout.requires_grad_()],
        )
        tolerance = CASES[0].tolerances[dtype]
        for ours, theirs in zip(found, wanted, strict=True):
            close(ours, theirs, tolerance)


def test_the_gradient_is_laid_out_as_the_outputs_of_the_decoder() -> None:
    raw, *rest = drawn()
    raw = raw.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    masked_pixel_error_fused(raw, *rest, side=SIDE).sum().backward()
    assert raw.grad.is_contiguous(memory_format=torch.channels_last)


def test_squares_that_do_not_count_are_not_read() -> None:
    raw, pixels, image, scored = drawn()
    scored[1] = False
    tiles = scored.view(3, 1, SIZE // SIDE, SIZE // SIDE)
    counts = tiles.repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)
    wanted = masked_pixel_error_fused(raw, pixels, image, scored, side=SIDE)
    spoilt = raw.detach().masked_fill(~counts, torch.nan).requires_grad_()
    found = masked_pixel_error_fused(spoilt, pixels, image, scored, side=SIDE)
    found.sum().backward()
    assert torch.equal(found, wanted)
    assert found[1] == 0
    assert torch.equal(spoilt.grad != 0, counts.expand_as(raw))


def test_nothing_masked_gives_zero_and_no_gradient() -> None:
    raw, pixels, image, scored = drawn()
    none = torch.zeros_like(scored)
    found = masked_pixel_error_fused(raw, pixels, image, none, side=SIDE)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(3))
    assert torch.equal(raw.grad, torch.zeros_like(raw))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("error", ERRORS)
def test_far_off_outputs_have_finite_gradients(error: Error) -> None:
    raw, pixels, image, scored = drawn()
    far = (raw.detach().sign() * 1000).requires_grad_()
    found = masked_pixel_error_fused(far, pixels, image, scored, side=SIDE, error=error)
    found.sum().backward()
    wanted = reference(far, pixels, image, scored, side=SIDE, error=error)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(far.grad, torch.zeros_like(far))


def test_two_runs_give_the_same_bits() -> None:
    first, second = (
        outputs_and_gradients(
            lambda raw, *rest: masked_pixel_error_fused(raw, *rest, side=SIDE), drawn()
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_an_image_of_other_squares_is_refused() -> None:
    raw, pixels, image, scored = drawn()
    for side in (3, 5):
        with pytest.raises(ValueError, match=f"are not 9 squares of {side}"):
            masked_pixel_error(raw, pixels, image, scored, side=side)


def test_compiled_it_is_the_same() -> None:
    def fused(raw: Tensor, *rest: Tensor) -> Tensor:
        return masked_pixel_error_fused(2 * raw, *rest, side=SIDE)

    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    found, wanted = (outputs_and_gradients(f, drawn()) for f in (compiled, fused))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_torchs_contract(dtype: torch.dtype) -> None:
    raw, pixels, image, scored = drawn(2, dtype)
    inputs = (raw, pixels, image, scored, SIDE, False)
    library.opcheck(pixel_sse._forward_op, inputs)
    grad = torch.randn(2, 1).expand(2, P)
    plain = (grad, raw.detach(), *inputs[1:])
    library.opcheck(pixel_sse._backward_op, plain)
