"""The suite's tokenizer and processor: those of the digits, with the suite's words and larger pictures."""

import string
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from ..processor import (
    CHAT_TEMPLATE,
    FPS,
    MERGE_SIZE,
    ORDINARY_WORDS,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    TEMPORAL_PATCH_SIZE,
    WORDS,
)
from .documents import FIELDS
from .memory import TALK
from .sources import COLOURS, ICON_NAMES


TOKEN = PATCH_SIZE * MERGE_SIZE  # pixels of a side of one vision token
IMAGE_MEAN = (0.4, 0.4, 0.4)
IMAGE_STD = (0.3, 0.3, 0.3)
ORDINARY_TOKENS = 626  # all of the suite's words are one token, and capital letters stay single
MAX_PIXELS = 2**22  # nothing of the suite is shrunk; for a video it counts all frames
SENTENCES = (
    "what does the sign say?|word top left?|word bottom right?|word middle center?|word top?|red bar?|"
    "larger red or blue?|cell row 1 column 2?|icon row 1 column 2?|heart color?|which picture shows heart?|"
    "picture 1 and 2 same?|which number?|said at 3?|at 3 heart. |how many heart?|heart or star first?|the code?|"
    "the word?|the picture?|the code is 47. the word is|people could. say 5.|yes|no"
)


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer; every digit and every capital letter is one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ORDINARY_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = [*ICON_NAMES, *COLOURS, *FIELDS, *SENTENCES.replace("|", " ").split()]
    own = [word for word in words if word.isalpha()]
    corpus = ["user\n", "assistant\n", "system\n"] * 100 + SENTENCES.split("|") * 100
    corpus += (own + [f" {word}" for word in own]) * 50 + [f" {word}" for talk in TALK for word in talk.split()] * 20
    corpus += [f" {word}" for word in ORDINARY_WORDS.split()] * 2 + list(string.printable)
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=8192,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """Builds a `Qwen2_5_VLProcessor` for 8x8 patches merged 2x2: 16x16 pixels are one vision token."""
    vision = {
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "size": {"shortest_edge": TOKEN * TOKEN, "longest_edge": MAX_PIXELS},
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**vision, do_sample_frames=False, fps=FPS, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
