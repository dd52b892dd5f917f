from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.stream import capacity, lay_out


@given(st.integers(1, 10**7))
def test_capacity_holds_its_count_with_little_padding(count: int) -> None:
    chosen = capacity(count)
    assert chosen >= count
    assert chosen - count <= max(8, count / 8)
    assert capacity(chosen) == chosen


def test_capacities_are_a_small_set() -> None:
    assert len({capacity(count) for count in range(1024, 2049)}) <= 17


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 9))
def test_every_token_has_one_row_in_its_own_segment(
    lengths: list[int], n_image: int
) -> None:
    stream = lay_out(np.array(lengths), n_image)
    text, pairs = stream.text_used, len(lengths)
    assert text == sum(lengths)
    rows = torch.cat([stream.text_row, stream.image_row.flatten()])
    assert torch.equal(rows.sort().values, torch.arange(len(stream.source)))
    back = torch.empty_like(rows)
    back[rows] = torch.arange(len(rows))
    assert torch.equal(stream.source, back)
    bounds = stream.cu_seqlens
    assert bounds[0] == 0
    assert bounds[-1] == len(stream.source)
    sizes = bounds.diff()
    assert (sizes > 0).all()
    assert int(sizes.max()) == stream.longest == max(lengths) + n_image
    for pair in range(pairs):
        inside = range(int(bounds[pair]), int(bounds[pair + 1]))
        mine = stream.text_row[:text][stream.text_pair[:text] == pair].tolist()
        assert mine == list(inside)[: lengths[pair]]
        assert stream.image_row[pair].tolist() == list(inside)[lengths[pair] :]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 9))
def test_dense_table_and_stream_are_inverse(lengths: list[int], n_image: int) -> None:
    stream = lay_out(np.array(lengths), n_image)
    table = stream.dense.flatten()[stream.flat]
    assert torch.equal(table, torch.arange(len(stream.source)))
    assert stream.dense_valid.flatten()[stream.flat].all()
    sizes = stream.cu_seqlens.diff()
    assert torch.equal(stream.dense_valid.sum(1), sizes)


@pytest.mark.parametrize("lengths", [[2], [2, 2], [5, 2, 9]])
def test_only_words_are_maskable(lengths: list[int]) -> None:
    stream = lay_out(np.array(lengths), 4)
    assert stream.n_words.tolist() == [length - 2 for length in lengths]
    assert int(stream.maskable.sum()) == sum(lengths) - 2 * len(lengths)
    assert not stream.maskable[stream.text_used :].any()
    assert not stream.maskable[stream.text_position == 0].any()
