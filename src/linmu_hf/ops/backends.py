"""Which GPU packages can run here; each is looked for once, and each choice is logged once."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping

import torch


logger = logging.getLogger(__name__)

REMEDIES = {
    "triton": "pip install triton (Linux with an NVIDIA or AMD GPU)",
    "mamba_ssm": "pip install mamba-ssm einops (MAMBA_SKIP_CUDA_BUILD=TRUE spares the CUDA toolkit)",
    "causal_conv1d": "pip install causal-conv1d (with the CUDA toolkit)",
    "flash_attn": "pip install flash-attn (with the CUDA toolkit)",
    "torch.nn.attention.varlen": "upgrade torch to 2.10 or later",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


ENVIRONMENT = "LINMU_SSD_BACKEND"  # what "auto" stands for, where it is set

_probed: dict[str, str | None] = {}
_said: set[str] = set()


# torch.compile takes what these return as it is while it traces
@torch.compiler.assume_constant_result
def _import_error(package: str) -> str | None:
    if package not in _probed:
        _probed[package] = _probe(package)
    return _probed[package]


def _probe(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: {REMEDIES[package]}"
    try:
        if package == "mamba_ssm":
            from .ssd.mamba_ssm import chunk_scan

            chunk_scan()
        else:
            importlib.import_module(package)
    except Exception as error:  # a package built for another torch raises whatever its loader raises
        return f"{package} does not import ({type(error).__name__}: {error}): {REMEDIES[package]}"
    return None


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    """Whether Triton runs kernels in Python (`TRITON_INTERPRET=1`), which it does on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(package: str, x: torch.Tensor, dtypes=DTYPES, instead: str = "chunked") -> str | None:
    """
    Why the kernels of `package`, which take `dtypes`, cannot take a tensor like `x`, with the remedy (for one, the
    backend `instead`); `None` if they can.
    """
    reason = _import_error(package)
    if reason:
        return reason
    if x.dtype not in dtypes:
        taken = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"x is {x.dtype}, and the kernels take {taken}: convert it, or use {instead!r}"
    if not x.is_cuda and not (package == "triton" and _interprets()):
        return f"x is on {x.device.type!r}, and the kernels need a GPU: move it there, or use {instead!r}"
    return None


def kernels_serve(x: torch.Tensor) -> bool:
    """Whether the kernels around the scan take over: on a GPU with Triton, unless another backend is named."""
    from .self_check import failed_trial

    wanted = os.environ.get(ENVIRONMENT, "auto")
    if not x.is_cuda or wanted not in ("auto", "triton") or missing("triton", x) is not None:
        return False
    return wanted == "triton" or failed_trial(x.device) is None


def multiplies_in_bfloat16(x: torch.Tensor) -> bool:
    """Whether x is in bfloat16 on a CPU that multiplies such matrices faster than those in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _cpu_has_bfloat16()


@torch.compiler.assume_constant_result
def _cpu_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


@torch.compiler.assume_constant_result
def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


def first_that_runs(what: str, reasons: Mapping[str, Callable[[], str | None]], otherwise: str) -> str | None:
    """
    The first of several kernels for `what` against which nothing speaks, or `None`; said once, with what speaks
    against those before it.

    Args:
        reasons (`dict[str, Callable]`): Gives for every name, in order of preference, why it cannot run.
        otherwise (`str`): What is said to take over if none can.
    """
    found: dict[str, str] = {}
    chosen = None
    for name, reason_of in reasons.items():
        reason = reason_of()
        if reason is None:
            chosen = name
            break
        found[name] = reason
    because = f", since {'; '.join(f'{name}: {reason}' for name, reason in found.items())}" if found else ""
    say_once(f"{what}: {chosen or otherwise}{because}")
    return chosen
