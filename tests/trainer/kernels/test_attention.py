from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from benchmarks.gpu.kernels import poisoned
from tests.trainer.kernels.against_reference import (
    check,
    close,
    outputs_and_gradients,
)
from trainer.kernels import attention as module
from trainer.kernels.attention import (
    CASES,
    attention,
    attention_fused,
    attention_packed,
    attention_packed_fused,
    attention_packed_ref,
    attention_ref,
    supported,
)
from trainer.kernels.case import Case

SMALL = [case for case in CASES if case.small]
CPU = torch.device("cpu")
FP32 = 5e-6


def packed(*lengths: int, left: int = 0, heads: int = 2, width: int = 16) -> Tensor:
    """A table of so many rows."""
    draw = torch.Generator().manual_seed(len(lengths))
    return torch.randn(sum(lengths) + left, 3, heads, width, generator=draw)


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def wanting(*tensors: Tensor) -> list[Tensor]:
    """Leaves that want gradients, where they lie."""
    return [each.detach().requires_grad_() for each in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kernel} {case.shape}")
def test_the_kernel_is_its_reference_within_the_stated_tolerance(
    case: Case, dtype: torch.dtype
) -> None:
    check(case, dtype)


@pytest.mark.parametrize("tiles", [(16, 64, 4, 1), (64, 16, 4, 1), (128, 128, 8, 1)])
def test_tiles_change_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int, int, int]
) -> None:
    monkeypatch.setattr(module, "_EXACT", module.Tiles(*tiles))
    monkeypatch.setattr(module, "_EXACT_WHOLE", ((9, module.Tiles(*tiles)),))
    for case in SMALL[1], SMALL[3], SMALL[4]:
        check(case, torch.float32)


def test_a_program_has_a_whole_segment_where_its_queries_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = torch.empty(0, 3, 2, 64, dtype=torch.bfloat16)
    rows = [1, 64, 65, 128]
    found = [module._whole(each, table) for each in rows]
    reach = [parts * tiles.own for parts, tiles in filter(None, found)]
    assert len(reach) == len(rows)
    assert all(0 <= have - need < 64 for have, need in zip(reach, rows, strict=True))
    assert module._whole(129, table) is None
    assert module._whole(1, table[..., :32]) is None
    # Both ways have the same gradients.
    (table,) = wanting(packed(70, 1, 95, left=3, width=64))
    given = (table, bounds(70, 1, 95), 95)
    one = outputs_and_gradients(attention_packed_fused, given)
    monkeypatch.setattr(module, "_WHOLE", {})
    other = outputs_and_gradients(attention_packed_fused, given)
    assert torch.equal(one[0], other[0])
    close(one[1], other[1], FP32)


# Of these heads a program has whole segments only if they are of 64 channels.
@pytest.mark.parametrize("width", [16, 64])
def test_rows_of_no_segment_are_zeros_and_so_are_their_gradients(width: int) -> None:
    cu_q, cu_k = bounds(2, 0, 5), bounds(9, 4, 5)
    table = packed(9, 4, 5, left=70, width=width)
    q, k, v = wanting(table[:80, 0], table[:, 1], table[:, 2])
    with poisoned():
        output = attention_fused(q, k, v, cu_q, cu_k, 5, 9)
        gradients = torch.autograd.grad(output, (q, k, v), torch.ones(80, 2, width))
    for part, used in zip((output, *gradients), (7, 7, 18, 18), strict=True):
        assert part.isfinite().all()
        assert not part[used:].any()
        assert part[:used].flatten(1).any(1).sum() >= 7
    # Keys without queries are read by nobody.
    assert not gradients[1][9:13].any()
    assert not gradients[2][9:13].any()


@pytest.mark.parametrize("width", [16, 64])
def test_queries_without_keys_mix_nothing(width: int) -> None:
    table = packed(3, 6, width=width)
    given = wanting(*table.unbind(1))
    cu_k = bounds(0, 6)
    found = outputs_and_gradients(
        lambda *qkv: attention_fused(*qkv, bounds(3, 6), cu_k, 6, 6), given
    )
    assert not found[0][:3].any()
    assert not found[1][:3].any()
    expected = outputs_and_gradients(
        lambda *qkv: attention_ref(*qkv, bounds(3, 6), cu_k, 6, 6), given
    )
    for one, other in zip(found, expected, strict=True):
        close(one, other, FP32)


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize(
    ("queries", "keys"), [((), ()), ((0, 0), (3, 2)), ((0,), (0,))]
)
def test_a_batch_may_have_nothing_to_do(
    queries: tuple[int, ...], keys: tuple[int, ...], width: int
) -> None:
    table = packed(*keys, left=4, width=width)
    q, k, v = wanting(table[: sum(queries), 0], table[:, 1], table[:, 2])
    longest = max((*queries, 0)), max((*keys, 0))
    with poisoned():
        output = attention_fused(q, k, v, bounds(*queries), bounds(*keys), *longest)
        gradients = torch.autograd.grad(output, (q, k, v), torch.ones_like(output))
    assert output.shape == q.shape
    for part, like in zip(gradients, (q, k, v), strict=True):
        assert part.shape == like.shape
        assert not part.any()


def test_rows_and_heads_may_lie_anywhere() -> None:
    lengths = 5, 40
    q, k, v = packed(*lengths, heads=3).unbind(1)
    # Heads outermost; every other row; and channels not side by side.
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k = torch.stack([k, k], 1)[:, 1]
    v = v.transpose(0, 2).contiguous().transpose(0, 2)
    given = wanting(q, k, v)
    assert not any(part.is_contiguous() for part in given)
    cu = bounds(*lengths)

    def both(form: object) -> list[Tensor]:
        output = form(*given, cu, cu, 40, 40)  # type: ignore[operator]
        draw = torch.Generator().manual_seed(0)
        up = torch.randn(16, 3, 45, generator=draw).permute(2, 1, 0)
        return [output.detach(), *torch.autograd.grad(output, given, up)]

    for one, other in zip(both(attention_fused), both(attention_ref), strict=True):
        close(one, other, FP32)
    output = attention_fused(*given, cu, cu, 40, 40)
    expanded = torch.autograd.grad(output.sum(), given[2])[0]
    plain = torch.autograd.grad(
        attention_ref(*given, cu, cu, 40, 40), given[2], torch.ones(45, 3, 16)
    )[0]
    close(expanded, plain, FP32)


def test_one_table_has_the_bits_of_three() -> None:
    lengths = 30, 0, 41, 7
    (table,) = wanting(packed(*lengths, left=3))
    cu, longest = bounds(*lengths), 41
    up = torch.randn(81, 2, 16)
    together = attention_packed_fused(table, cu, longest)
    apart = attention_fused(*table.unbind(1), cu, cu, longest, longest)
    assert torch.equal(together, apart)
    (one,) = torch.autograd.grad(together, table, up)
    (other,) = torch.autograd.grad(apart, table, up)
    assert torch.equal(one, other)


def with_bias(
    form: Callable[..., Tensor], table: Tensor, bias: Tensor, cu: Tensor, longest: int
) -> list[Tensor]:
    """The output, and gradients of the table and of the bias."""
    return outputs_and_gradients(
        lambda qkv, of: form(qkv, cu, longest, of), (table, bias)
    )


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize(
    ("lengths", "left", "room"),
    [
        ((30, 0, 41, 7), 3, 41),
        ((0, 1, 0), 70, 1),
        ((100, 3, 0, 65), 0, 250),
        ((), 4, 0),
        ((0, 0), 0, 0),
        ((0, 0), 5, 40),
    ],
)
def test_a_bias_is_due_the_sums_of_what_the_table_is_due(
    lengths: tuple[int, ...], left: int, room: int, width: int
) -> None:
    table, bias = wanting(
        packed(*lengths, left=left, width=width), torch.randn(6, width)
    )
    cu = bounds(*lengths)
    with poisoned():
        out, d_table, d_bias = with_bias(attention_packed_fused, table, bias, cu, room)
    plain = outputs_and_gradients(attention_packed_fused, (table, cu, room))
    # Neither what is in the bias nor asking for its gradient changes the others.
    assert torch.equal(out, plain[0])
    assert torch.equal(d_table, plain[1])
    assert d_bias.shape == bias.shape
    close(d_bias, d_table.double().sum(0).view(6, width), FP32)
    # A key's bias moves all scores of a query alike.
    assert not d_bias[2:4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_has_its_gradient_in_its_own_type_from_both_forms(
    dtype: torch.dtype,
) -> None:
    table = packed(20, 0, 33, left=2, width=64).bfloat16()
    cu = bounds(20, 0, 33)
    given = wanting(table, torch.randn(6 * 64).to(dtype))
    exact = with_bias(
        attention_packed_ref, *wanting(*(each.double() for each in given)), cu, 33
    )
    for form in (attention_packed_fused, attention_packed_ref):
        found = with_bias(form, *given, cu, 33)
        assert found[0].dtype == torch.bfloat16
        assert found[2].dtype == dtype
        # Under the interpreter what a GPU rounds is cut off.
        close(found[2], exact[2], 1.5e-2)


def test_a_bias_that_is_frozen_has_no_gradient_and_one_alone_has_its_own() -> None:
    table, bias = packed(20, 9, width=64), torch.randn(6 * 64)
    cu = bounds(20, 9)
    given = wanting(table, bias)
    _, d_table, d_bias = with_bias(attention_packed_fused, *given, cu, 20)
    (frozen,) = outputs_and_gradients(
        lambda qkv: attention_packed_fused(qkv, cu, 20, bias), given[:1]
    )[1:]
    assert torch.equal(frozen, d_table)
    (alone,) = outputs_and_gradients(
        lambda of: attention_packed_fused(table, cu, 20, of), given[1:]
    )[1:]
    assert torch.equal(alone, d_bias)


def test_boundaries_may_be_of_either_width_and_rooms_larger_than_needed() -> None:
    table, cu = packed(9, 50, 1), bounds(9, 50, 1)
    expected = attention_packed_fused(table, cu, 50)
    for found in (
        attention_packed_fused(table, cu.long(), 50),
        attention_packed_fused(table, cu, 200),
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [16, 64])
def test_large_scores_neither_overflow_nor_vanish(width: int) -> None:
    (table,) = wanting(60 * packed(40, 33, width=width))
    cu = bounds(40, 33)
    found = outputs_and_gradients(attention_packed_fused, (table, cu, 40))
    (wide,) = wanting(table.double())
    expected = outputs_and_gradients(attention_packed_ref, (wide, cu, 40))
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        # A score of thousands has so many fewer digits for a weight.
        close(one, other, 5e-3)


@pytest.mark.parametrize("width", [16, 64])
def test_scores_far_below_zero_are_scores(width: int) -> None:
    table = packed(35, width=width)
    # Every query is opposite to every key: all scores are -400 or -800.
    table[:, 0], table[:, 1] = 10.0, -10.0
    (table,) = wanting(table)
    found = outputs_and_gradients(attention_packed_fused, (table, bounds(35), 35))
    expected = outputs_and_gradients(attention_packed_ref, (table, bounds(35), 35))
    # As many digits of a logarithm of -1000 are before the point.
    close(found[0], expected[0], 1e-4)
    assert found[1].isfinite().all()
    close(found[1][:, 2], expected[1][:, 2], 1e-4)


def test_the_same_inputs_give_the_same_bits() -> None:
    for case in SMALL[0], SMALL[2], SMALL[3], SMALL[-1]:
        given = case.inputs(CPU, torch.float32, 0)
        first, second = (outputs_and_gradients(case.fused, given) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)


def test_the_reference_has_its_own_gradient() -> None:
    cu_q, cu_k = bounds(1, 0, 3), bounds(2, 2, 3)
    table = packed(2, 2, 3, left=1, width=3).double()
    q, k, v = wanting(table[:5, 0], table[:, 1], table[:, 2])
    assert torch.autograd.gradcheck(
        lambda *qkv: attention_ref(*qkv, cu_q, cu_k, 3, 3), (q, k, v)
    )
    assert torch.autograd.gradcheck(
        lambda qkv: attention_packed_ref(qkv, cu_k, 3), wanting(table)
    )


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    cu_q, cu_k = bounds(3, 0, 2), bounds(5, 4, 2)
    table = packed(5, 4, 2, left=2)
    given = (*wanting(table[:8, 0], table[:, 1], table[:, 2]), cu_q, cu_k, 3, 5)
    library.opcheck(module._forward, given)
    plain = [part.detach() for part in given[:3]]
    out, lse = module._forward(*plain, *given[3:])
    library.opcheck(
        module._backward, (torch.ones_like(out), *plain, out, lse, *given[3:])
    )
    (bias,) = wanting(torch.zeros(96))
    for of, dtype in ((None, None), (bias, torch.bfloat16)):
        library.opcheck(module._forward_packed, (*wanting(table), cu_k, 5, of))
        out, lse = module._forward_packed(table, cu_k, 5, None)
        kept = (torch.ones_like(out), table, out, lse, cu_k, 5, dtype)
        library.opcheck(module._backward_packed, kept)


def test_a_cpu_uses_the_reference() -> None:
    cu = bounds(4, 9)
    (table,) = wanting(packed(4, 9, width=5))
    assert not supported(5)
    expected = outputs_and_gradients(attention_packed_ref, (table, cu, 9))
    for found in (
        outputs_and_gradients(attention_packed, (table, cu, 9)),
        outputs_and_gradients(
            lambda qkv: attention(*qkv.unbind(1), cu, cu, 9, 9), (table,)
        ),
    ):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_widths_are_those_that_cases_have() -> None:
    widths = {case.inputs(CPU, torch.float32, 0)[0].shape[-1] for case in SMALL}
    assert widths == {width for width in range(1, 300) if supported(width)}
