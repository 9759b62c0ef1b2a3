"""The testbed's tokenizer and processor: Qwen2.5-VL's own classes, a small vocabulary and a small chat template."""

import string
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from .data import COLOURS


PATCH_SIZE = 8
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
FPS = 2.0
# the mosaics' own: with 0.5 the dark background drowns the digits and learning stalls
IMAGE_MEAN = (0.18, 0.18, 0.15)
IMAGE_STD = (0.2, 0.2, 0.2)
ORDINARY_TOKENS = 498
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2's split into words, single digits, punctuation and space
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORDINARY_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about "
    "out many then them these so some her would make like him into time has look two more write go see number no "
    "way could people my than first water been call who its now find long down day did get come made may part "
    "over new sound take only little work know place year live me back give most very after thing our just name "
    "good sentence man think say great where help through much before line right too mean old any same tell boy "
    "follow came want show also around form three small set put end does another well large must big even such "
    "because turn here why ask went men read need image picture video frame digit left above next to color "
    "describe answer yes please hello thanks"
)
# No line break after <|im_end|>: ChatML has one, and at this size every token counts.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def build_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS, pad_token: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """Trains the testbed's tokenizer: any text can be encoded, every digit is one token."""
    sentences = ["user\n", "assistant\n", "system\n"]
    sentences += ["below row 1 column 2?", "row 1 column 2?", "7 or 3 first?", "when is 7?"]
    # no task counts colors yet; the vocabulary can
    sentences += [f"how many {colour}?" for colour in COLOURS]
    # the testbed's own words come first among the merges
    corpus = sentences * 100 + [f" {word}" for word in ORDINARY_WORDS.split()] * 2 + list(string.printable)
    return train_tokenizer(corpus, ORDINARY_TOKENS, 4096, special_tokens, pad_token)


def train_tokenizer(
    corpus: Sequence[str],
    size: int,
    max_length: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    pad_token: str = "<|endoftext|>",
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with `size` ordinary tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token=pad_token,
        extra_special_tokens=list(special_tokens),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """Builds the testbed's processor."""
    return assemble_processor(build_tokenizer(), IMAGE_MEAN, IMAGE_STD, 256 * 256)


def assemble_processor(
    tokenizer: PreTrainedTokenizerFast, mean: Sequence[float], std: Sequence[float], max_pixels: int
) -> Qwen2_5_VLProcessor:
    """Builds a `Qwen2_5_VLProcessor` for 8x8 patches merged 2x2: 16x16 pixels are one vision token."""
    vision = {
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "size": {"shortest_edge": (PATCH_SIZE * MERGE_SIZE) ** 2, "longest_edge": max_pixels},
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**vision, do_sample_frames=False, fps=FPS, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
