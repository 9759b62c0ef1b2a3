"""Dataset rows to model inputs, for training and for generation."""

from .formats import Row, load_rows, read_row
from .hashing import row_key
from .rows import answer_text, bad_rows, check_dataset, encode_prompts, encode_rows


__all__ = [
    "Row",
    "answer_text",
    "bad_rows",
    "check_dataset",
    "encode_prompts",
    "encode_rows",
    "load_rows",
    "read_row",
    "row_key",
]
