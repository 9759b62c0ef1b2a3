"""The recurrent cache of an M-MATE layer: one SSM state and the tail of the convolution, whatever the length."""

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, NoReturn

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer

from .compat import CACHE
from .configuration_linmu import LinMUTextConfig


class RopeDeltas(CacheLayerMixin):
    """
    A mixin by which the first layer of a cache keeps how far the next position of every sequence is from the number of
    its tokens, `[b, 1]` (an image advances positions by less than its tokens), and how many of these tokens were
    padding, `[b, 1]`. Both follow all changes of the batch.
    """

    rope_deltas: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self.rope_deltas = self.padding = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_deltas(lambda deltas: deltas.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_deltas(lambda deltas: deltas[indices.to(deltas.device)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_deltas(lambda deltas: deltas[beam_idx.to(deltas.device)])

    def _map_deltas(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.rope_deltas is not None:
            self.rope_deltas = function(self.rope_deltas)
        if self.padding is not None:
            self.padding = function(self.padding)


@lru_cache
def _with_rope_deltas(kind: type) -> type:
    """The class of a key/value layer, with room for rotary offsets."""
    # None: Transformers does not register it. Pickle finds no class that is made at run time.
    own = {"_layer_type": None, "__reduce__": lambda self: (_restore, (kind, vars(self)))}
    return type(kind.__name__, (RopeDeltas, kind), own)


def _restore(kind: type, content: dict[str, Any]) -> Any:
    """Returns a layer out of a pickle."""
    layer: Any = object.__new__(_with_rope_deltas(kind))
    vars(layer).update(content)
    return layer


class MMateCacheLayer(LinearAttentionLayer, RopeDeltas):
    """
    State of the forward scan of one layer for a batch: `[b, s, p, k]` in fp32, the last inputs of the convolution
    `[b, w - 1, c]`, and `slots` for the text tokens in exact attention, each `[b, sinks + window, ...]`.
    [`register_mixer`] enters it into Transformers' dynamic, static and offloaded caches.

    Args:
        max_cache_len (`int`, *optional*):
            Given by static caches. The state needs no room to grow, but the count of tokens is then a tensor, so that
            a compiled decode step is compiled once.
    """

    is_croppable = False

    def __init__(self, max_cache_len: int | None = None, **kwargs: Any):
        LinearAttentionLayer.__init__(self)
        self.keys = self.values = None
        self.is_initialized = False
        self.seen: int | torch.Tensor = 0 if max_cache_len is None else torch.tensor(0)
        self.slots: dict[str, torch.Tensor] = {}
        self.counts: torch.Tensor | None = None  # text and vision tokens of every row, [b, 2]

    def load(self, rows: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        """
        Returns convolution tail and SSM state of the given batch rows (all by default); `(None, None)` at the
        beginning.
        """
        if not self.has_previous_state[0]:
            return None, None
        states = (self.conv_states[0], self.recurrent_states[0])
        return states if rows is None else tuple(t if t is None else t[rows] for t in states)

    def store(
        self, tail: torch.Tensor | None, states: torch.Tensor, batch: int, rows: torch.Tensor | None = None
    ) -> None:
        """Replaces the state after a forward pass; with `rows`, only those of the `batch` rows."""
        for holder, new in ((self.conv_states, tail), (self.recurrent_states, states)):
            if new is None:
                continue
            if rows is not None:
                old = holder[0]
                if old is None or not self.has_previous_state[0]:
                    old = new.new_zeros(batch, *new.shape[1:])
                new = old.index_copy(0, rows, new)
            if new is holder[0]:
                continue  # a decode kernel has written it in place
            if new.requires_grad:
                holder[0] = new  # a copy in place would break the backward pass of the tokens before
            elif holder[0] is not None and holder[0].shape == new.shape:
                holder[0].copy_(new)
            else:
                holder[0] = new.clone()
                _keep_address(holder[0])
        if not self.is_initialized:
            self.device, self.dtype = states.device, states.dtype
            self.is_initialized = True
            if isinstance(self.seen, torch.Tensor):
                self.seen = self.seen.to(states.device)
                _keep_address(self.seen)
        self.has_previous_state[0] = True
        self.is_conv_states_initialized[0] = tail is not None
        self.is_recurrent_states_initialized[0] = True

    def load_slots(self, names: Collection[str], places: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Returns what the slots of `names` hold at `places`, counted over the batch; `None` at the beginning."""
        if places is None:
            return [None] * len(names)
        return [self.slots[name].flatten(0, 1).index_select(0, places) for name in names]

    def store_slots(self, places: torch.Tensor, width: int, batch: int, **values: torch.Tensor) -> None:
        """Puts `values` `[k, ...]` into slots, of which each of the `batch` rows has `width`."""
        for name, new in values.items():
            slots = self.slots.get(name)
            if slots is None or len(slots) != batch:
                slots = new.new_zeros(batch, width, *new.shape[1:])
            flat = slots.flatten(0, 1)
            if new.requires_grad or flat.requires_grad:
                self.slots[name] = flat.index_copy(0, places, new.to(flat.dtype)).view_as(slots)
                continue
            flat.index_copy_(0, places, new.to(flat.dtype))
            if slots is not self.slots.get(name):
                _keep_address(slots)
                self.slots[name] = slots

    def exchange(
        self, slot: torch.Tensor, real: torch.Tensor | None, width: int, **values: torch.Tensor
    ) -> list[torch.Tensor]:
        """
        Puts one token of every row into its slot, in a decode step.

        Args:
            slot (`torch.LongTensor` of shape `[b]`): The slot of each row.
            real (`torch.BoolTensor` of shape `[b]` or `None`): Rows whose token counts.
            width (`int`): Slots of a row.
            values (`torch.Tensor` of shape `[b, ...]`): What to keep, by name.

        Returns:
            `list[torch.Tensor]`: What the slots held before, each `[b, ...]`.
        """
        held = []
        for name, new in values.items():
            slots = self.slots.get(name)
            if slots is None or len(slots) != len(new):
                slots = new.new_zeros(len(new), width, *new.shape[1:])
                _keep_address(slots)
            at = slot.view(-1, *[1] * new.ndim).expand(-1, 1, *new.shape[1:])
            old = slots.gather(1, at)
            new = new[:, None].to(old.dtype)
            if real is not None:
                new = torch.where(real.view(-1, *[1] * (new.ndim - 1)), new, old)
            self.slots[name] = slots.scatter(1, at, new) if new.requires_grad else slots.scatter_(1, at, new)
            held.append(old[:, 0])
        return held

    def count(self, counts: torch.Tensor) -> None:
        """Replaces the numbers of text and vision tokens `[b, 2]` after a forward pass."""
        if self.counts is not None and self.counts.shape == counts.shape:
            self.counts.copy_(counts)
        else:
            self.counts = counts.clone()
            _keep_address(self.counts)

    def copy(self, other: "MMateCacheLayer", batch: int) -> None:
        """Becomes `batch` copies of another layer of one sequence, which stays as it is."""

        def copies(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.expand(batch, *tensor.shape[1:]).clone()

        tail, states = map(copies, other.load())
        self.store(tail, states, batch)
        self.slots = {name: copies(slots) for name, slots in other.slots.items()}
        self.counts = copies(other.counts)
        for tensor in (*self.slots.values(), self.counts):
            if tensor is not None:
                _keep_address(tensor)
        self.advance(other.get_seq_length())

    def advance(self, n_tokens: int) -> None:
        """Counts the tokens of a forward pass, padding included."""
        self.seen += n_tokens

    def get_seq_length(self) -> int | torch.Tensor:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int | torch.Tensor, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepares nothing: shapes are known when the first state is stored."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("a recurrent layer caches a recurrent state, not keys and values")

    def reset(self) -> None:
        super().reset()
        self.rope_deltas = self.padding = None
        if self.counts is not None:
            self.counts.zero_()
        self.seen = self.seen.zero_() if isinstance(self.seen, torch.Tensor) else 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda state: state[indices.to(state.device)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "a recurrent state cannot be cropped: tokens once read cannot be taken back. Assisted decoding and other "
            "methods that crop the cache need a model with full attention"
        )

    def offload(self) -> None:
        super().offload()
        self.slots = {name: slots.to("cpu", non_blocking=True) for name, slots in self.slots.items()}

    def prefetch(self) -> None:
        super().prefetch()
        self.slots = {name: slots.to(self.device, non_blocking=True) for name, slots in self.slots.items()}

    def leave_inference_mode(self) -> None:
        """Takes copies of tensors that only `torch.inference_mode` may write, where that has ended."""
        for holder, name in [*self._held(), *([(vars(self), "seen")] if isinstance(self.seen, torch.Tensor) else [])]:
            if holder[name].is_inference():
                holder[name] = holder[name].clone()
                _keep_address(holder[name])

    def _held(self) -> list[tuple[Any, Any]]:
        """What holds the tensors of the batch, and under which name."""
        kept: list = [(self.conv_states, 0), (self.recurrent_states, 0), *((self.slots, name) for name in self.slots)]
        return [(holder, name) for holder, name in [*kept, (vars(self), "counts")] if holder[name] is not None]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._map_deltas(function)
        for holder, name in self._held():
            old = holder[name]
            new = function(old)
            if new.shape == old.shape and not new.requires_grad:
                old.copy_(new)
            else:
                holder[name] = new
                _keep_address(new)


def counting_layer(cache: Cache) -> MMateCacheLayer:
    """Returns the first recurrent layer of a cache, whose counts of tokens are those of all."""
    return next(layer for layer in cache.layers if isinstance(layer, MMateCacheLayer))


def _keep_address(tensor: torch.Tensor) -> None:
    """A compiled decode step writes this tensor in place, which a CUDA graph has to know to be captured."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)


def open_cache(
    cache: Cache | None, config: LinMUTextConfig, use_cache: bool | None = None, trains: bool = False
) -> Cache | None:
    """
    Returns the cache that a decoder of `config` reads and writes: the given one, whatever `use_cache` says, else a new
    one if `use_cache` (by default the configuration's) asks for it. A `DynamicCache()` made without a configuration
    gets its layers.

    Args:
        trains (`bool`, *optional*, defaults to `False`): Whether layers run again for their gradients, which no cache
            survives.

    Raises:
        `ValueError`: The cache is for another model, keeps only keys and values, or would be written twice.
    """
    if cache is None:
        wanted = config.use_cache if use_cache is None else use_cache
        return _with_deltas(DynamicCache(config=config)) if wanted and not trains else None
    if trains:
        raise ValueError(
            f"{CACHE} was passed to a model that trains with gradient checkpointing, which would read tokens twice; "
            f"leave {CACHE} out, or generate under torch.no_grad()"
        )
    if not cache.layers and type(cache) is DynamicCache:
        cache.layers = DynamicCache(config=config).layers
    fits = len(cache.layers) == config.num_hidden_layers and all(
        isinstance(layer, MMateCacheLayer) == (STATIC_LAYER_TYPE_MAPPING[kind] is MMateCacheLayer)
        for layer, kind in zip(cache.layers, config.layer_types or (), strict=True)
    )
    if not fits:
        states = sum(STATIC_LAYER_TYPE_MAPPING[kind] is MMateCacheLayer for kind in config.layer_types)
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__} with {len(cache.layers)} layers ({', '.join(kinds)}); this "
            f"model has {config.num_hidden_layers} layers, {states} of them with a "
            "recurrent state: build the cache from the model's configuration, e.g. "
            "DynamicCache(config=model.config.get_text_config()). A quantized cache does not support recurrent states"
        )
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        for layer in cache.layers:
            if isinstance(layer, MMateCacheLayer):
                layer.leave_inference_mode()
    return _with_deltas(cache)


def _with_deltas(cache: Cache) -> Cache:
    first = cache.layers[0]
    if not isinstance(first, RopeDeltas) and not torch.compiler.is_compiling():
        first.__class__ = _with_rope_deltas(type(first))  # type: ignore[arg-type]
    return cache
