"""The suite's tokenizer and processor: those of the digits, with the suite's words and larger pictures."""

import string
from functools import cache

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor

from ..processor import MERGE_SIZE, ORDINARY_WORDS, PATCH_SIZE, assemble_processor, train_tokenizer
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
    words = [*ICON_NAMES, *COLOURS, *FIELDS, *SENTENCES.replace("|", " ").split()]
    own = [word for word in words if word.isalpha()]
    corpus = ["user\n", "assistant\n", "system\n"] * 100 + SENTENCES.split("|") * 100
    corpus += (own + [f" {word}" for word in own]) * 50 + [f" {word}" for talk in TALK for word in talk.split()] * 20
    corpus += [f" {word}" for word in ORDINARY_WORDS.split()] * 2 + list(string.printable)
    return train_tokenizer(corpus, ORDINARY_TOKENS, 8192)


def build_processor() -> Qwen2_5_VLProcessor:
    """Builds the suite's processor, with the digits' patches and chat template."""
    return assemble_processor(build_tokenizer(), IMAGE_MEAN, IMAGE_STD, MAX_PIXELS)
