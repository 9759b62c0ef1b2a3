"""What code allocates and multiplies, counted tensor by tensor, on any device and on tensors without data."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Account(TorchDispatchMode):
    """
    A count of the bytes of all tensors that operations return within this context, as long as their memory is held,
    and of the multiplications and additions of matrix products. What an operation needs for itself is not seen.

    Attributes:
        live (`Counter`): Bytes held now, by the tag of the place that allocated them.
        peaks (`dict[str, Counter]`): `live` at the moment when most was held, of the moments of each place.
        flops (`int`): Multiplications and additions, but those of causal attention.
        attention (`int`): Those of causal attention, which grow with the square of the length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.flops = self.attention = self._total = 0
        self._highest: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}  # of every storage, its tag and bytes
        self._tags = ["other"]

    @property
    def peak(self) -> int:
        """Returns the most bytes that were held at once."""
        return max(self._highest.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        packet = func._overloadpacket
        if packet in (FLASH_CPU, FLASH_CPU_BACKWARD):
            forward = packet is FLASH_CPU
            (query, key), products = (args[:2], 2) if forward else (args[1:3], 5)
            causal = args[4:5] if forward else args[7:8]
            (b, h, t, p), size = query.shape, key.shape[2]
            if causal and causal[0]:
                self.attention += products * b * h * t * size * p
            else:
                self.flops += products * 2 * b * h * t * size * p
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs or {}, out_val=out)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return out

    def hold(self, tensor: Tensor, tag: str | None = None) -> None:
        """Counts a tensor's memory under a tag, by default, and if it is new, that of the innermost `tagged`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            if tag is not None:
                old, size, reference = self._known[key]
                self._known[key] = tag, size, reference
                self.live[old] -= size
                self.live[tag] += size
            return
        place, size = self._tags[-1], storage.nbytes()
        self._known[key] = tag or place, size, weakref.ref(storage, lambda _: self._free(key))
        self.live[tag or place] += size
        self._total += size
        if self._total > self._highest[place]:
            self._highest[place], self.peaks[place] = self._total, self.live.copy()

    def _free(self, key: int) -> None:
        tag, size, _ = self._known.pop(key)
        self.live[tag] -= size
        self._total -= size

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Counts what is allocated within under `tag`."""
        self._tags.append(tag)
        try:
            yield
        finally:
            self._tags.pop()

    def tag_calls(self, owner: Any, name: str, tag: str) -> None:
        """Counts what calls of a method allocate under `tag`."""
        method: Callable = getattr(owner, name)

        def tagged(*args, **kwargs):
            with self.tagged(tag):
                return method(*args, **kwargs)

        setattr(owner, name, tagged)

    def tag_gradients(self, model: nn.Module, tag: str = "gradients") -> None:
        """Counts the gradients of parameters under `tag` as soon as they are there."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: self.hold(gradient, tag))
                parameter.register_post_accumulate_grad_hook(lambda p: self.hold(p.grad, tag))
