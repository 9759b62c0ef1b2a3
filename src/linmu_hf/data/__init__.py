"""Dataset rows to model inputs, for training and for generation."""

from .formats import Row, answer_text, read_row
from .hashing import row_key
from .loading import choose_split, is_single_file, load_rows
from .mixture import load_mixture, load_training_rows
from .rows import bad_rows, check_dataset, encode_prompts, encode_rows


__all__ = [
    "Row",
    "answer_text",
    "bad_rows",
    "check_dataset",
    "choose_split",
    "encode_prompts",
    "encode_rows",
    "is_single_file",
    "load_mixture",
    "load_rows",
    "load_training_rows",
    "read_row",
    "row_key",
]
