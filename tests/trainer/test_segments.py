"""Layouts of one modality, and attention across two of them, padded and unpadded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from trainer.models import layers
from trainer.models.scored_rows import keep
from trainer.models.segments import (
    Segments,
    laid_out,
    of_images,
    of_texts,
    rows_of_images,
    taken,
)
from trainer.stream import lay_out

LENGTHS = [7, 2, 12, 9, 3]


def texts(*, rows: int = 48) -> Segments:
    lengths = torch.tensor(LENGTHS)
    return laid_out(lengths, rows=rows, longest=12, spare=rows - sum(LENGTHS))


def sizes(layout: Segments) -> list[int]:
    return layout.cu_seqlens.diff().tolist()


def consistent(layout: Segments) -> None:
    """Every row stands in the table where `flat` says, and nowhere else."""
    rows = len(layout.flat)
    assert layout.dense.flatten()[layout.flat].tolist() == list(range(rows))
    assert layout.dense_valid.flatten()[layout.flat].all()
    filled = sum(max(size, 1) for size in sizes(layout))
    assert int(layout.dense_valid.sum()) == filled
    assert max(sizes(layout)) <= layout.longest
    assert int(layout.dense.min()) >= 0
    assert int(layout.dense.max()) < rows
    if layout.inside is not None:
        end = int(layout.cu_seqlens[layout.pairs])
        assert layout.inside.tolist() == [row < end for row in range(rows)]


def test_the_text_rows_of_a_stream_are_laid_out_as_they_stand() -> None:
    stream = lay_out(np.array(LENGTHS), 4)
    layout = of_texts(stream)
    consistent(layout)
    assert sizes(layout)[: len(LENGTHS)] == LENGTHS
    assert len(layout.flat) == len(stream.text_pair)
    assert layout.longest == max(LENGTHS)


@pytest.mark.parametrize("rows", [33, 40, 57, 80])
def test_rows_that_are_left_over_form_segments_of_their_own(rows: int) -> None:
    layout = texts(rows=rows)
    consistent(layout)
    assert sizes(layout)[:5] == LENGTHS
    assert sum(sizes(layout)) == rows
    assert (layout.inside is None) == (rows == 33)


def test_texts_are_taken_in_any_order_and_more_than_once() -> None:
    layout, order = texts(), torch.tensor([4, 2, 2, 0])
    row, found = taken(layout, order, rows=64, spare=64 - len(order))
    consistent(found)
    assert sizes(found)[:4] == [LENGTHS[number] for number in order]
    starts, begin = layout.starts.tolist(), 0
    for number in order.tolist():
        count = LENGTHS[number]
        shown = row[begin : begin + count].tolist()
        assert shown == [starts[number] + place for place in range(count)]
        begin += count
    images = of_images(4, 3, torch.device("cpu"))
    consistent(images)
    assert rows_of_images(order, 3).tolist() == [
        *(12, 13, 14, 6, 7, 8, 6, 7, 8, 0, 1, 2)
    ]


class Unpadded(torch.autograd.Function):
    """What the kernel does: rows that are in no segment are whatever was there."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, cu_q, cu_k = arguments
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        out = torch.full_like(q, float("nan"))
        for a, b, c, d in Unpadded.segments(cu_q, cu_k):
            out[a:b] = layers._attend(q[a:b], k[c:d], v[c:d])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *parts, cu_q, cu_k = ctx.saved_tensors
        found = [torch.full_like(part, float("nan")) for part in parts]
        for a, b, c, d in Unpadded.segments(cu_q, cu_k):
            spans = ((a, b), (c, d), (c, d))
            with torch.enable_grad():
                own = [
                    part[i:j].detach().requires_grad_()
                    for part, (i, j) in zip(parts, spans, strict=True)
                ]
                out = layers._attend(*own)
            for whole, part, (i, j) in zip(
                found, torch.autograd.grad(out, own, grad[a:b]), spans, strict=True
            ):
                whole[i:j] = part
        return *found, None, None

    @staticmethod
    def segments(cu_q: Tensor, cu_k: Tensor) -> list[tuple[int, ...]]:
        bounds = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
        return [tuple(int(x) for x in each) for each in bounds]


@pytest.mark.parametrize("of_texts_first", [True, False])
@pytest.mark.parametrize("some", [True, False])
def test_unpadded_attention_across_is_the_padded_one(
    monkeypatch: pytest.MonkeyPatch, of_texts_first: bool, some: bool
) -> None:
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda q, k, v, a, b, *_: Unpadded.apply(q, k, v, a, b)
    )
    own, other = texts(), of_images(5, 6, torch.device("cpu"))
    if not of_texts_first:
        own, other = other, own
    generator = torch.Generator().manual_seed(0)
    n = len(own.flat)
    needed = torch.rand(n, generator=generator) < 0.3
    rows = keep(needed, int(needed.sum()), own) if some else None
    read = torch.arange(n) if rows is None else rows.row
    found = []
    for attention in (layers._varlen_across, layers._padded_across):
        generator.manual_seed(1)
        q, k, v = (
            torch.randn(count, 2, 4, generator=generator).requires_grad_()
            for count in (len(read), len(other.flat), len(other.flat))
        )
        mixed = attention(q, k, v, own, other, rows)
        # Rows of no pair are read by nothing.
        real = torch.ones_like(read, dtype=torch.bool)
        if own.inside is not None:
            real = own.inside[read]
        weight = torch.randn(mixed.shape, generator=generator)
        loss = (torch.where(real[:, None, None], mixed, 0) * weight).sum()
        found.append((mixed[real], *torch.autograd.grad(loss, (q, k, v))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [4, 12, 64])
def test_on_a_gpu_heads_of_any_width_attend(width: int) -> None:
    sizes = [5, 1, 300]
    ends = torch.tensor([0, *sizes]).cumsum(0).int().cuda()
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(3, sum(sizes), 2, width, generator=generator)
    given = drawn.bfloat16().cuda().requires_grad_()
    found = layers._varlen(*given, ends, ends, max(sizes), max(sizes))
    exact = given.detach().double().requires_grad_()
    parts = zip(*(part.split(sizes) for part in exact), strict=True)
    wanted = torch.cat([layers._attend(*part) for part in parts])
    upstream = torch.randn_like(wanted)
    for ours, theirs in (
        (found, wanted),
        *zip(
            torch.autograd.grad(found, given, upstream.bfloat16()),
            torch.autograd.grad(wanted, exact, upstream),
            strict=True,
        ),
    ):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
