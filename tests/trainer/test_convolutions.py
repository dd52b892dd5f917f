"""Convolutions in nested order, and without their bias, are the convolutions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from trainer.kernels.pixels import nested, normalised
from trainer.models import dense
from trainer.models.convolutions import SquareConv, Stack, TransposedConv, by_quarters
from trainer.models.dense import GeluLinear

PIXELS = torch.randint(
    256, (3, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.fixture
def embedder() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [SquareConv(3, 6, 2, gelu=True), SquareConv(6, 8, 2, gelu=True)]
    layers += [SquareConv(8, 10, 2, gelu=True), SquareConv(10, 5, 1, gelu=False)]
    return nn.Sequential(*layers).double()


def gradients(of: Tensor, model: nn.Module, *more: Tensor) -> list[Tensor]:
    upstream = torch.randn(
        of.shape, generator=torch.Generator().manual_seed(2), dtype=of.dtype
    )
    return list(torch.autograd.grad(of, [*model.parameters(), *more], upstream))


@pytest.mark.parametrize("fuses", [False, True])
def test_in_nested_order_products_are_the_convolutions(
    embedder: nn.Sequential, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embedder(normalised(PIXELS, torch.float64)).flatten(2).transpose(1, 2)
    wanted = [plain, *gradients(plain, embedder)]
    monkeypatch.setattr(dense, "fuses", lambda x: fuses)
    flat = embedder(nested(PIXELS, 8, torch.float64)).unflatten(0, (3, 9))
    found = [flat, *gradients(flat, embedder)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (4, 2)])
def test_a_bias_that_is_added_with_gelu_is_the_convolutions_own(
    side: int,
    stride: int,
    memory: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    layer = TransposedConv(6, 8, side, stride, gelu=True).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=memory)
    plain = layer(x)
    wanted = [plain, *gradients(plain, layer)]
    monkeypatch.setattr(dense, "fuses", lambda x: True)
    fused = layer(x)
    for ours, theirs in zip([fused, *gradients(fused, layer)], wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gelu", [False, True])
def test_quarters_of_steps_are_the_transposed_convolution(
    gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    layer = TransposedConv(6, 3, 4, 2, gelu=gelu).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    plain = layer(x)
    wanted = [plain, *gradients(plain, layer, x)]
    monkeypatch.setattr(dense, "fuses", lambda x: True)
    assert by_quarters(x, layer.weight, layer.bias).shape == (2, 3, 10, 14)
    quarters = layer(x)
    found = [quarters, *gradients(quarters, layer, x)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_linear_layer_with_gelu_is_both(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    layer, x = GeluLinear(6, 8).double(), torch.randn(5, 6, dtype=torch.float64)
    wanted = nn.functional.gelu(nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), wanted)
    monkeypatch.setattr(dense, "fuses", lambda x: True)
    assert torch.allclose(layer(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_words", [16, 11])
def test_rows_of_logits_are_aligned_and_the_words_alone(
    n_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(6)
    leaves = [torch.randn(4, 6), torch.randn(n_words, 6), torch.randn(n_words)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    plain = dense.scores_of_words(*leaves)
    upstream = torch.randn(4, n_words, dtype=torch.float64)
    wanted = torch.autograd.grad(plain, leaves, upstream)
    monkeypatch.setattr(dense, "fuses", lambda x: True)
    found = dense.scores_of_words(*leaves)
    assert found.shape == (4, n_words)
    assert found.stride() == (16, 1)
    assert torch.allclose(found, plain, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), wanted, strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_decoder_of_any_depth_is_compiled_as_one() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    widths = range(4, 15)
    layers = [
        TransposedConv(
            before, after, *((4, 2) if number % 4 == 3 else (3, 1)), gelu=True
        )
        for number, (before, after) in enumerate(itertools.pairwise(widths))
    ]
    compiled, plain = Stack(*layers), nn.Sequential(*layers)
    compiled.compile(backend="aot_eager")
    for images in (2, 3, 4):
        x = torch.randn(images, 4, 2, 3)
        assert torch.allclose(compiled(x), plain(x), atol=1e-6)
    # Of one number of images, and then of any.
    assert torch._dynamo.utils.counters["frames"]["ok"] == 2
