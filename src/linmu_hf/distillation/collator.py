"""From dataset rows to training batches: one row is encoded once, batches only pad and concatenate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data import encode_rows
from ..data.formats import fetch, undecoded
from .losses import IGNORE_INDEX


Features = dict[str, Tensor]
TOKEN_FIELDS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")  # [t] per row, padded on the right


class EncodedDataset(Dataset):
    """
    Rows as model features, encoded on first use and kept while they fit into `cache_bytes`.

    Args:
        processor (`ProcessorMixin`): the student's processor.
        rows (`Sequence[Mapping]`): a `datasets.Dataset` or list of conversational rows, see [`encode_rows`].
        pseudo_messages (`Sequence[list]`, *optional*):
            For each row the conversation with the teacher's answers in place of the true ones.
        cache_bytes (`int`, *optional*, defaults to 0): memory for encoded rows.
    """

    def __init__(self, processor, rows, pseudo_messages: Sequence[list] | None = None, cache_bytes: int = 0):
        self.processor, self.rows, self.pseudo_messages = processor, undecoded(rows), pseudo_messages
        self.room = cache_bytes
        self.cache: dict[tuple[str, int], Features] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Features]:
        """`{"row": features}`, and `"pseudo"` features where the teacher's answers differ from the true ones."""
        item = {"row": self._features("row", index)}
        if self.pseudo_messages is not None:
            pseudo = self._features("pseudo", index)
            if not torch.equal(pseudo["input_ids"], item["row"]["input_ids"]):
                item["pseudo"] = pseudo
        return item

    def _features(self, kind: str, index: int) -> Features:
        features = self.cache.get((kind, index))
        if features is None:
            row = fetch(self.rows, index)
            if kind == "pseudo":
                row = {**row, "messages": self.pseudo_messages[index]}
            features = self._encode_row(row, index)
            size = sum(value.nbytes for value in features.values())
            if size <= self.room:
                self.room -= size
                self.cache[kind, index] = features
        return features

    def _encode_row(self, row: Any, index: int) -> Features:
        batch = encode_rows(self.processor, [row], [index])
        features = {key: torch.as_tensor(value) for key, value in batch.items()}
        return {key: value[0] if key in TOKEN_FIELDS else value for key, value in features.items()}


class DistillCollator:
    """
    Pads token fields on the right, concatenates pixels and grids.

    The batch holds the rows in order and behind them, if `pseudo` is set, once more those for which the teacher's
    answers differ from the true ones. `labels` [b, t] are the true answers (-100 in the rows behind), `pseudo_labels`
    [b, t] the teacher's: rows on which both agree serve both losses in one pass.

    Args:
        pad_token_id (`int`): id to pad `input_ids` with.
        pseudo (`bool`, *optional*, defaults to `False`): whether to make `pseudo_labels`.
    """

    def __init__(self, pad_token_id: int, pseudo: bool = False):
        self.pseudo = pseudo
        self.padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}

    def __call__(self, items: Sequence[dict[str, Features]]) -> Features:
        rows = [item["row"] for item in items]
        behind = [item["pseudo"] for item in items if "pseudo" in item] if self.pseudo else []
        batch = self._collate([*rows, *behind])
        if self.pseudo:
            differs = torch.tensor(["pseudo" in item for item in items] + [False] * len(behind))
            batch["pseudo_labels"] = batch["labels"].masked_fill(differs[:, None], IGNORE_INDEX)
            batch["labels"][len(rows) :] = IGNORE_INDEX
        return batch

    def _collate(self, rows: Sequence[Features]) -> Features:
        batch = {}
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row[key] for row in rows if key in row]
            if key in TOKEN_FIELDS:
                batch[key] = pad_sequence(values, batch_first=True, padding_value=self.padding.get(key, 0))
            else:
                batch[key] = torch.cat(values)
        return batch
