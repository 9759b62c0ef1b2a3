"""The selective scan in plain PyTorch: the recurrence (the truth), its chunked form, and the streaming form.

Contract and glossary: `ssd.py`. Inside a chunk (l and r count its tokens, c counts chunks), with a_l the running sum
of dt * A, the chunked form is

    1. within the chunk     y_l += sum_{r <= l} exp(a_l - a_r) dt_r (C_l . B_r) x_r
    2. state of the chunk   S_c  = sum_r exp(a_end - a_r) dt_r x_r B_r^T
    3. from chunk to chunk  h_c  = exp(a_end) h_{c-1} + S_c
    4. from before          y_l += exp(a_l) C_l . h_{c-1}
"""

import torch


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def ssd_recurrence(x, dt, A, B, C, segments, initial_states=None):
    """Token by token, as Eq. 1 is written."""
    dtype = _compute_dtype(x)
    (n, g, p), s, k = x.shape, dt.shape[-1], B.shape[-1]
    per_group = s // g
    x_s = x.to(dtype).repeat_interleave(per_group, dim=1)
    B_s = B.to(dtype).repeat_interleave(per_group, dim=1)
    C_s = C.to(dtype).view(n, s, -1, k)
    dt, A = dt.to(dtype), A.to(dtype)
    outputs, finals, start = [], [], 0
    for segment, length in enumerate(segments.lengths):
        h = x.new_zeros(s, p, k, dtype=dtype) if initial_states is None else initial_states[segment].to(dtype)
        for t in range(start, start + length):
            decay = torch.exp(dt[t] * A)[:, None, None]
            h = decay * h + dt[t, :, None, None] * x_s[t, :, :, None] * B_s[t, :, None, :]
            outputs.append(torch.einsum("sqk,spk->sqp", C_s[t], h).flatten(0, 1))
        finals.append(h)
        start += length
    return torch.stack(outputs).to(x.dtype), torch.stack(finals)


def ssd_chunked(x, dt, A, B, C, segments, initial_states=None):
    """All chunks at once as batched matrix products; only step 3 walks along the chunks."""
    dtype, out_dtype = _compute_dtype(x), x.dtype
    (_, g, p), s, h, k = x.shape, dt.shape[-1], C.shape[1], B.shape[-1]
    r, q, size = s // g, h // s, segments.chunk_size

    x, dt, B, C = (_to_chunks(tensor.to(dtype), segments) for tensor in (x, dt, B, C))
    c = x.shape[0]
    x = x.transpose(1, 2)  # [c, g, l, p]
    B = B.transpose(1, 2)  # [c, g, l, k]
    C = C.view(c, size, g, r, q, k).permute(0, 2, 3, 4, 1, 5)  # [c, g, r, q, l, k]
    dt = dt.transpose(1, 2)  # [c, s, l]
    a = torch.cumsum(dt * A.to(dtype)[:, None], dim=-1)  # [c, s, l]

    # 1. within the chunk
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    weights = (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf).exp() * dt[..., None, :]
    scores = (C.reshape(c, g, r * q * size, k) @ B.transpose(-1, -2)).view(c, g, r, q, size, size)
    scores = scores * weights.view(c, g, r, 1, size, size)
    y = scores.view(c, g, r * q * size, size) @ x  # [c, g, r q l, p]

    # 2. state of the chunk
    to_end = (a[..., -1:] - a).exp() * dt  # [c, s, l]
    x_weighted = x.transpose(-1, -2)[:, :, None] * to_end.view(c, g, r, 1, size)  # [c, g, r, p, l]
    chunk_states = (x_weighted.reshape(c, g, r * p, size) @ B).view(c, s, p, k)

    # 3. from chunk to chunk
    before, finals = _pass_states(chunk_states, a[..., -1].exp(), segments, initial_states)

    # 4. from before
    if before is not None:
        from_before = C.reshape(c, s, q * size, k) @ before.transpose(-1, -2)  # [c, s, q l, p]
        from_before = from_before.view(c, s, q, size, p) * a.exp()[:, :, None, :, None]
        y = y.view(c, s, q, size, p) + from_before

    y = y.view(c, h, size, p).transpose(1, 2).reshape(c * size, h, p)
    y = y if segments.slots is None else y.index_select(0, segments.slots)
    return y.to(out_dtype), finals


def _to_chunks(tensor, segments):
    """[n, ...] -> [c, chunk_size, ...], segments padded with zeros to whole chunks (dt = 0 leaves states alone)."""
    if segments.slots is not None:
        padded = tensor.new_zeros(sum(segments.steps) * segments.chunk_size, *tensor.shape[1:])
        tensor = padded.index_copy(0, segments.slots, tensor)
    return tensor.reshape(-1, segments.chunk_size, *tensor.shape[1:])


def _pass_states(chunk_states, decays, segments, initial_states):
    """
    States before each chunk and after each segment, from the chunks' own states [c, s, p, k] and decays [c, s].

    Step i handles the i-th chunk of every segment that has one. The state before is `None` if it is zero everywhere.
    """
    m, steps, rank = len(segments), segments.steps, segments.rank
    if initial_states is None and len(steps) == 1:
        return None, chunk_states if rank is None else chunk_states[rank]
    if initial_states is None:
        state = chunk_states.new_zeros(m, *chunk_states.shape[1:])
    else:
        state = initial_states.to(chunk_states)
        state = state if rank is None else torch.zeros_like(state).index_copy(0, rank, state)
    before, finals = [], []
    for own, decay, going_on in zip(chunk_states.split(steps), decays.split(steps), (*steps[1:], 0), strict=True):
        before.append(state)
        state = torch.addcmul(own, state, decay[..., None, None])
        state, finished = state.split((going_on, len(state) - going_on))
        finals.append(finished)
    finals = torch.cat(finals[::-1])
    return torch.cat(before), finals if rank is None else finals[rank]


def ssd_streaming(x, dt, A, B, C, segments, initial_states=None, piece: int = 1024):
    """Chunked pieces of every segment one after the other, carrying the states: constant memory."""
    if initial_states is None:
        shape = (len(segments), dt.shape[-1], x.shape[-1], B.shape[-1])
        initial_states = x.new_zeros(shape, dtype=_compute_dtype(x))
    outputs, finals, start = [], [], 0
    for state, length in zip(initial_states, segments.lengths, strict=True):
        state = state[None]
        for begin in range(start, start + length, piece):
            rows = slice(begin, min(begin + piece, start + length))
            part = type(segments).build([rows.stop - rows.start], x.device)
            y, state = ssd_chunked(x[rows], dt[rows], A, B[rows], C[rows], part, state)
            outputs.append(y)
        finals.append(state)
        start += length
    return torch.cat(outputs), torch.cat(finals)
