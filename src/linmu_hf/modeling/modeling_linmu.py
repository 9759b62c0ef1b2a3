"""LinMU: a vision side, as its teacher has it, and the decoder in which every layer names its mixer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .checks import check_head_inputs, check_media, check_types, mark_checked
from .compat import CACHE, takes_aliases
from .configuration_linmu import LinMUConfig
from .decoder import LinMUCausalLMOutput, LinMUModelOutput, LinMUPreTrainedModel, LinMUTextModel
from .generation import VisionLayoutGeneration
from .layout.media import KINDS, Medium, read_media
from .layout.positions import text_positions
from .layout.prompt import Prompt
from .mixers import AttentionMask
from .vision_side import VISION_SIDES, VisionSide


class LinMUModel(LinMUPreTrainedModel):
    """Vision tower and decoder, without the language-model head."""

    accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`, so that accumulated batches weigh tokens

    def __init__(self, config: LinMUConfig):
        super().__init__(config)
        kind = config.vision_config.model_type
        if kind not in VISION_SIDES:
            raise ValueError(f"vision_config: model_type={kind!r} is unknown; choose one of {list(VISION_SIDES)}")
        self.visual = VISION_SIDES[kind].tower_class._from_config(config.vision_config)
        self.language_model = LinMUTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @property
    def vision(self) -> VisionSide:
        """Returns the vision side: the tower, and what placeholders and grids mean to it."""
        return VISION_SIDES[self.config.vision_config.model_type](self.config, self.visual)

    @property
    def argument_names(self) -> dict[str, str]:
        """Returns the family's names of arguments, and those that `forward` gives them."""
        return self.vision.argument_names

    @property
    def n_embeddings(self) -> int:
        """Returns the number of ids that have an embedding."""
        text: Any = self.config.text_config
        return getattr(self.get_input_embeddings(), "num_embeddings", text.vocab_size)

    @property
    def placeholders(self) -> dict[str, int]:
        """Returns the placeholder of an image and of a video; it may be outside the vocabulary."""
        return {"image": self.config.image_token_id, "video": self.config.video_token_id}

    def embeddable(self, ids: torch.Tensor, instead: int = 0) -> torch.Tensor:
        """
        Returns ids `[b, t]` with another id for placeholders outside the vocabulary, which vision features replace.
        """
        for token in self.placeholders.values():
            if token >= self.n_embeddings:
                ids = ids.masked_fill(ids == token, instead)
        return ids

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings `[b, t, d]` of ids `[b, t]`."""
        return self.get_input_embeddings()(self.embeddable(input_ids))

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        return self.vision.features("image", pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        return self.vision.features("video", pixel_values_videos, video_grid_thw, **kwargs)

    def token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns 0 for text, 1 for image and 2 for video placeholders, like the processor's `mm_token_type_ids`."""
        types = torch.zeros_like(input_ids)
        for kind, token in self.placeholders.items():
            types[input_ids == token] = KINDS[kind]
        return types

    @takes_aliases
    @torch.no_grad()
    def get_positions(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Returns where every token is, in rotary positions and in its image or video.

        Args:
            input_ids (`torch.LongTensor` of shape `[b, t]`): With placeholders for vision tokens.
            attention_mask (`torch.Tensor` of shape `[b, t]`, *optional*): 0 at padding.
            image_grid_thw, video_grid_thw, second_per_grid_ts, mm_token_type_ids: As the processor returns them.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor | None]`: `position_ids` of shape `[3, b, t]` and `vision_layout`
            of shape `[b, t, 4]`, or `None` for text alone.
        """
        input_ids = input_ids.long()
        types = self.token_types(input_ids)
        if mm_token_type_ids is None:
            mm_token_type_ids = types
        elif input_ids.shape[1] > 1:
            check_types(mm_token_type_ids, types, attention_mask)
        if attention_mask is not None:
            mm_token_type_ids = mm_token_type_ids * attention_mask.to(mm_token_type_ids.dtype)
        if image_grid_thw is None and video_grid_thw is None and not bool(mm_token_type_ids.any()):
            return text_positions(input_ids, attention_mask), None
        vision, grids = self.vision, {"image": image_grid_thw, "video": video_grid_thw}
        check_media(mm_token_type_ids, attention_mask, vision, image_grid_thw, video_grid_thw, second_per_grid_ts)
        layout = vision.layout(mm_token_type_ids, grids)
        # in a chunk of a longer prompt a row may be padding alone
        rows = slice(None) if attention_mask is None else attention_mask.bool().any(1)
        positions = input_ids.new_zeros(3, *input_ids.shape)
        positions[:, rows] = vision.positions(
            input_ids[rows],
            mm_token_type_ids[rows],
            None if attention_mask is None else attention_mask[rows],
            grids,
            second_per_grid_ts,
        )
        return positions, mark_checked(layout)

    @takes_aliases
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        vision_layout: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LinMUModelOutput:
        """
        Takes what the Qwen2.5-VL processor returns. `position_ids` and `vision_layout` are derived when absent; with a
        cache, ids, pixels and grids are those of the new tokens. Several sequences packed into one row, whose media
        follow in the same order, are told apart by `cu_seq_lens_q` or by text positions that begin anew.
        """
        media = read_media(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw, mm_encoder_outputs)
        prompt = Prompt.read(
            self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, media, second_per_grid_ts,
            mm_token_type_ids, vision_layout, use_cache, cu_seq_lens_q,
        )  # fmt: skip
        embeds = self.embed_prompt(prompt, self.encode_media(media))
        return self.language_model(inputs_embeds=embeds, prompt=prompt, return_dict=True, **kwargs)

    def placeholder_ids(
        self, inputs_embeds: torch.Tensor, mm_token_type_ids: torch.Tensor | None, has_media: bool
    ) -> torch.Tensor:
        """Returns ids `[b, t]` that are right at the placeholders, known by their types or embeddings; 0 elsewhere."""
        ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        if mm_token_type_ids is None and not has_media:
            return ids
        for kind, token in self.placeholders.items():
            if mm_token_type_ids is not None:
                places = mm_token_type_ids == KINDS[kind]
            else:
                places = (inputs_embeds == self.embed_placeholder(token, inputs_embeds.device)).all(-1)
            ids = ids.masked_fill(places, token)
        return ids

    def embed_placeholder(self, token: int, device: torch.device) -> torch.Tensor:
        """
        Returns the embedding `[d]` of a placeholder.

        Raises:
            `ValueError`: It is outside the vocabulary, so that embeddings do not tell where placeholders are.
        """
        if token >= self.n_embeddings:
            raise ValueError(
                f"placeholder {token} lies outside the vocabulary of {self.n_embeddings}, and so cannot be found "
                "among inputs_embeds; pass mm_token_type_ids, or input_ids instead"
            )
        return self.get_input_embeddings()(torch.tensor(token, device=device))

    def encode_media(self, media: dict[str, Medium]) -> dict[str, torch.Tensor]:
        """Returns for each kind of media that occurs its features `[n, d]`, in the order of its tokens."""
        features = {}
        for kind, encode in (("image", self.get_image_features), ("video", self.get_video_features)):
            medium = media[kind]
            output = medium.encoded
            if output is None and medium.pixels is not None:
                output = encode(medium.pixels, medium.grids, return_dict=True)
            if output is not None:
                features[kind] = torch.cat(tuple(output.pooler_output))
        return features

    def embed_prompt(
        self, prompt: Prompt, features: dict[str, torch.Tensor], start: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """
        Returns the embeddings `[b, end - start, d]` of some tokens of a prompt (by default all), each placeholder with
        the feature of its image or video in its place.

        Args:
            features (`dict[str, torch.Tensor]`): Of all placeholders of the prompt, as `encode_media` returns them.

        Raises:
            `ValueError`: There are more or fewer placeholders than features.
        """
        part = slice(start, prompt.length if end is None else end)
        embeds = self.embed(prompt.ids[:, part]) if prompt.embeds is None else prompt.embeds[:, part]
        for kind, own in features.items():
            places = prompt.ids == self.placeholders[kind]
            if not torch.compiler.is_compiling() and int(places.sum()) != len(own):
                raise ValueError(
                    f"the prompt has {int(places.sum())} {kind} tokens for {len(own)} {kind} features; pass pixels "
                    "and grids as the processor returned them with these input_ids"
                )
            if embeds.shape[1] < prompt.length:
                rows = places.flatten().cumsum(0).view_as(places) - 1
                own = own[rows[:, part][places[:, part]]]
            own, places = own.to(embeds.device, embeds.dtype), places[:, part, None].to(embeds.device)
            embeds = embeds.masked_scatter(places.expand_as(embeds), own)
        return embeds


class LinMUForConditionalGeneration(VisionLayoutGeneration, LinMUPreTrainedModel, GenerationMixin):
    """LinMU with its language-model head: what `AutoModelForImageTextToText` loads."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`, so that accumulated batches weigh tokens

    def __init__(self, config: LinMUConfig):
        super().__init__(config)
        self.model = LinMUModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def argument_names(self) -> dict[str, str]:
        return self.model.argument_names

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @takes_aliases
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        vision_layout: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.IntTensor | None = None,
        output_mixer_states: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LinMUCausalLMOutput:
        """
        Runs the model and its head; with labels, also computes the loss.

        Args:
            labels (`torch.LongTensor` of shape `[b, t]`, *optional*): -100 where no loss is wanted; a placeholder
                outside the vocabulary counts as such.
            vision_layout (`torch.LongTensor` of shape `[b, t, 4]`, *optional*): Span and coordinate of every token;
                derived from the grids when absent.
            cu_seq_lens_q (`torch.IntTensor` of shape `[m + 1]`, *optional*): Where the sequences of a packed row
                begin, and its end.
            output_mixer_states (`bool`, *optional*, defaults to `False`): Return every mixer's input and output.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Last positions (0: all), or an index
                into the positions, for which logits are computed.
        """
        if isinstance(labels, torch.Tensor):
            labels = self.model.embeddable(labels, instead=-100)
        check_head_inputs(input_ids, inputs_embeds, self.config.text_config.vocab_size, labels, logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_layout=vision_layout,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            output_mixer_states=output_mixer_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LinMUCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            mixer_inputs=outputs.mixer_inputs,
            mixer_outputs=outputs.mixer_outputs,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = ["LinMUForConditionalGeneration", "LinMUModel", "LinMUPreTrainedModel", "LinMUTextModel"]
