"""From dataset rows to training batches: one row is encoded once, batches only pad and concatenate."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data import Row, encode_rows
from ..data.formats import fetch
from ..data.loading import undecoded
from .losses import IGNORE_INDEX


Features = dict[str, Tensor]
EncodePseudo = Callable[[Row, int], Features]
StoredTopK = Callable[[Row, Features, int], Features]
TOKEN_FIELDS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")  # [t] per row, padded on the right
TOPK_FIELDS = ("topk_ids", "topk_logprobs")  # [t, k] per row: the teacher's likeliest tokens after each token


class EncodedDataset(Dataset):
    """
    Rows as model features, encoded on first use and kept while they fit into `cache_bytes`.

    Args:
        processor (`ProcessorMixin`): the student's processor.
        rows (`Sequence[Mapping]`): a `datasets.Dataset` or list of conversational rows, see [`encode_rows`].
        encode_pseudo (`Callable[[Row, int], Features]`, *optional*):
            Encodes a row, given with its number, with the teacher's answers in place of the true ones.
        stored_topk (`Callable[[Row, Features, int], Features]`, *optional*):
            Returns the fields `topk_ids` and `topk_logprobs` [t, k] for a row and its features.
        cache_bytes (`int`, *optional*, defaults to 0): memory for encoded rows.
    """

    def __init__(
        self,
        processor,
        rows,
        encode_pseudo: EncodePseudo | None = None,
        cache_bytes: int = 0,
        stored_topk: StoredTopK | None = None,
    ):
        self.processor, self.rows, self.encode_pseudo = processor, undecoded(rows), encode_pseudo
        self.stored_topk = stored_topk
        self.room = cache_bytes
        self.cache: dict[tuple[bool, int], Features] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Features]:
        """`{"row": features}`, and `"pseudo"` features where the teacher's answers differ from the true ones."""
        item = {"row": self._features(index)}
        if self.encode_pseudo is not None:
            pseudo = self._features(index, pseudo=True)
            if not all(torch.equal(pseudo[key], item["row"][key]) for key in ("input_ids", "labels")):
                item["pseudo"] = pseudo
        return item

    def _features(self, index: int, pseudo: bool = False) -> Features:
        features = self.cache.get((pseudo, index))
        if features is None:
            row = fetch(self.rows, index)
            encode = self.encode_pseudo if pseudo else None
            features = encode(row, index) if encode else encode_row(self.processor, row, index)
            if self.stored_topk is not None and not pseudo:
                features |= self.stored_topk(row, features, index)
            size = sum(value.nbytes for value in features.values())
            if size <= self.room:
                self.room -= size
                self.cache[pseudo, index] = features
        return features


def encode_row(processor, row: Row, number: int = 0) -> Features:
    """Encodes row `number` of a dataset: token fields of shape [t], the others as [`encode_rows`] gives them."""
    features = {key: torch.as_tensor(value) for key, value in encode_rows(processor, [row], [number]).items()}
    return {key: value[0] if key in TOKEN_FIELDS else value for key, value in features.items()}


def collate(rows: Sequence[Features], pad_token_id: int, padding_side: str = "right") -> Features:
    """
    Makes a batch of encoded rows: token fields, and log-probabilities where any row has some, are padded, pixels and
    grids concatenated.
    """
    padding, batch = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}, {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        if key in TOPK_FIELDS:
            none = values[0].new_zeros(1, values[0].shape[1])
            values = [row[key] if key in row else none.expand(len(row["input_ids"]), -1) for row in rows]
        batch[key] = (
            pad_sequence(values, batch_first=True, padding_value=padding.get(key, 0), padding_side=padding_side)
            if key in (*TOKEN_FIELDS, *TOPK_FIELDS)
            else torch.cat(values)
        )
    return batch


class DistillCollator:
    """
    Pads token fields on the right, concatenates pixels and grids.

    The batch holds the rows in order and after them, if `pseudo` is set, once more those for which the teacher's
    answers differ from the true ones. `labels` [b, t] are the true answers (-100 in the repeated rows),
    `pseudo_labels` [b, t] the teacher's: rows on which both agree serve both losses in one pass. `topk_ids` and
    `topk_logprobs` [b, t, k], if rows have them, are the teacher's log-probabilities for the token after each, zero
    where `labels` count none.

    Args:
        pad_token_id (`int`): id to pad `input_ids` with.
        pseudo (`bool`, *optional*, defaults to `False`): whether to make `pseudo_labels`.
    """

    def __init__(self, pad_token_id: int, pseudo: bool = False):
        self.pad_token_id, self.pseudo = pad_token_id, pseudo

    def __call__(self, items: Sequence[dict[str, Features]]) -> Features:
        rows = [item["row"] for item in items]
        repeated = [item["pseudo"] for item in items if "pseudo" in item] if self.pseudo else []
        batch = collate([*rows, *repeated], self.pad_token_id)
        if self.pseudo:
            differs = torch.tensor(["pseudo" in item for item in items] + [False] * len(repeated))
            batch["pseudo_labels"] = batch["labels"].masked_fill(differs[:, None], IGNORE_INDEX)
            batch["labels"][len(rows) :] = IGNORE_INDEX
        return batch
