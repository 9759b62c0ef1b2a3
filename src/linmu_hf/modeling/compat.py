"""What the Transformers minors of the supported range do differently, detected by a feature and never by a version."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .layout.media import GRIDS, PIXELS


# The cache's name in arguments and outputs: `past_key_values` before 5.24, `cache` since.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
Result = TypeVar("Result")


def takes_aliases(method: Callable[..., Result]) -> Callable[..., Result]:
    """
    Lets a method take its argument `past_key_values` under the newer name `cache` too, and what the processors of a
    family call otherwise by the family's names. Its signature shows the name that the installed Transformers uses.
    """

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Result:
        names = {"cache": "past_key_values"} | getattr(args[0] if args else None, "argument_names", {})
        for alias in names.keys() & kwargs.keys():
            name = names[alias]
            if kwargs.get(name) is not None:
                raise ValueError(f"both {alias} and {name} were passed, which are the same: leave one out")
            kwargs[name] = kwargs.pop(alias)
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    parameters = [
        one.replace(name=CACHE) if one.name == "past_key_values" else one for one in signature.parameters.values()
    ]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapper


class MediaGeneration(GenerationMixin):
    """
    Images and videos on their way through `generate`, the same in every minor: encoded once, before prefill, which
    5.17 does not do; repeated for beams sample by sample, where 5.18 mixes up the images of a sample.
    """

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, *,
        mm_encoder_outputs: dict[str, Any] | None = None, **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:  # fmt: skip
        media = dict(mm_encoder_outputs or {})
        if not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"):
            for kind, name in PIXELS.items():
                pixels, grid = (model_kwargs.pop(key, None) for key in (name, GRIDS[kind]))
                if pixels is None and grid is not None and kind not in media:
                    raise ValueError(f"{GRIDS[kind]} came without {name}; pass both as the processor returned them")
                if pixels is not None:
                    media[kind] = getattr(self, f"get_{kind}_features")(pixels, grid, return_dict=True)
        for kind in media if expand_size > 1 else ():
            counts = self._count_new(kind, input_ids, **model_kwargs)
            features = repeat_by_sample(media[kind].pooler_output, counts, expand_size)
            media[kind] = BaseModelOutputWithPooling(pooler_output=features)
        position_ids = model_kwargs.pop("position_ids", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if position_ids is not None:  # [b, t] or [4, b, t]
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=-2)
        return input_ids, {**model_kwargs, "mm_encoder_outputs": media}

    def _count_new(
        self, kind: str, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None,
        vision_layout: torch.Tensor | None = None, mm_token_type_ids: torch.Tensor | None = None, **kwargs: Any,
    ) -> list[int]:  # fmt: skip
        """How often each sample has a placeholder that no cache has read."""
        if input_ids is None or not input_ids.numel():
            input_ids = self.model.placeholder_ids(inputs_embeds, mm_token_type_ids, True)
        places = input_ids == self.model.placeholders[kind]
        if vision_layout is not None:
            places &= (vision_layout[:, -input_ids.shape[1] :, 0] >= 0).cumsum(-1) > 0  # -1 where it was read
        return places.sum(-1).tolist()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)
        return super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)


def repeat_by_sample(features: Iterable[torch.Tensor], counts: list[int], times: int) -> list[torch.Tensor]:
    """
    Returns each sample's features `times` times in a row: for samples with media [A, B] and [C] and two beams A, B, A,
    B, C, C.

    Args:
        features (`Sequence[torch.Tensor]`): For every medium of the batch `[n, d]`.
        counts (`list[int]`): Tokens of media in every sample.
        times (`int`): Beams, or sequences to return.
    """
    repeated, media = [], iter(features)
    for count in counts:
        own: list[torch.Tensor] = []
        while sum(map(len, own)) < count:
            own.append(next(media))
        repeated += own * times
    return repeated


def checkpoint_activations(
    model: nn.Module, on: bool = True, kwargs: dict[str, Any] | None = None, **more: Any
) -> None:
    """Turns activation checkpointing on or off; `gradient_checkpointing_enable` and `_disable` before 5.24."""
    new, action = hasattr(model, "activation_checkpointing_enable"), "enable" if on else "disable"
    method = getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_{action}")
    method(*([kwargs] if on else []), **more)
