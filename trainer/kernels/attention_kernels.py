"""The kernels of attention over short segments.

Owns what a program does. Does not own how many there are, their tiles or the operators
around them (`trainer.kernels.attention`).

Shapes: E channels of a head (WIDTH), OWN rows of a program, STEP rows that it goes over
at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trainer.kernels.parts import bound, dot

SUM_ROWS = tl.constexpr(16)
"""Of a product, as few as can be: all rows of a sum's table are the same."""


@triton.jit(do_not_specialize=["rows"])
def attention_forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cu_q_ptr,
    cu_k_ptr,
    out_ptr,
    lse_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    rows,
    scale,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program for each OWN queries of each head of each segment, and after the last
    segment some for the rows that are left. `scale` is of scores in bits; so is lse.
    """
    first = tl.program_id(0) * OWN
    head = tl.program_id(1)
    segment = tl.program_id(2)
    start = tl.load(cu_q_ptr + segment).to(tl.int64)
    out_ptr += start * out_row + head * WIDTH
    lse_ptr += head.to(tl.int64) * rows + start
    if segment == tl.num_programs(2) - 1:
        left, blocks = (rows - start).to(tl.int32), tl.num_programs(0)
        _clear(out_ptr, tl.program_id(0), blocks, left, out_row, OWN, WIDTH)
        # A column of one.
        _clear(lse_ptr, tl.program_id(0), blocks, left, 1, OWN, 1)
    else:
        queries = (tl.load(cu_q_ptr + segment + 1) - start).to(tl.int32)
        if first < queries:
            start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
            keys = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
            q_ptr += start * q_row + head * q_head
            k_ptr += start_k * k_row + head * k_head
            v_ptr += start_k * v_row + head * v_head
            q = _read(q_ptr, first, queries, q_row, OWN, WIDTH)
            top = tl.full((OWN,), float("-inf"), tl.float32)
            whole = tl.zeros((OWN,), tl.float32)
            mixed = tl.zeros((OWN, WIDTH), tl.float32)
            for at in range(0, bound(keys), STEP):
                k = _read(k_ptr, at, keys, k_row, STEP, WIDTH)
                v = _read(v_ptr, at, keys, v_row, STEP, WIDTH)
                scores = dot(q, tl.trans(k), None) * scale
                inside = at + tl.arange(0, STEP) < keys
                scores = tl.where(inside[None, :], scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                weights = tl.exp2(scores - higher[:, None])
                shrunk = tl.exp2(top - higher)
                whole = whole * shrunk + tl.sum(weights, 1)
                mixed = mixed * shrunk[:, None]
                mixed = dot(weights.to(v.dtype), v, mixed)
                top = higher
            # Over no keys it is 0.
            mixed = mixed / tl.where(whole > 0, whole, 1.0)[:, None]
            _write(out_ptr, mixed, first, queries, out_row, OWN, WIDTH)
            row = first + tl.arange(0, OWN)
            tl.store(lse_ptr + row, top + tl.log2(whole), mask=row < queries)


@triton.jit(do_not_specialize=["rows"])
def attention_delta_kernel(  # type: ignore[no-untyped-def]
    d_out_ptr,
    out_ptr,
    delta_ptr,
    d_out_row,
    d_out_head,
    out_row,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Delta of ROWS queries of a head: the sum over channels of output times its
    gradient, which is what the softmax takes off the gradients of a query's weights.
    """
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    start = first.to(tl.int64)
    d_out_ptr += start * d_out_row + head * d_out_head
    out_ptr += start * out_row + head * WIDTH
    d_out = _read(d_out_ptr, 0, rows - first, d_out_row, ROWS, WIDTH)
    out = _read(out_ptr, 0, rows - first, out_row, ROWS, WIDTH)
    row = tl.arange(0, ROWS)
    delta_ptr += head.to(tl.int64) * rows + start
    tl.store(delta_ptr + row, _delta(out, d_out), mask=row < rows - first)


@triton.jit(do_not_specialize=["rows_q", "rows_k", "blocks_k"])
def attention_backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    cu_q_ptr,
    cu_k_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    sums_ptr,
    d_out_row,
    d_out_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    d_q_row,
    d_k_row,
    d_v_row,
    rows_q,
    rows_k,
    blocks_k,
    bits,
    scale,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Of each head of each segment a program for each OWN keys, the first `blocks_k`,
    and one for each OWN queries; after the last segment for the rows that are left.
    `bits` is the scale of scores in bits. With a bias, programs with queries also
    write their part of its gradient.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.program_id(2)
    start_q = tl.load(cu_q_ptr + segment).to(tl.int64)
    start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
    d_q_ptr += start_q * d_q_row + head * WIDTH
    d_k_ptr += start_k * d_k_row + head * WIDTH
    d_v_ptr += start_k * d_v_row + head * WIDTH
    if segment == tl.num_programs(2) - 1:
        if block < blocks_k:
            left = (rows_k - start_k).to(tl.int32)
            _clear(d_k_ptr, block, blocks_k, left, d_k_row, OWN, WIDTH)
            _clear(d_v_ptr, block, blocks_k, left, d_v_row, OWN, WIDTH)
        else:
            left = (rows_q - start_q).to(tl.int32)
            blocks = tl.num_programs(0) - blocks_k
            _clear(d_q_ptr, block - blocks_k, blocks, left, d_q_row, OWN, WIDTH)
    else:
        queries = (tl.load(cu_q_ptr + segment + 1) - start_q).to(tl.int32)
        keys = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
        d_out_ptr += start_q * d_out_row + head * d_out_head
        q_ptr += start_q * q_row + head * q_head
        k_ptr += start_k * k_row + head * k_head
        v_ptr += start_k * v_row + head * v_head
        lse_ptr += head.to(tl.int64) * rows_q + start_q
        delta_ptr += head.to(tl.int64) * rows_q + start_q
        if block < blocks_k:
            first = block * OWN
            if first < keys:
                k = _read(k_ptr, first, keys, k_row, OWN, WIDTH)
                v = _read(v_ptr, first, keys, v_row, OWN, WIDTH)
                d_k, d_v = _over_queries(
                    *(k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr),
                    *(q_row, d_out_row, queries, bits, WIDTH, OWN, STEP),
                )
                _write(d_k_ptr, d_k * scale, first, keys, d_k_row, OWN, WIDTH)
                _write(d_v_ptr, d_v, first, keys, d_v_row, OWN, WIDTH)
        else:
            first = (block - blocks_k) * OWN
            of_queries = tl.zeros((SUM_ROWS, WIDTH), tl.float32)
            of_values = tl.zeros((SUM_ROWS, WIDTH), tl.float32)
            if first < queries:
                q, d_out, lse, delta = _read_known(
                    *(q_ptr, d_out_ptr, lse_ptr, delta_ptr),
                    *(first, queries, q_row, d_out_row, OWN, WIDTH),
                )
                d_q = _over_keys(
                    *(q, d_out, lse, delta, k_ptr, v_ptr),
                    *(k_row, v_row, keys, bits, WIDTH, OWN, STEP),
                )
                d_q = (d_q * scale).to(q.dtype)
                _write(d_q_ptr, d_q, first, queries, d_q_row, OWN, WIDTH)
                if HAS_BIAS:
                    of_queries = _over_rows(d_q, of_queries, OWN)
                    of_values = _over_rows(d_out, of_values, OWN)
            # One of each block of queries of each segment.
            blocks = tl.num_programs(0) - blocks_k
            part = segment * blocks + block - blocks_k
            place = part, (tl.num_programs(2) - 1) * blocks, head, tl.num_programs(1)
            _write_sum(sums_ptr, 0, of_queries, place, HAS_BIAS, WIDTH)
            _write_others(sums_ptr, of_values, place, HAS_BIAS, WIDTH)


@triton.jit
def _over_queries(  # type: ignore[no-untyped-def]
    k,
    v,
    q_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    q_row,
    d_out_row,
    queries,
    bits,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of some keys, but for the scale of scores, and of their values."""
    d_k = tl.zeros((OWN, WIDTH), tl.float32)
    d_v = tl.zeros((OWN, WIDTH), tl.float32)
    for at in range(0, bound(queries), STEP):
        q, d_out, lse, delta = _read_known(
            *(q_ptr, d_out_ptr, lse_ptr, delta_ptr),
            *(at, queries, q_row, d_out_row, STEP, WIDTH),
        )
        # Keys by queries: so the sums below have it on their left.
        weights = tl.exp2(dot(k, tl.trans(q), None) * bits - lse[None, :])
        d_v = dot(weights.to(q.dtype), d_out, d_v)
        d_scores = weights * (dot(v, tl.trans(d_out), None) - delta[None, :])
        d_k = dot(d_scores.to(q.dtype), q, d_k)
    return d_k, d_v


@triton.jit
def _over_keys(  # type: ignore[no-untyped-def]
    q,
    d_out,
    lse,
    delta,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    keys,
    bits,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradient of some queries, but for the scale of scores."""
    d_q = tl.zeros((OWN, WIDTH), tl.float32)
    for at in range(0, bound(keys), STEP):
        k = _read(k_ptr, at, keys, k_row, STEP, WIDTH)
        v = _read(v_ptr, at, keys, v_row, STEP, WIDTH)
        weights = tl.exp2(dot(q, tl.trans(k), None) * bits - lse[:, None])
        d_scores = weights * (dot(d_out, tl.trans(v), None) - delta[:, None])
        # Else of no key it is a number times 0, and may be infinite.
        inside = at + tl.arange(0, STEP) < keys
        d_scores = tl.where(inside[None, :], d_scores, 0.0)
        d_q = dot(d_scores.to(k.dtype), k, d_q)
    return d_q


@triton.jit(do_not_specialize=["rows_q", "rows_k"])
def attention_backward_whole_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    sums_ptr,
    d_out_row,
    d_out_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    d_q_row,
    d_k_row,
    d_v_row,
    rows_q,
    rows_k,
    bits,
    scale,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program for each head of each segment of at most PARTS times OWN queries, and
    after the last segment for the rows that are left. With a bias, each but these also
    writes its part of the bias's gradient.
    """
    head = tl.program_id(0)
    segment = tl.program_id(1)
    start_q = tl.load(cu_q_ptr + segment).to(tl.int64)
    start_k = tl.load(cu_k_ptr + segment).to(tl.int64)
    d_q_ptr += start_q * d_q_row + head * WIDTH
    d_k_ptr += start_k * d_k_row + head * WIDTH
    d_v_ptr += start_k * d_v_row + head * WIDTH
    if segment == tl.num_programs(1) - 1:
        # One, number 0.
        block, blocks = tl.program_id(2), tl.num_programs(2)
        left = (rows_q - start_q).to(tl.int32)
        _clear(d_q_ptr, block, blocks, left, d_q_row, OWN, WIDTH)
        left = (rows_k - start_k).to(tl.int32)
        _clear(d_k_ptr, block, blocks, left, d_k_row, OWN, WIDTH)
        _clear(d_v_ptr, block, blocks, left, d_v_row, OWN, WIDTH)
    else:
        queries = (tl.load(cu_q_ptr + segment + 1) - start_q).to(tl.int32)
        keys = (tl.load(cu_k_ptr + segment + 1) - start_k).to(tl.int32)
        d_out_ptr += start_q * d_out_row + head * d_out_head
        q_ptr += start_q * q_row + head * q_head
        k_ptr += start_k * k_row + head * k_head
        v_ptr += start_k * v_row + head * v_head
        out_ptr += start_q * out_row + head * WIDTH
        lse_ptr += head.to(tl.int64) * rows_q + start_q
        q, d_out, lse, delta, d_q = (), (), (), (), ()
        for part in tl.static_range(PARTS):
            one = _read_queries(
                *(q_ptr, d_out_ptr, out_ptr, lse_ptr),
                *(part * OWN, queries, q_row, d_out_row, out_row, OWN, WIDTH),
            )
            q += (one[0],)  # type: ignore[assignment]
            d_out += (one[1],)  # type: ignore[assignment]
            lse += (one[2],)  # type: ignore[assignment]
            delta += (one[3],)  # type: ignore[assignment]
            d_q += (tl.zeros((OWN, WIDTH), tl.float32),)  # type: ignore[assignment]
        for at in range(0, bound(keys), STEP):
            k = _read(k_ptr, at, keys, k_row, STEP, WIDTH)
            v = _read(v_ptr, at, keys, v_row, STEP, WIDTH)
            inside = (at + tl.arange(0, STEP) < keys)[None, :]
            # Channels by keys: of enough rows for the largest products.
            d_k = tl.zeros((WIDTH, STEP), tl.float32)
            d_v = tl.zeros((WIDTH, STEP), tl.float32)
            grown = ()
            for part in tl.static_range(PARTS):
                scores = dot(q[part], tl.trans(k), None) * bits
                weights = tl.exp2(scores - lse[part][:, None])
                d_v = dot(tl.trans(d_out[part]), weights.to(k.dtype), d_v)
                d_weights = dot(d_out[part], tl.trans(v), None)
                d_scores = weights * (d_weights - delta[part][:, None])
                d_scores = tl.where(inside, d_scores, 0.0).to(k.dtype)
                d_k = dot(tl.trans(q[part]), d_scores, d_k)
                grown += (dot(d_scores, k, d_q[part]),)  # type: ignore[assignment]
            d_q = grown
            _write(d_k_ptr, tl.trans(d_k) * scale, at, keys, d_k_row, STEP, WIDTH)
            _write(d_v_ptr, tl.trans(d_v), at, keys, d_v_row, STEP, WIDTH)
        of_queries = tl.zeros((SUM_ROWS, WIDTH), tl.float32)
        of_values = tl.zeros((SUM_ROWS, WIDTH), tl.float32)
        for part in tl.static_range(PARTS):
            whole = (d_q[part] * scale).to(q[part].dtype)
            _write(d_q_ptr, whole, part * OWN, queries, d_q_row, OWN, WIDTH)
            if HAS_BIAS:
                of_queries = _over_rows(whole, of_queries, OWN)
                of_values = _over_rows(d_out[part], of_values, OWN)
        place = (segment, tl.num_programs(1) - 1, head, tl.num_programs(0))
        _write_sum(sums_ptr, 0, of_queries, place, HAS_BIAS, WIDTH)
        _write_others(sums_ptr, of_values, place, HAS_BIAS, WIDTH)


@triton.jit
def _over_rows(x, onto, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of the rows of a tile, added to each of the rows of `onto`: by a product,
    for which the tile lies right, and not from thread to thread.
    """
    ones = tl.full((SUM_ROWS, ROWS), 1.0, tl.float32).to(x.dtype)
    return dot(ones, x, onto)


@triton.jit
def _write_others(  # type: ignore[no-untyped-def]
    ptr, of_values, place, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr
):
    """Of a part of a bias's gradient that of keys, which is 0, and that of values."""
    of_keys = tl.zeros((SUM_ROWS, WIDTH), tl.float32)
    _write_sum(ptr, 1, of_keys, place, HAS_BIAS, WIDTH)
    _write_sum(ptr, 2, of_values, place, HAS_BIAS, WIDTH)


@triton.jit
def _write_sum(  # type: ignore[no-untyped-def]
    ptr, number, total, place, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr
):
    """That of queries, 0, of keys or of values, 2, of the part and the head that
    `place` tells, each with how many there are. Without a bias, nothing.
    """
    if HAS_BIAS:
        part, parts, head, heads = place
        row = number * parts.to(tl.int64) + part
        at = (row * heads + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
        same = tl.arange(0, SUM_ROWS)[:, None]
        tl.store(ptr + (at + same), total, mask=same == 0)


@triton.jit
def _read_queries(  # type: ignore[no-untyped-def]
    q_ptr,
    d_out_ptr,
    out_ptr,
    lse_ptr,
    first,
    end,
    q_row,
    d_out_row,
    out_row,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some queries, gradients of what they mixed, the logarithms that make weights of
    their scores, infinite from `end` on, and the means of their weights' gradients.
    """
    q = _read(q_ptr, first, end, q_row, ROWS, WIDTH)
    d_out = _read(d_out_ptr, first, end, d_out_row, ROWS, WIDTH)
    out = _read(out_ptr, first, end, out_row, ROWS, WIDTH)
    row = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < end, other=float("inf"))
    return q, d_out, lse, _delta(out, d_out)


@triton.jit
def _delta(out, d_out):  # type: ignore[no-untyped-def]
    return tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)


@triton.jit
def _read_known(  # type: ignore[no-untyped-def]
    q_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    first,
    end,
    q_row,
    d_out_row,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """As `_read_queries`, where the means are there already."""
    q = _read(q_ptr, first, end, q_row, ROWS, WIDTH)
    d_out = _read(d_out_ptr, first, end, d_out_row, ROWS, WIDTH)
    row = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < end, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=row < end, other=0.0)
    return q, d_out, lse, delta


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    ptr, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows from `first` on of a head of a segment; from `end` on they are zeros."""
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + at, mask=(row < end)[:, None], other=0.0)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    ptr, value, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """The other way; from `end` on nothing is written."""
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=(row < end)[:, None])


@triton.jit
def _clear(  # type: ignore[no-untyped-def]
    ptr, block, blocks, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Zeros to the rows up to `end`, which may be far, that are in a block of ROWS with
    this number among every so many.
    """
    first, along = block * ROWS, blocks * ROWS
    for start in range(bound(first), bound(end), bound(along)):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
        zeros = tl.zeros((ROWS, WIDTH), ptr.dtype.element_ty)
        tl.store(ptr + at, zeros, mask=(row < end)[:, None])
