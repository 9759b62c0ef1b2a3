"""LinMU: a vision side, as its teacher has it, and the decoder in which every layer names its mixer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache import fitting_cache
from .checks import check_forward, check_head_inputs, check_media, check_types
from .compat import CACHE, takes_cache
from .configuration_linmu import LinMUConfig
from .decoder import LinMUModelOutput, LinMUPreTrainedModel, LinMUTextModel
from .generation import VisionLayoutGeneration, next_positions, remember_positions
from .layout.packing import lengths_to_bounds, packed_lengths, unpack
from .mixers import padding_mask
from .vision_side import KINDS, VISION_SIDES, VisionSide, text_positions


@dataclass
class LinMUCausalLMOutput(CausalLMOutputWithPast):
    """[`LinMUModelOutput`] with `logits` of shape `[b, t, vocab]` and, given labels, the `loss`."""

    mixer_inputs: tuple[torch.Tensor, ...] | None = None
    mixer_outputs: tuple[torch.Tensor, ...] | None = None


class LinMUModel(LinMUPreTrainedModel):
    """Vision tower and decoder, without the language-model head."""

    accepts_loss_kwargs = False

    def __init__(self, config: LinMUConfig):
        super().__init__(config)
        kind = config.vision_config.model_type
        if kind not in VISION_SIDES:
            raise ValueError(f"vision_config: model_type={kind!r} is unknown; choose one of {list(VISION_SIDES)}")
        self.visual = VISION_SIDES[kind].tower_class._from_config(config.vision_config)
        self.language_model = LinMUTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    @property
    def vision(self) -> VisionSide:
        """The vision side: the tower, and what placeholders and grids mean to it."""
        return VISION_SIDES[self.config.vision_config.model_type](self.config, self.visual)

    @property
    def n_embeddings(self) -> int:
        """Ids that have an embedding."""
        text: Any = self.config.text_config
        return getattr(self.get_input_embeddings(), "num_embeddings", text.vocab_size)

    @property
    def placeholders(self) -> dict[str, int]:
        """The placeholder of an image and of a video; it may lie outside the vocabulary."""
        return {"image": self.config.image_token_id, "video": self.config.video_token_id}

    def embeddable(self, ids, instead: int = 0):
        """Ids `[b, t]` with another in place of placeholders outside the vocabulary: vision features replace those."""
        for token in self.placeholders.values():
            if token >= self.n_embeddings:
                ids = ids.masked_fill(ids == token, instead)
        return ids

    def embed(self, input_ids):
        """Embeddings `[b, t, d]` of ids `[b, t]`."""
        return self.get_input_embeddings()(self.embeddable(input_ids))

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        return self.vision.features("image", pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        return self.vision.features("video", pixel_values_videos, video_grid_thw, **kwargs)

    def token_types(self, input_ids):
        """0 for text, 1 for image and 2 for video placeholders, like the processor's `mm_token_type_ids`."""
        types = torch.zeros_like(input_ids)
        for kind, token in self.placeholders.items():
            types[input_ids == token] = KINDS[kind]
        return types

    @torch.no_grad()
    def get_positions(
        self,
        input_ids,
        attention_mask=None,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        mm_token_type_ids=None,
        **kwargs,
    ):
        """
        Where every token lies, in rotary positions and in its image or video.

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
        return positions, layout

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_values_videos=None,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        mm_token_type_ids=None,
        mm_encoder_outputs=None,
        vision_layout=None,
        use_cache=None,
        cu_seq_lens_q=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LinMUModelOutput:
        """
        Takes what the Qwen2.5-VL processor returns. `position_ids` and `vision_layout` are derived when absent; with a
        cache, ids, pixels and grids are those of the new tokens. Several sequences packed into one row, whose media
        follow in the same order, are told apart by `cu_seq_lens_q` or by text positions that begin anew.
        """
        check_forward(
            self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, vision_layout,
            mm_encoder_outputs, pixel_values=pixel_values, pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw, mm_token_type_ids=mm_token_type_ids,
        )  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        packed = packed_lengths(inputs_embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if use_cache and packed is None:
            past_key_values = fitting_cache(past_key_values, self.config.text_config)
        has_grids = image_grid_thw is not None or video_grid_thw is not None
        ids = input_ids
        if ids is None:
            ids = self.placeholder_ids(inputs_embeds, mm_token_type_ids, has_grids or bool(mm_encoder_outputs))
        if vision_layout is None and (position_ids is None or has_grids):
            derived, vision_layout = self._new_positions(
                ids, attention_mask, past_key_values, packed,
                image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw,
                second_per_grid_ts=second_per_grid_ts, mm_token_type_ids=mm_token_type_ids,
            )  # fmt: skip
            if position_ids is None or (packed is not None and position_ids.ndim == 2):
                position_ids = derived  # text positions of a packed row say where sequences begin, no more
        if (
            past_key_values is not None
            and position_ids is not None
            and self._worth_a_note(position_ids, past_key_values)
        ):
            mask = padding_mask(attention_mask)
            remember_positions(past_key_values, position_ids, mask)
        media = {"image": (pixel_values, image_grid_thw), "video": (pixel_values_videos, video_grid_thw)}
        features = self.encode_media(media, mm_encoder_outputs)
        if features and vision_layout is None:
            raise ValueError(
                "images or videos came with position_ids but without their vision_layout; pass both as "
                "`get_positions` returns them, or leave position_ids out"
            )
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=self.insert(features, ids, inputs_embeds),
            vision_layout=vision_layout,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q if packed is None else lengths_to_bounds(packed, inputs_embeds.device),
            return_dict=True,
            **kwargs,
        )

    def placeholder_ids(self, inputs_embeds, mm_token_type_ids, has_media):
        """Ids `[b, t]` that are right at the placeholders, known by their types or embeddings; 0 elsewhere."""
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

    def embed_placeholder(self, token: int, device):
        """
        The embedding `[d]` of a placeholder.

        Raises:
            `ValueError`: It lies outside the vocabulary, so that embeddings do not tell where placeholders are.
        """
        if token >= self.n_embeddings:
            raise ValueError(
                f"placeholder {token} lies outside the vocabulary of {self.n_embeddings}, and so cannot be found "
                "among inputs_embeds; pass mm_token_type_ids, or input_ids instead"
            )
        return self.get_input_embeddings()(torch.tensor(token, device=device))

    def _new_positions(self, input_ids, attention_mask, past_key_values, packed=None, **vision):
        """`get_positions` of the new tokens, behind what the cache has seen."""
        if packed is not None:
            return self._packed_positions(input_ids, packed, **vision)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        new_mask = None if attention_mask is None or isinstance(attention_mask, dict) else attention_mask
        if new_mask is not None:
            new_mask = new_mask[:, -input_ids.shape[1] :]
        positions, layout = self.get_positions(input_ids, new_mask, **vision)
        if past:
            positions = positions + next_positions(past_key_values, input_ids.shape[0], past, input_ids.device)
        return positions, layout

    @staticmethod
    def _worth_a_note(position_ids, cache) -> bool:
        """Single tokens behind others are counted; one at the beginning ends the note of a cache that was reset."""
        if cache is None or position_ids is None:
            return False
        return position_ids.shape[-1] > 1 or (not torch.compiler.is_compiling() and not int(cache.get_seq_length()))

    def _packed_positions(self, input_ids, packed, mm_token_type_ids=None, **vision):
        """`get_positions` of sequences that share a row: `[3, 1, t]` and `[1, t, 4]`."""
        rows, mask = unpack(input_ids, packed)
        types = None if mm_token_type_ids is None else unpack(mm_token_type_ids, packed)[0]
        positions, layout = self.get_positions(rows, mask, mm_token_type_ids=types, **vision)
        real = mask.bool()
        return positions[:, real][:, None], None if layout is None else layout[real][None]

    def encode_media(self, media, encoded=None):
        """
        Features of the images and videos of a batch.

        Args:
            media (`dict[str, tuple]`): For `"image"` and `"video"` pixels and grids, or `None`s.
            encoded (`dict[str, ModelOutput]`, *optional*): What `get_image_features` and `get_video_features` have
                returned already.

        Returns:
            `dict[str, torch.Tensor]`: For each kind that occurs, `[n, d]` in the order of its tokens in the batch.
        """
        features = {}
        for kind, encode in (("image", self.get_image_features), ("video", self.get_video_features)):
            output, (pixels, grid) = (encoded or {}).get(kind), media[kind]
            if output is None and pixels is not None:
                output = encode(pixels, grid, return_dict=True)
            if output is not None:
                features[kind] = torch.cat(tuple(output.pooler_output))
        return features

    def chunk_embedder(self, input_ids, features):
        """A function `(start, end)` that embeds these tokens of `input_ids` [b, t], each with its vision feature."""
        rows, tokens = {}, self.placeholders
        for kind, own in features.items():
            places = input_ids == tokens[kind]
            if int(places.sum()) != len(own):
                raise ValueError(f"input_ids has {int(places.sum())} {kind} tokens for {len(own)} {kind} features")
            rows[kind] = places.flatten().cumsum(0).view_as(places) - 1

        def embed(start, end):
            ids = input_ids[:, start:end]
            embeds = self.embed(ids)
            for kind, own in features.items():
                places = ids == tokens[kind]
                chosen = own[rows[kind][:, start:end][places]].to(embeds.device, embeds.dtype)
                embeds = embeds.masked_scatter(places[..., None].expand_as(embeds), chosen)
            return embeds

        return embed

    def insert(self, features, ids, embeds):
        """Puts vision features in place of their placeholders: embeddings `[b, t, d]` of ids `[b, t]`."""
        for kind, own in features.items():
            places = ids == self.placeholders[kind]
            if not torch.compiler.is_compiling() and int(places.sum()) != len(own):
                raise ValueError(
                    f"the prompt has {int(places.sum())} {kind} tokens for {len(own)} {kind} features; pass pixels "
                    "and grids as the processor returned them with these input_ids"
                )
            own = own.to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(places[..., None].to(embeds.device).expand_as(embeds), own)
        return embeds


class LinMUForConditionalGeneration(VisionLayoutGeneration, LinMUPreTrainedModel, GenerationMixin):
    """LinMU with its language-model head: what `AutoModelForImageTextToText` loads."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = False

    def __init__(self, config: LinMUConfig):
        super().__init__(config)
        self.model = LinMUModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @takes_cache
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
