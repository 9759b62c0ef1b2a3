"""Stand-ins for kernels of attention to sequences of any lengths: they refuse what those on a GPU refuse."""

import sys
from types import ModuleType

import pytest
import torch


def install(monkeypatch, name: str) -> list[torch.Size]:
    """
    Puts the stand-in of a backend in its place (`"torch_varlen 2.11"` is that of a PyTorch whose kernel knows no
    grouped heads); the list gets the shape of the queries of every call.
    """
    calls: list[torch.Size] = []

    def attend(q, k, v, offsets, longest, scale, causal, with_lse):
        n, h, d = q.shape
        assert k.shape == v.shape == (n, k.shape[1], d) and h % k.shape[1] == 0 and d % 8 == 0
        assert q.dtype == k.dtype == v.dtype and all(t.stride(-1) == 1 for t in (q, k, v))
        assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == n
        assert longest == offsets.diff().max()
        calls.append(q.shape)
        together = torch.block_diag(*(torch.ones(size, size) for size in offsets.diff().tolist())).bool()
        if causal:
            together = together.tril()
        k, v = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (k, v))
        scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~together, -torch.inf)
        y, lse = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)
        return (y, lse.detach()) if with_lse else y

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=None, causal=False, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        result = attend(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, return_attn_probs)
        return (*result, None) if return_attn_probs else result

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        assert cu_seq_q is cu_seq_k and max_q == max_k and window_size in ((-1, -1), (-1, 0))
        assert enable_gqa or query.shape == key.shape
        with_lse = return_aux is not None and return_aux.lse
        return attend(query, key, value, cu_seq_q, max_q, scale, window_size == (-1, 0), with_lse)

    if name == "flash_attn":
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    else:
        varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later has it")

        def older(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1),
        ):  # fmt: skip
            return varlen_attn(
                query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
                window_size=window_size,
            )  # fmt: skip

        monkeypatch.setattr(varlen, "varlen_attn", older if name.endswith("2.11") else varlen_attn)
    return calls
