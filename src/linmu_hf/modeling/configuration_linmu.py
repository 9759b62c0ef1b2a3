"""Configuration of LinMU: that of its teacher, Qwen2.5-VL or NVILA, whose decoder layers each name their mixer."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .remote_code import RemoteCode


LAYER_TYPES: list[str] = []  # filled by `mixers.register_mixer`
SCAN_ORDERS = ("thw", "twh", "hwt", "wht")

_CHOICES: dict[str, tuple] = {
    "reverse_scope": ("span", "sequence"),
    "gate": ("head", "channel"),
    "bc_feature_map": (None, "softmax"),
    "timescale_init": ("log_spaced", "mamba2"),
    "output_norm": (None, "layer_norm"),
}


@strict
class LinMUTextConfig(RemoteCode, PreTrainedConfig):
    r"""
    The decoder: the fields of Qwen2.5-VL's text model, the mixer of every layer, and the choices inside M-MATE.
    Without an `mrope_section` among its `rope_parameters` it is NVILA's, which counts positions in one dimension.

    Args:
        layer_types (`list[str]`, *optional*, defaults to `"m_mate"` everywhere):
            The mixer of each layer, `"m_mate"` or `"full_attention"`. All `"full_attention"` is the teacher.
        scan_orders (`list[str]`, *optional*, defaults to `["thw", "twh", "hwt", "wht"]`):
            Rotary Major-Scan (Sec. 3.1.1): layer `l` visits the vision tokens of a span in order
            `scan_orders[l % len(scan_orders)]`, slowest axis first.
        reverse_scope (`str`, *optional*, defaults to `"span"`):
            What one reverse scan (Eq. 2) covers: the vision tokens of each image or video alone (`"span"`), or all
            vision tokens of the sequence, decaying over the text between them (`"sequence"`).
        gate (`str`, *optional*, defaults to `"head"`):
            Whether the direction gate g (Eq. 3) has one value per head or per channel.
        scan_rope (`bool`, *optional*, defaults to `True`):
            Whether B and C are rotated by the teacher's rotary embedding.
        bc_feature_map (`str`, *optional*, defaults to `"softmax"`):
            Feature map of B and C: `"softmax"` of z and of -z, where z is a learned linear map of every head, with the
            scan's output divided by the sum of its weights, as softmax attention does; `None` is plain Mamba2.
        state_size (`int`, *optional*, defaults to 256):
            Size of the features, and so of the scan's state per channel; without a feature map it is `head_dim`.
        conv_kernel (`int`, *optional*, defaults to 4):
            Width of Mamba2's causal convolution over x, B and C; 1 leaves it out.
        timescale_init (`str`, *optional*, defaults to `"log_spaced"`):
            Initial decays: half-lives log-spaced over the heads within `timescale_range`, or Mamba2's own ranges.
        timescale_range (`list[float]`, *optional*, defaults to `[4.0, 4096.0]`):
            Shortest and longest initial half-life, in tokens.
        window_size (`list[int]`, *optional*, defaults to `[16, 4, 4]`):
            Local-Swin window of a video in merged tokens: frames, height, width.
        image_window_size (`list[int]`, *optional*, defaults to `[1, 16, 16]`):
            The same for an image.
        window_wrap (`bool`, *optional*, defaults to `False`):
            Whether shifted windows join opposite edges (Fig. 4); `False` gives smaller windows there instead.
        text_window (`int`, *optional*, defaults to 0; 512 in the preset `default`):
            How many of the last text tokens a text token attends to exactly; what leaves the window is scanned. 0
            leaves text to the scan alone, as the paper does.
        sink_tokens (`int`, *optional*, defaults to 0; 4 in the preset `default`):
            How many of the first text tokens of a sequence every token attends to exactly (attention sinks).
        max_span_frames (`int`, *optional*):
            Longest span of a video in merged frames: a longer one is read as several spans, so that a prefill in
            chunks is bounded by it. `None`: every video is one span.
        output_norm (`str`, *optional*):
            Norm of the fused output (Algorithm 1): `None` or `"layer_norm"`.
    """

    model_type = "linmu_text"
    base_config_key = "text_config"
    remote_classes: ClassVar[dict[str, str]] = {"AutoConfig": "LinMUTextConfig", "AutoModel": "LinMUTextModel"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    ignore_keys_at_rope_validation = {"mrope_section"}
    default_theta = 1000000.0
    base_model_tp_plan = None

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    attention_dropout: float = 0.0
    rope_parameters: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    layer_types: list[str] | None = None

    scan_orders: list[str] | tuple[str, ...] = SCAN_ORDERS
    reverse_scope: str = "span"
    gate: str = "head"
    scan_rope: bool = True
    bc_feature_map: str | None = "softmax"
    state_size: int = 256
    conv_kernel: int = 4
    timescale_init: str = "log_spaced"
    timescale_range: list[int | float] | tuple[int | float, ...] = (4.0, 4096.0)
    window_size: list[int] | tuple[int, ...] = (16, 4, 4)
    image_window_size: list[int] | tuple[int, ...] = (1, 16, 16)
    window_wrap: bool = False
    text_window: int = 0
    sink_tokens: int = 0
    max_span_frames: int | None = None
    output_norm: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["m_mate"] * self.num_hidden_layers
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name in ("scan_orders", "timescale_range", "window_size", "image_window_size"):
            setattr(self, name, list(getattr(self, name)))
        self.validate_layer_type()  # here it is a plain ValueError, and names are as given
        # read by the attention that Transformers provides
        self.sliding_window = None
        super().__post_init__(**kwargs)
        self.validate_m_mate()

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        rope = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        rope.setdefault("rope_theta", kwargs.pop("rope_theta", self.default_theta))
        if rope.get("rope_type", rope.get("type")) == "mrope":
            rope["rope_type"] = "default"
        self.rope_parameters = rope
        self.standardize_rope_params()
        return kwargs

    def validate_layer_type(self) -> None:
        """Replaces the parent's check, which knows only Transformers' own layer types."""
        unknown = sorted(set(self.layer_types or ()) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types has {unknown}; each entry must be one of {LAYER_TYPES}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one entry per layer"
            )

    def validate_m_mate(self) -> None:
        """Raises a `ValueError` naming the field, its value and the remedy for an impossible M-MATE option."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {list(choices)}")
        unknown = [order for order in self.scan_orders if order not in SCAN_ORDERS]
        if unknown or not self.scan_orders:
            raise ValueError(f"scan_orders={self.scan_orders} must be a non-empty list out of {list(SCAN_ORDERS)}")
        for name in ("window_size", "image_window_size"):
            window = getattr(self, name)
            if len(window) != 3:
                raise ValueError(f"{name}={tuple(window)} must have 3 entries (frames, height, width)")
            if min(window) < 1:
                raise ValueError(f"{name}={tuple(window)} must have entries of at least 1 (frames, height, width)")
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"state_size={self.state_size} must be even and at least 2 (features of z and of -z)")
        if self.max_span_frames is not None and self.max_span_frames < 1:
            raise ValueError(f"max_span_frames={self.max_span_frames} must be at least 1, or None for no limit")
        if self.text_window < 0 or self.sink_tokens < 0:
            raise ValueError(
                f"text_window={self.text_window} and sink_tokens={self.sink_tokens} are numbers of tokens, at least 0"
            )
        if self.sink_tokens and not self.text_window:
            raise ValueError(f"sink_tokens={self.sink_tokens} need a text_window: set it, or sink_tokens=0")
        if self.conv_kernel < 1:
            raise ValueError(f"conv_kernel={self.conv_kernel} must be at least 1 (1 leaves the convolution out)")
        if len(self.timescale_range) != 2 or not 0 < self.timescale_range[0] <= self.timescale_range[1]:
            raise ValueError(
                f"timescale_range={tuple(self.timescale_range)} must be (shortest, longest) half-life in tokens, "
                "both positive and in that order"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        sections = self.rope_parameters.get("mrope_section")
        if sections is not None and 2 * sum(sections) != self.head_dim:
            raise ValueError(
                f"rope_parameters: mrope_section={list(sections)} must add up to half of head_dim={self.head_dim}"
            )

    def scan_order(self, layer_idx: int) -> str:
        """Returns the scan order of a layer (the case distinction over `l mod 4` in Sec. 3.1.1)."""
        return self.scan_orders[layer_idx % len(self.scan_orders)]

    def shifts_windows(self, layer_idx: int) -> bool:
        """Returns whether a layer shifts its windows: every other layer does (Sec. 3.1.2)."""
        return layer_idx % 2 == 1


# Whole columns of choices. `paper`: the paper to the letter. `default`: the best measured (docs/decisions.md).
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"text_window": 512, "sink_tokens": 4},
    "paper": {
        "reverse_scope": "sequence",
        "gate": "channel",
        "scan_rope": False,
        "bc_feature_map": None,
        "timescale_init": "mamba2",
        "window_wrap": True,
        "text_window": 0,
        "sink_tokens": 0,
        "output_norm": "layer_norm",
    },
}

# Fields of a teacher's text configuration that the student keeps.
_TEACHER_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "attention_dropout", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@strict
class LinMUConfig(RemoteCode, PreTrainedConfig):
    r"""
    A vision tower, unchanged from the teacher, and the linear decoder.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision side; its `model_type` picks it (`"qwen2_5_vl_vision"` or `"nvila_vision"`).
        text_config (`LinMUTextConfig` or `dict`, *optional*):
            Configuration of the decoder.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id (`int`, *optional*):
            Placeholder and delimiter tokens, as in the teacher. NVILA has no delimiters, and its placeholders may be
            outside the vocabulary.
    """

    model_type = "linmu"
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "LinMUConfig",
        "AutoModel": "LinMUModel",
        "AutoModelForImageTextToText": "LinMUForConditionalGeneration",
    }
    sub_configs = {"vision_config": AutoConfig, "text_config": LinMUTextConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int | None = 151652
    vision_end_token_id: int | None = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            vision = {"model_type": "qwen2_5_vl_vision", **(self.vision_config or {})}
            self.vision_config = AutoConfig.for_model(**vision)
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = LinMUTextConfig(**(self.text_config or {}))
        if self.vision_config.model_type == "qwen2_5_vl_vision":
            self.text_config.rope_parameters.setdefault("mrope_section", [16, 24, 24])  # Transformers' own default
            self.text_config.validate_m_mate()
        super().__post_init__(**kwargs)

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        """
        Returns fields with defaults; naming the sub-configurations keeps their unset fields out of `config.json`.
        """
        return {**super().default_config_fields(), "vision_config": {}, "text_config": {}}

    @classmethod
    def from_teacher(
        cls,
        teacher_config: PreTrainedConfig,
        *,
        keep_attention: Sequence[int] | str = (),
        preset: str = "default",
        **mixer_options: Any,
    ) -> "LinMUConfig":
        """
        Builds the configuration of the student of a Qwen2.5-VL or NVILA teacher.

        Args:
            teacher_config (`Qwen2_5_VLConfig` or `NVILAConfig`): The teacher's configuration.
            keep_attention (`Sequence[int]` or `"all"`, *optional*): Layers that keep full attention.
            preset (`str`, *optional*, defaults to `"default"`): `"paper"` or `"default"`, see `PRESETS`.
            mixer_options: M-MATE fields of [`LinMUTextConfig`], over the preset.

        Raises:
            `ValueError`: Unknown preset, option or layer, or a teacher with sliding-window attention.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; choose one of {sorted(PRESETS)}")
        options = {**PRESETS[preset], **mixer_options}
        unknown = sorted(set(options) - set(MIXER_FIELDS))
        if unknown:
            raise ValueError(f"unknown M-MATE options {unknown}; known ones are {list(MIXER_FIELDS)}")
        text = teacher_config.text_config
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise ValueError("teachers with sliding-window attention are not supported; turn use_sliding_window off")
        n_layers = text.num_hidden_layers
        kept = range(n_layers) if keep_attention == "all" else keep_attention
        outside = [layer for layer in kept if not 0 <= layer < n_layers]
        if outside:
            raise ValueError(f"keep_attention names layers {outside}; the teacher has layers 0 to {n_layers - 1}")
        layer_types = ["full_attention" if layer in set(kept) else "m_mate" for layer in range(n_layers)]
        return cls(
            text_config=LinMUTextConfig(
                **{name: getattr(text, name) for name in _TEACHER_FIELDS}, layer_types=layer_types, **options
            ),
            vision_config=teacher_config.vision_config,
            image_token_id=teacher_config.image_token_id,
            video_token_id=teacher_config.video_token_id,
            vision_start_token_id=teacher_config.vision_start_token_id,
            vision_end_token_id=teacher_config.vision_end_token_id,
            tie_word_embeddings=teacher_config.tie_word_embeddings,
        )


# The M-MATE options: what `linmu-convert` offers as flags.
MIXER_FIELDS = (
    "scan_orders", "reverse_scope", "gate", "scan_rope", "bc_feature_map", "state_size", "conv_kernel",
    "timescale_init", "timescale_range", "window_size", "image_window_size", "window_wrap", "text_window",
    "sink_tokens", "max_span_frames", "output_norm",
)  # fmt: skip
