"""The selective scan by the kernels of the mamba-ssm package, for GPUs where ours do not run.

Those kernels know neither fewer key/value heads than query heads nor states per packed segment, so x and B are
repeated and segments of one length go together as a batch. They count offsets in 32 bits: a call gets no more tokens
than that can address, and a longer segment is cut into calls that hand on their states.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import torch


CHUNK = 128
LAST_OFFSET = 2**31 - 1

PACKAGE = "mamba_ssm"
KERNELS = f"{PACKAGE}.ops.triton.ssd_combined"


def chunk_scan():
    """
    `mamba_chunk_scan_combined`. It needs PyTorch, Triton and einops, but the package also imports its CUDA extensions
    and its models; where one of them does not import (a wheel built without CUDA has no extension), the kernels are
    imported without the package's own `__init__`.

    Raises:
        `ImportError`: Or whatever else importing the kernels raises.
    """
    if KERNELS not in sys.modules:
        try:
            importlib.import_module(KERNELS)
        except Exception:  # an extension built for another torch raises whatever its loader raises
            if PACKAGE in sys.modules:
                raise  # the package itself imports: it is its kernels that do not
            _import_without_package()
    return sys.modules[KERNELS].mamba_chunk_scan_combined


def _import_without_package() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"no package {PACKAGE}")
    sys.modules[PACKAGE] = bare = ModuleType(PACKAGE)
    bare.__path__ = list(spec.submodule_search_locations)
    try:
        importlib.import_module(KERNELS)
    finally:
        del sys.modules[PACKAGE]  # whoever imports the package itself finds it as it was


def ssd_mamba_ssm(x, dt, A, B, C, segments, initial_states=None):
    """Arguments and results as in [`~linmu_hf.ops.ssd.scan.ssd`], without `normalized` and `index`."""
    mamba_chunk_scan_combined = chunk_scan()
    (n, g, p), s, (h, k), dtype = x.shape, dt.shape[-1], C.shape[1:], x.dtype
    x, B = (t.to(dtype).repeat_interleave(h // g, dim=1) for t in (x, B))
    dt, A = dt.float().repeat_interleave(h // s, dim=-1), A.float().repeat_interleave(h // s)
    if initial_states is None:
        initial_states = x.new_zeros(len(segments), s, p, k, dtype=torch.float32)
    states = initial_states.float().repeat_interleave(h // s, dim=1)

    most = tokens_per_call(h, p, k)
    places, outputs, order, finals = [], [], [], []
    for members, first in _batches(segments.lengths, most):
        state = states[torch.tensor(members, device=x.device)]
        length = segments.lengths[members[0]]
        rows = torch.tensor(first, device=x.device)[:, None] + torch.arange(length, device=x.device)
        for part in rows.split(most, dim=1):
            y, state = mamba_chunk_scan_combined(
                x[part], dt[part], A, B[part], C.to(dtype)[part], CHUNK,
                initial_states=state.contiguous(), return_final_states=True,
            )  # fmt: skip
            places.append(part.flatten())
            outputs.append(y.flatten(0, 1))
        order += members
        finals.append(state)
    y = x.new_empty(n, h, p).index_copy(0, torch.cat(places), torch.cat(outputs).to(dtype))
    back = torch.argsort(torch.tensor(order, device=x.device))
    return y, torch.cat(finals)[back][:, :: h // s].float()


def tokens_per_call(h: int, p: int, k: int) -> int:
    """Tokens whose inputs, chunk states [c, h, p, k] and products [c, h, CHUNK, CHUNK] 32-bit offsets can reach."""
    chunks = LAST_OFFSET // (h * max(p * k, CHUNK * CHUNK, CHUNK * p, CHUNK * k))
    if chunks == 0:
        raise ValueError(
            f"{h} heads with states of {p} x {k} do not fit the 32-bit offsets of mamba-ssm: use another backend"
        )
    return chunks * CHUNK


def _batches(lengths, most: int):
    """Segments of one length, and where they begin, as many at a time as `most` tokens allow."""
    first = 0
    same: dict[int, list[tuple[int, int]]] = {}
    for segment, length in enumerate(lengths):
        same.setdefault(length, []).append((segment, first))
        first += length
    for length, members in same.items():
        count = max(1, most // length)
        for start in range(0, len(members), count):
            yield tuple(list(column) for column in zip(*members[start : start + count]))
