"""Which GPU packages can run here, and which kernels an operation takes; each choice is logged once."""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch


logger = logging.getLogger(__name__)

REMEDIES = {
    "triton": "pip install triton (Linux with an NVIDIA or AMD GPU)",
    "mamba_ssm": "pip install mamba-ssm einops (MAMBA_SKIP_CUDA_BUILD=TRUE spares the CUDA toolkit)",
    "flash_attn": "pip install flash-attn (with the CUDA toolkit)",
    "torch.nn.attention.varlen": "upgrade torch to 2.10 or later",
}
# Where a package's kernels are, if not in the package itself.
MODULES = {"mamba_ssm": "mamba_ssm.ops.triton.ssd_combined"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What can be named for each operation.
KERNELS = {
    "ssd": ("auto", "triton", "mamba_ssm", "chunked", "recurrence"),
    "window": ("auto", "flash_attn", "torch_varlen", "sdpa"),
}
ENVIRONMENT = "LINMU_KERNELS"  # such as "ssd=chunked,window=sdpa"; read once

_probed: dict[str, str | None] = {}
_logged: set[str] = set()


def _known(named: Mapping[str, str]) -> dict[str, str]:
    for operation, name in named.items():
        if name not in KERNELS.get(operation, ()):
            choices = ", ".join(f"{one}={'|'.join(names)}" for one, names in KERNELS.items())
            raise ValueError(f"kernels {operation}={name} are unknown; choose from {choices}")
    return dict(named)


def read_environment() -> dict[str, str]:
    """Returns the kernels that the environment variable `LINMU_KERNELS` names, `"auto"` for the others."""
    pairs = (pair.partition("=") for pair in os.environ.get(ENVIRONMENT, "").split(",") if pair.strip())
    return dict.fromkeys(KERNELS, "auto") | _known({operation.strip(): name.strip() for operation, _, name in pairs})


_named = read_environment()


@contextmanager
def use_kernels(**kernels: str) -> Iterator[None]:
    """
    Names the kernels of operations within a `with` block, in every thread; operations left out stay as they are.

    Args:
        ssd (`str`, *optional*): Kernels of the scan, as in [`~linmu_hf.ops.ssd.scan.ssd`].
        window (`str`, *optional*): `"flash_attn"`, `"torch_varlen"`, `"sdpa"` or `"auto"`, for attention in windows.

    Raises:
        `ValueError`: There is no such operation, or no such kernels of it.
    """
    before = dict(_named)
    _named.update(_known(kernels))
    try:
        yield
    finally:
        _named.update(before)


def choose(
    operation: str, x: torch.Tensor, named: str, why_unfit: Callable, why_wrong: Callable,
    automatic: Sequence[str], otherwise: str,
) -> str:  # fmt: skip
    """
    Returns the kernels of an operation on `x`: those that are named; else, on a GPU, the first usable of `automatic`;
    else `otherwise`. Logs once why earlier ones were rejected.

    Args:
        operation (`str`): A key of `KERNELS`.
        named (`str`): What the caller asks for; `"auto"` leaves it to [`use_kernels`].
        why_unfit (`Callable`): Says of a name and `x` why such kernels cannot run, or `None`.
        why_wrong (`Callable`): Says of a name and a device why the self-check failed, or `None`.

    Raises:
        `ValueError`: The named kernels are unknown, or cannot run here; the message says what they need.
    """
    named = _known({operation: _named[operation] if named == "auto" else named})[operation]
    if named != "auto":
        if reason := why_unfit(named, x):
            raise ValueError(f"kernels {operation}={named} cannot run: {reason}")
        return named
    if not x.is_cuda:
        return otherwise
    rejected: list[str] = []
    for name in automatic:
        reason = why_unfit(name, x) or why_wrong(name, x.device)
        if reason is None:
            break
        rejected.append(f"{name}: {reason}")
    else:
        name = otherwise
    log_once(f"{operation}: {name}{', since ' if rejected else ''}{'; '.join(rejected)}")
    return name


# torch.compile takes the results of these as constants while it traces
@torch.compiler.assume_constant_result
def _import_error(package: str) -> str | None:
    if package not in _probed:
        _probed[package] = _probe(package)
    return _probed[package]


def _probe(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: {REMEDIES[package]}"
    try:
        import_kernels(package)
    except Exception as error:  # a package built for another torch raises whatever its loader raises
        return f"{package} does not import ({type(error).__name__}: {error}): {REMEDIES[package]}"
    return None


def import_kernels(package: str) -> ModuleType:
    """
    Imports the module with a package's kernels, without the package's own `__init__` where that fails: mamba-ssm also
    imports CUDA extensions and models, and a wheel built without CUDA has no extensions.

    Raises:
        `ImportError`: Or whatever else importing the kernels raises.
    """
    module = MODULES.get(package, package)
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except Exception:  # an extension built for another torch raises whatever its loader raises
            spec = importlib.util.find_spec(package)
            if package in sys.modules or spec is None or spec.submodule_search_locations is None:
                raise  # the package itself imports: it is its kernels that do not
            sys.modules[package] = bare = ModuleType(package)
            bare.__path__ = list(spec.submodule_search_locations)
            try:
                importlib.import_module(module)
            finally:
                del sys.modules[package]  # others who import the package find it as it was
    return sys.modules[module]


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    """Whether Triton runs kernels in Python (`TRITON_INTERPRET=1`), which it does on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(
    package: str, x: torch.Tensor, dtypes: Sequence[torch.dtype] = DTYPES, instead: str = "chunked"
) -> str | None:
    """
    Returns why the kernels of `package`, which take `dtypes`, cannot take a tensor like `x`, with the remedy (one of
    them: the kernels `instead`); `None` if they can.
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


def multiplies_in_bfloat16(x: torch.Tensor) -> bool:
    """Returns whether x is in bfloat16 on a CPU that multiplies such matrices faster than those in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _cpu_has_bfloat16()


@torch.compiler.assume_constant_result
def _cpu_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


@torch.compiler.assume_constant_result
def log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
