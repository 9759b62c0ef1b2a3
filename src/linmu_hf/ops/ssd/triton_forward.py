"""Kernels of the chunked selective scan, forward: contract in `scan.py`, the four steps in `plain.py`.

    code            meaning
    chunks          [c, 3] first token, number of tokens and scan of each chunk of L tokens; none crosses a segment
    rows            rows of the inputs that hold the tokens of a chunk
    state           [c, s, p', k] fp32, or bf16 without gradients; p' = p, or p + 1 when normalised: the last row is
                    z = sum decay dt B
    x, dt, B, C     for each scan (pointer, stride of a row, stride of a head)
    A, y, ..        for each scan a pointer
    S, R, Q         state heads, state heads per key/value head, query heads per state head
    P, K            head dim and state size; BP, BK their tiles

One launch runs one scan or a pair of them (`PAIR`) with tokens and A of their own and the same head sizes, such as
the two directions of a layer; a chunk says which is its scan.

A normalised scan is one over x with a channel of ones: z is its state and C z what the others are divided by. The
ones are never stored: they turn a product with x into a plain sum. Offsets are 64-bit throughout.
"""

import triton
import triton.language as tl


@triton.jit
def is_second(chunks, c, PAIR: tl.constexpr):
    """Returns whether chunk `c` belongs to the second scan of a pair."""
    second = False
    if PAIR:
        second = tl.load(chunks + 3 * c + 2) != 0
    return second


@triton.jit
def of(scans, second, PAIR: tl.constexpr):
    """Returns the pointer of a chunk's scan."""
    pointer = scans[0]
    if PAIR:
        pointer = tl.where(second, scans[1], pointer)
    return pointer


@triton.jit
def tensor_of(scans, second, PAIR: tl.constexpr):
    """Returns pointer and strides of a chunk's scan."""
    pointer, row, head = scans[0]
    if PAIR:
        pointer = tl.where(second, scans[1][0], pointer)
        row = tl.where(second, scans[1][1], row)
        head = tl.where(second, scans[1][2], head)
    return pointer, row, head


@triton.jit
def tokens_of(chunks, c, L: tl.constexpr):
    """Returns the rows [L] (int64) of chunk `c`, and which of them exist."""
    rows = tl.load(chunks + 3 * c) + tl.arange(0, L)
    return rows.to(tl.int64), tl.arange(0, L) < tl.load(chunks + 3 * c + 1)


@triton.jit
def steps_of(dt, A, rows, inside, second, head, PAIR: tl.constexpr):
    """Returns dt [L] of a state head, the running sum a [L] of dt A, and its last value."""
    base, row, column = tensor_of(dt, second, PAIR)
    step = tl.load(base + rows * row + head * column, mask=inside, other=0.0).to(tl.float32)
    log_decay = step * tl.load(of(A, second, PAIR) + head).to(tl.float32)
    return step, tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)


@triton.jit
def load_rows(base, stride, rows, inside, start, size, BLOCK: tl.constexpr):
    """Loads columns start .. start + BLOCK of the given rows, [L, BLOCK], zeros outside."""
    columns = start + tl.arange(0, BLOCK)
    mask = inside[:, None] & (columns < size)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, rows, inside, start, size, value, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    mask = inside[:, None] & (columns < size)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value, mask=mask)


@triton.jit
def load_state(base, p0, k0, P, K, BP: tl.constexpr, BK: tl.constexpr):
    """Loads a tile [BP, BK] of one state."""
    p, k = p0 + tl.arange(0, BP), k0 + tl.arange(0, BK)
    return tl.load(base + p[:, None] * K + k[None, :], mask=(p < P)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def load_vector(base, k0, K, BK: tl.constexpr):
    k = k0 + tl.arange(0, BK)
    return tl.load(base + k, mask=k < K, other=0.0)


@triton.jit
def decays_between(a, L: tl.constexpr):
    """Returns exp(a_l - a_r) for l >= r, else 0; the difference comes first, so nothing overflows."""
    token = tl.arange(0, L)
    return tl.exp(tl.where(token[:, None] >= token[None, :], a[:, None] - a[None, :], float("-inf")))


@triton.jit
def chunk_states_kernel(
    x, dt, A, B, chunks, states, decays,
    S, R, P, K,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    Computes the state each chunk adds, and the log of its decay [c, s]. Grid (chunks, state heads, tiles of [p, k]).
    """
    c, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = tl.cdiv(K, BK)
    p0, k0 = tl.program_id(2) // tiles * BP, tl.program_id(2) % tiles * BK
    second = is_second(chunks, c, PAIR)
    x, x_n, x_g = tensor_of(x, second, PAIR)
    B, B_n, B_g = tensor_of(B, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    step, a, end = steps_of(dt, A, rows, inside, second, head, PAIR)
    values = load_rows(x + head // R * x_g, x_n, rows, inside, p0, P, BP)
    keys = load_rows(B + head // R * B_g, B_n, rows, inside, k0, K, BK)
    weighted = keys.to(tl.float32) * (tl.exp(end - a) * step)[:, None]
    added = tl.dot(tl.trans(values), weighted.to(values.dtype), input_precision=PRECISION)
    base = states + (c * S + head) * (P + NORMALIZED) * K
    p, k = p0 + tl.arange(0, BP), k0 + tl.arange(0, BK)
    tl.store(base + p[:, None] * K + k[None, :], added, mask=(p < P)[:, None] & (k < K)[None, :])
    if NORMALIZED:
        if p0 == 0:
            tl.store(base + P * K + k, tl.sum(weighted, 0), mask=k < K)
    if tl.program_id(2) == 0:
        tl.store(decays + c * S + head, end)


@triton.jit
def pass_states_kernel(
    states, decays, pieces, entries, finals, first_piece, n_entries,
    S, SIZE,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_FINALS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """
    Carries states along the chunks of each piece (a segment, or what a window of chunks holds of it), replacing what
    a chunk adds by the state before it. Reversed: gradients, replaced by the gradient of the state after the chunk.
    Without `KEEP` nothing else is written: the states of a window are only computed again.

    The row `pieces[i, 2:]` says where piece i comes from (an entering state, or -1 for zero) and where it leads: to
    the entering state of the next piece, from `n_entries` on to a final state, or nowhere (-1).
    Grid (pieces, state heads, blocks of a state).
    """
    piece, head = first_piece + tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = at < SIZE
    first, count = tl.load(pieces + 4 * piece), tl.load(pieces + 4 * piece + 1)
    comes_from, leads_to = tl.load(pieces + 4 * piece + 2), tl.load(pieces + 4 * piece + 3)
    entry = entries + (comes_from * S + head) * SIZE + at
    next_entry = entries + (leads_to * S + head) * SIZE + at
    begins = at < tl.where(comes_from >= 0, SIZE, 0)
    goes_on = at < tl.where((leads_to >= 0) & (leads_to < n_entries), SIZE, 0)
    ends = at < tl.where(leads_to >= n_entries, SIZE, 0)
    if REVERSE:
        state = tl.load(next_entry, mask=goes_on, other=0.0)
        if HAS_FINALS:
            final = finals + ((leads_to - n_entries) * S + head) * SIZE + at
            state += tl.load(final, mask=ends, other=0.0)
    else:
        state = tl.load(entry, mask=begins, other=0.0)
    for i in range(0, count):
        c = first + (count - 1 - i if REVERSE else i)
        own = states + (c * S + head) * SIZE + at
        added = tl.load(own, mask=exists, other=0.0)
        tl.store(own, state, mask=exists)
        state = state * tl.exp(tl.load(decays + c * S + head)) + added
    if REVERSE:
        tl.store(entry, state, mask=begins)
    elif KEEP:
        tl.store(next_entry, state, mask=goes_on)
        if HAS_FINALS:
            final = finals + ((leads_to - n_entries) * S + head) * SIZE + at
            tl.store(final, state, mask=ends)


@triton.jit
def output_kernel(
    x, dt, A, B, C, chunks, states, y, sums,
    H, S, R, Q, P, K, smallest,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes y from within the chunk and from the state before it. Grid (chunks, query heads, tiles of p)."""
    c, h, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BP
    head = h // Q
    second = is_second(chunks, c, PAIR)
    x, x_n, x_g = tensor_of(x, second, PAIR)
    B, B_n, B_g = tensor_of(B, second, PAIR)
    C, C_n, C_h = tensor_of(C, second, PAIR)
    y = of(y, second, PAIR)
    sums = of(sums, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    step, a, _ = steps_of(dt, A, rows, inside, second, head, PAIR)
    base = states + (c * S + head) * (P + NORMALIZED) * K
    scores = tl.zeros([L, L], tl.float32)
    out = tl.zeros([L, BP], tl.float32)
    total = tl.zeros([L], tl.float32)
    for k0 in range(0, K, BK):
        queries = load_rows(C + h * C_h, C_n, rows, inside, k0, K, BK)
        keys = load_rows(B + head // R * B_g, B_n, rows, inside, k0, K, BK)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        before = load_state(base, p0, k0, P, K, BP, BK)
        out = tl.dot(queries, tl.trans(before).to(queries.dtype), out, input_precision=PRECISION)
        if NORMALIZED:
            total += tl.sum(queries.to(tl.float32) * load_vector(base + P * K, k0, K, BK)[None, :], 1)
    weights = scores * decays_between(a, L) * step[None, :]
    values = load_rows(x + head // R * x_g, x_n, rows, inside, p0, P, BP)
    out *= tl.exp(a)[:, None]
    out = tl.dot(weights.to(values.dtype), values, out, input_precision=PRECISION)
    if NORMALIZED:
        total = total * tl.exp(a) + tl.sum(weights, 1)
        out = out / tl.maximum(total, smallest)[:, None]
        if p0 == 0:
            tl.store(sums + rows * H + h, total, mask=inside)
    store_rows(y + h * P, H * P, rows, inside, p0, P, out, BP)
