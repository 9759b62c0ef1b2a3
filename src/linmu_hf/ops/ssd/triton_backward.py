"""Kernels of the chunked selective scan, backward; names as in `triton_forward.py`.

With T the tokens l >= r of a chunk, W_lr = exp(a_l - a_r), G_lr = C_l . B_r, M_lr = dy_l . x_r, h the state before
the chunk and dh the gradient of the state after it:

    dC_l = sum_r M W dt_r B_r + exp(a_l) dy_l h               dB_r = sum_l M W dt_r C_l + exp(a_end - a_r) dt_r x_r dh
    dx_r = sum_l G W dt_r dy_l + exp(a_end - a_r) dt_r B_r dh
    da_l = sum_r (M G W dt)_lr - sum_r (M G W dt)_rl + ...    d(dt A)_t = sum of da over the chunk's tokens from t on

A normalised scan divides by n_l: with y the quotient, dy_l means dy_l / n_l in all of this, and the channel of
ones has the gradient `slope`_l = -(dy_l . y_l) / n_l, which enters M as one more channel of x that is 1.
"""

import triton
import triton.language as tl

from .triton_forward import (
    decays_between,
    is_second,
    load_rows,
    load_state,
    load_vector,
    of,
    steps_of,
    store_rows,
    tensor_of,
    tokens_of,
)


@triton.jit
def scale_of(sums, slopes, rows, inside, h, H, smallest, NORMALIZED: tl.constexpr):
    """Returns 1 / n and the gradient of n, [L] each; 1 and 0 if the scan is not normalised."""
    scale = inside.to(tl.float32)
    slope = tl.zeros_like(scale)
    if NORMALIZED:
        scale = scale / tl.maximum(tl.load(sums + rows * H + h, mask=inside, other=1.0), smallest)
        slope = tl.load(slopes + rows * H + h, mask=inside, other=0.0)
    return scale, slope


@triton.jit
def slopes_kernel(y, dy, sums, slopes, N, P, smallest, ROWS: tl.constexpr, BP: tl.constexpr):
    """Computes the gradient of the normaliser n of every row [n h], 0 where n was clamped. Grid (blocks of rows,)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    product = tl.zeros([ROWS], tl.float32)
    for p0 in range(0, P, BP):
        gradient = load_rows(dy, P, rows, inside, p0, P, BP).to(tl.float32)
        product += tl.sum(gradient * load_rows(y, P, rows, inside, p0, P, BP).to(tl.float32), 1)
    total = tl.load(sums + rows, mask=inside, other=1.0)
    slope = tl.where(total >= smallest, -product / tl.maximum(total, smallest), 0.0)
    tl.store(slopes + rows, slope, mask=inside)


@triton.jit
def chunk_state_grads_kernel(
    dy, dt, A, C, chunks, sums, slopes, dstates,
    H, S, Q, P, K, smallest,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    Computes what each chunk's outputs add to the gradient of the state before it. Grid as in `chunk_states_kernel`.
    """
    c, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = tl.cdiv(K, BK)
    p0, k0 = tl.program_id(2) // tiles * BP, tl.program_id(2) % tiles * BK
    second = is_second(chunks, c, PAIR)
    C, C_n, C_h = tensor_of(C, second, PAIR)
    dy = of(dy, second, PAIR)
    sums = of(sums, second, PAIR)
    slopes = of(slopes, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    _, a, _ = steps_of(dt, A, rows, inside, second, head, PAIR)
    added = tl.zeros([BP, BK], tl.float32)
    ones = tl.zeros([BK], tl.float32)
    for h in range(head * Q, head * Q + Q):
        scale, slope = scale_of(sums, slopes, rows, inside, h, H, smallest, NORMALIZED)
        gradient = load_rows(dy + h * P, H * P, rows, inside, p0, P, BP)
        queries = load_rows(C + h * C_h, C_n, rows, inside, k0, K, BK).to(tl.float32) * tl.exp(a)[:, None]
        weighted = (queries * scale[:, None]).to(gradient.dtype)
        added = tl.dot(tl.trans(gradient), weighted, added, input_precision=PRECISION)
        if NORMALIZED:
            ones += tl.sum(queries * slope[:, None], 0)
    base = dstates + (c * S + head) * (P + NORMALIZED) * K
    p, k = p0 + tl.arange(0, BP), k0 + tl.arange(0, BK)
    tl.store(base + p[:, None] * K + k[None, :], added, mask=(p < P)[:, None] & (k < K)[None, :])
    if NORMALIZED:
        if p0 == 0:
            tl.store(base + P * K + k, ones, mask=k < K)


@triton.jit
def c_grad_kernel(
    x, dy, dt, A, B, chunks, states, sums, slopes, dC,
    H, S, R, Q, P, K, smallest,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dC. Grid (chunks, query heads, tiles of k)."""
    c, h, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BK
    head = h // Q
    second = is_second(chunks, c, PAIR)
    x, x_n, x_g = tensor_of(x, second, PAIR)
    B, B_n, B_g = tensor_of(B, second, PAIR)
    dy = of(dy, second, PAIR)
    sums = of(sums, second, PAIR)
    slopes = of(slopes, second, PAIR)
    dC = of(dC, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    step, a, _ = steps_of(dt, A, rows, inside, second, head, PAIR)
    scale, slope = scale_of(sums, slopes, rows, inside, h, H, smallest, NORMALIZED)
    base = states + (c * S + head) * (P + NORMALIZED) * K
    products = tl.zeros([L, L], tl.float32)
    out = tl.zeros([L, BK], tl.float32)
    for p0 in range(0, P, BP):
        gradient = load_rows(dy + h * P, H * P, rows, inside, p0, P, BP)
        values = load_rows(x + head // R * x_g, x_n, rows, inside, p0, P, BP)
        products = tl.dot(gradient, tl.trans(values), products, input_precision=PRECISION)
        before = load_state(base, p0, k0, P, K, BP, BK)
        out = tl.dot(gradient, before.to(gradient.dtype), out, input_precision=PRECISION)
    products = products * scale[:, None] + slope[:, None]
    out *= scale[:, None]
    if NORMALIZED:
        out += slope[:, None] * load_vector(base + P * K, k0, K, BK)[None, :]
    products *= decays_between(a, L) * step[None, :]
    keys = load_rows(B + head // R * B_g, B_n, rows, inside, k0, K, BK)
    out *= tl.exp(a)[:, None]
    out = tl.dot(products.to(keys.dtype), keys, out, input_precision=PRECISION)
    store_rows(dC + h * K, H * K, rows, inside, k0, K, out, BK)


@triton.jit
def b_grad_kernel(
    x, dy, dt, A, C, chunks, dstates, sums, slopes, dB,
    H, S, R, Q, P, K, smallest,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dB, summed over the heads of a key/value head. Grid (chunks, key/value heads, tiles of k)."""
    c, g, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BK
    second = is_second(chunks, c, PAIR)
    x, x_n, x_g = tensor_of(x, second, PAIR)
    C, C_n, C_h = tensor_of(C, second, PAIR)
    dy = of(dy, second, PAIR)
    sums = of(sums, second, PAIR)
    slopes = of(slopes, second, PAIR)
    dB = of(dB, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    out = tl.zeros([L, BK], tl.float32)
    for head in range(g * R, g * R + R):
        step, a, end = steps_of(dt, A, rows, inside, second, head, PAIR)
        base = dstates + (c * S + head) * (P + NORMALIZED) * K
        written = tl.zeros([L, BK], tl.float32)
        for p0 in range(0, P, BP):
            values = load_rows(x + g * x_g, x_n, rows, inside, p0, P, BP)
            after = load_state(base, p0, k0, P, K, BP, BK)
            written = tl.dot(values, after.to(values.dtype), written, input_precision=PRECISION)
        if NORMALIZED:
            written += load_vector(base + P * K, k0, K, BK)[None, :]
        out += written * (tl.exp(end - a) * step)[:, None]
        weights = decays_between(a, L) * step[None, :]
        for h in range(head * Q, head * Q + Q):
            scale, slope = scale_of(sums, slopes, rows, inside, h, H, smallest, NORMALIZED)
            products = tl.zeros([L, L], tl.float32)
            for p0 in range(0, P, BP):
                gradient = load_rows(dy + h * P, H * P, rows, inside, p0, P, BP)
                values = load_rows(x + g * x_g, x_n, rows, inside, p0, P, BP)
                products = tl.dot(gradient, tl.trans(values), products, input_precision=PRECISION)
            products = (products * scale[:, None] + slope[:, None]) * weights
            queries = load_rows(C + h * C_h, C_n, rows, inside, k0, K, BK)
            out = tl.dot(tl.trans(products.to(queries.dtype)), queries, out, input_precision=PRECISION)
    store_rows(dB + g * K, S // R * K, rows, inside, k0, K, out, BK)


@triton.jit
def x_grad_kernel(
    dy, dt, A, B, C, chunks, dstates, sums, slopes, dx,
    H, S, R, Q, P, K, smallest,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dx, summed over the heads of a key/value head. Grid (chunks, key/value heads, tiles of p)."""
    c, g, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BP
    second = is_second(chunks, c, PAIR)
    B, B_n, B_g = tensor_of(B, second, PAIR)
    C, C_n, C_h = tensor_of(C, second, PAIR)
    dy = of(dy, second, PAIR)
    sums = of(sums, second, PAIR)
    slopes = of(slopes, second, PAIR)
    dx = of(dx, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    out = tl.zeros([L, BP], tl.float32)
    for head in range(g * R, g * R + R):
        step, a, end = steps_of(dt, A, rows, inside, second, head, PAIR)
        base = dstates + (c * S + head) * (P + NORMALIZED) * K
        written = tl.zeros([L, BP], tl.float32)
        for k0 in range(0, K, BK):
            keys = load_rows(B + g * B_g, B_n, rows, inside, k0, K, BK)
            after = load_state(base, p0, k0, P, K, BP, BK)
            written = tl.dot(keys, tl.trans(after).to(keys.dtype), written, input_precision=PRECISION)
        out += written * (tl.exp(end - a) * step)[:, None]
        decays = decays_between(a, L) * step[None, :]
        for h in range(head * Q, head * Q + Q):
            scale, _ = scale_of(sums, slopes, rows, inside, h, H, smallest, NORMALIZED)
            scores = tl.zeros([L, L], tl.float32)
            for k0 in range(0, K, BK):
                queries = load_rows(C + h * C_h, C_n, rows, inside, k0, K, BK)
                keys = load_rows(B + g * B_g, B_n, rows, inside, k0, K, BK)
                scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
            weights = scores * decays * scale[:, None]
            gradient = load_rows(dy + h * P, H * P, rows, inside, p0, P, BP)
            out = tl.dot(tl.trans(weights.to(gradient.dtype)), gradient, out, input_precision=PRECISION)
    store_rows(dx + g * P, S // R * P, rows, inside, p0, P, out, BP)


@triton.jit
def dt_grad_kernel(
    x, dy, dt, A, B, C, chunks, states, dstates, sums, slopes, ddt, dA,
    H, S, R, Q, P, K, smallest,
    L: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    NORMALIZED: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes ddt, and what each chunk adds to dA [c, s]. Grid (chunks, state heads)."""
    c, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g = head // R
    second = is_second(chunks, c, PAIR)
    x, x_n, x_g = tensor_of(x, second, PAIR)
    B, B_n, B_g = tensor_of(B, second, PAIR)
    C, C_n, C_h = tensor_of(C, second, PAIR)
    dy = of(dy, second, PAIR)
    sums = of(sums, second, PAIR)
    slopes = of(slopes, second, PAIR)
    ddt = of(ddt, second, PAIR)
    rows, inside = tokens_of(chunks, c, L)
    step, a, end = steps_of(dt, A, rows, inside, second, head, PAIR)
    base = (c * S + head) * (P + NORMALIZED) * K
    decays = decays_between(a, L)
    token = tl.arange(0, L)
    da = tl.zeros([L], tl.float32)
    direct = tl.zeros([L], tl.float32)

    # within the chunk, and from the state before it
    for h in range(head * Q, head * Q + Q):
        scale, slope = scale_of(sums, slopes, rows, inside, h, H, smallest, NORMALIZED)
        scores = tl.zeros([L, L], tl.float32)
        products = tl.zeros([L, L], tl.float32)
        from_before = tl.zeros([L], tl.float32)
        for p0 in range(0, P, BP):
            gradient = load_rows(dy + h * P, H * P, rows, inside, p0, P, BP)
            values = load_rows(x + g * x_g, x_n, rows, inside, p0, P, BP)
            products = tl.dot(gradient, tl.trans(values), products, input_precision=PRECISION)
        for k0 in range(0, K, BK):
            queries = load_rows(C + h * C_h, C_n, rows, inside, k0, K, BK)
            keys = load_rows(B + g * B_g, B_n, rows, inside, k0, K, BK)
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
            read = tl.zeros([L, BK], tl.float32)
            for p0 in range(0, P, BP):
                gradient = load_rows(dy + h * P, H * P, rows, inside, p0, P, BP)
                before = load_state(states + base, p0, k0, P, K, BP, BK)
                read = tl.dot(gradient, before.to(gradient.dtype), read, input_precision=PRECISION)
            read *= scale[:, None]
            if NORMALIZED:
                read += slope[:, None] * load_vector(states + base + P * K, k0, K, BK)[None, :]
            from_before += tl.sum(read * queries.to(tl.float32), 1)
        pairs = (products * scale[:, None] + slope[:, None]) * scores * decays
        direct += tl.sum(pairs, 0)
        # a pair l = r does not depend on a; left in, it would have to cancel
        pairs = tl.where(token[:, None] > token[None, :], pairs * step[None, :], 0.0)
        da += tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.exp(a) * from_before

    # the state after the chunk
    written = tl.zeros([L], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for k0 in range(0, K, BK):
        keys = load_rows(B + g * B_g, B_n, rows, inside, k0, K, BK).to(tl.float32)
        product = tl.zeros([L, BK], tl.float32)
        for p0 in range(0, P, BP):
            values = load_rows(x + g * x_g, x_n, rows, inside, p0, P, BP)
            after = load_state(dstates + base, p0, k0, P, K, BP, BK)
            product = tl.dot(values, after.to(values.dtype), product, input_precision=PRECISION)
            kept += tl.sum(after * load_state(states + base, p0, k0, P, K, BP, BK), 0)
        if NORMALIZED:
            after_ones = load_vector(dstates + base + P * K, k0, K, BK)
            product += after_ones[None, :]
            kept += after_ones * load_vector(states + base + P * K, k0, K, BK)
        written += tl.sum(product * keys, 1)
    written *= tl.exp(end - a)
    direct += written
    written *= step
    written_before = tl.cumsum(written, 0) - written
    dlog = tl.cumsum(da, 0, reverse=True) + written_before + tl.exp(end) * tl.sum(kept, 0)
    gradient_dt = direct + dlog * tl.load(of(A, second, PAIR) + head).to(tl.float32)
    tl.store(ddt + rows * S + head, gradient_dt, mask=inside)
    tl.store(dA + c * S + head, tl.sum(dlog * step, 0))
