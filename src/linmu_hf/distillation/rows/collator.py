"""From dataset rows to training batches: one row is encoded once, batches only pad and concatenate."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ...data import Row, encode_rows
from ...data.formats import fetch
from ...data.lengths import count_tokens
from ...data.loading import undecoded
from ...data.skipping import SkippedRows
from ..losses import IGNORE_INDEX


Features = dict[str, Tensor]
Item = dict[str, Features]
EncodePseudo = Callable[[Row, int], Features]
StoredTopK = Callable[[Row, Features, int], Features]
TOKEN_FIELDS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")  # [t] per row, padded on the right
TOPK_FIELDS = ("topk_ids", "topk_logprobs")  # [t, k] per row: the teacher's likeliest tokens after each token
PADDED = (*TOKEN_FIELDS, "pseudo_labels", *TOPK_FIELDS)


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
        skipped (`SkippedRows`, *optional*): how many unreadable rows are left out; by default none.
    """

    def __init__(
        self,
        processor,
        rows,
        encode_pseudo: EncodePseudo | None = None,
        cache_bytes: int = 0,
        stored_topk: StoredTopK | None = None,
        skipped: SkippedRows | None = None,
    ):
        self.processor, self.rows, self.encode_pseudo = processor, undecoded(rows), encode_pseudo
        self.stored_topk = stored_topk
        self.skipped = SkippedRows() if skipped is None else skipped
        self.room = cache_bytes
        self.cache: dict[tuple[bool, bool, int], Features] = {}
        self._lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item | None:
        """
        Returns `{"row": features}`, and `"pseudo"` features where the teacher's answers differ from the true ones;
        `None` for a row that is left out.
        """
        try:
            item = {"row": self._features(index)}
            if self.encode_pseudo is not None:
                pseudo = self._features(index, pseudo=True)
                if not all(torch.equal(pseudo[key], item["row"][key]) for key in ("input_ids", "labels")):
                    item["pseudo"] = pseudo
        except (ValueError, OSError) as error:
            self.skipped.skip(index, error)
            return None
        return item

    def lengths(self) -> list[int]:
        """Returns the number of tokens of every row, counted once; 1 for a row that cannot be read."""
        if self._lengths is None:
            numbers = tqdm(range(len(self)), desc="lengths of rows", unit="row", disable=len(self) < 1000)
            self._lengths = [self._count_tokens(number) for number in numbers]
        return self._lengths

    def _count_tokens(self, index: int) -> int:
        try:
            return count_tokens(self.processor, fetch(self.rows, index), index)
        except ValueError:
            return 1

    def _features(self, index: int, pseudo: bool = False) -> Features:
        topk = None if pseudo else self.stored_topk
        key = pseudo, topk is not None, index
        features = self.cache.get(key)
        if features is None:
            row = fetch(self.rows, index)
            encode = self.encode_pseudo if pseudo else None
            features = encode(row, index) if encode else encode_row(self.processor, row, index)
            if topk is not None:
                features |= topk(row, features, index)
            size = sum(value.nbytes for value in features.values())
            if size <= self.room:
                self.room -= size
                self.cache[key] = features
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
    padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "pseudo_labels": IGNORE_INDEX}
    batch = {}
    for key, values in _by_field(rows):
        batch[key] = (
            pad_sequence(values, batch_first=True, padding_value=padding.get(key, 0), padding_side=padding_side)
            if key in PADDED
            else torch.cat(values)
        )
    return batch


def pack(rows: Sequence[Features]) -> Features:
    """
    Makes a batch of a single row [1, t] of encoded rows, one after another, which do not see each other:
    `cu_seq_lens_q` [rows + 1] says where they begin, and there is no mask. Pixels and grids are concatenated.
    """
    batch: Features = {}
    for key, values in _by_field(rows):
        if key in ("labels", "pseudo_labels"):  # the token before is of another row
            values = [torch.cat([value.new_full((1,), IGNORE_INDEX), value[1:]]) for value in values]
        if key != "attention_mask":
            batch[key] = torch.cat(values)[None] if key in PADDED else torch.cat(values)
    lengths = [len(row["input_ids"]) for row in rows]
    batch["cu_seq_lens_q"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return batch


def _by_field(rows: Sequence[Features]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields every field with its values; rows without log-probabilities, where others have some, have zeros."""
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        if key in TOPK_FIELDS:
            none = values[0].new_zeros(1, values[0].shape[1])
            values = [row[key] if key in row else none.expand(len(row["input_ids"]), -1) for row in rows]
        yield key, values


class DistillCollator:
    """
    A collator that pads token fields on the right, or packs them, and concatenates pixels and grids.

    The batch holds the rows in order and after them, if `pseudo` is set, once more those for which the teacher's
    answers differ from the true ones. `labels` [b, t] are the true answers (-100 in the repeated rows),
    `pseudo_labels` [b, t] the teacher's: rows on which both agree serve both losses in one pass. `topk_ids` and
    `topk_logprobs` [b, t, k], if rows have them, are the teacher's log-probabilities for the token after each, zero
    where `labels` count none.

    Rows of a stream are encoded here, rows that are left out (`None`) are missing, and lists of rows, as packed
    datasets give them, count as their rows. A batch of which nothing is left is one token without a label, with the
    fields of the others: processes must agree on whether they ask the teacher.

    Args:
        pad_token_id (`int`): id to pad `input_ids` with.
        pseudo (`bool`, *optional*, defaults to `False`): whether to make `pseudo_labels`.
        packing (`bool`, *optional*, defaults to `False`):
            Whether the batch is one row [1, t] with `cu_seq_lens_q`, see [`pack`], instead of a padded one.
        topk (`bool`, *optional*, defaults to `False`): whether rows have `topk_ids` and `topk_logprobs`.
    """

    def __init__(self, pad_token_id: int, pseudo: bool = False, packing: bool = False, topk: bool = False):
        self.pad_token_id, self.pseudo, self.packing, self.topk = pad_token_id, pseudo, packing, topk

    def __call__(self, items: Sequence[Any]) -> Features:
        return self.batch(self.load(items))

    def load(self, items: Sequence[Any]) -> list[Item | None]:
        """Returns the rows of `items`, those of a stream encoded."""
        flat = itertools.chain.from_iterable(item if isinstance(item, list) else [item] for item in items)
        return [item.load() if hasattr(item, "load") else item for item in flat]

    def batch(self, items: Sequence[Item | None]) -> Features:
        """Makes a batch of rows that [`load`] returned."""
        kept: list[Item] = [item for item in items if item is not None] or [{"row": self._blank()}]
        rows = [dict(item["row"]) for item in kept]
        if self.pseudo:
            for item, row in zip(kept, list(rows)):
                row["pseudo_labels"] = row["labels"]
                if "pseudo" in item:
                    row["pseudo_labels"] = torch.full_like(row["labels"], IGNORE_INDEX)
                    unlabelled = torch.full_like(item["pseudo"]["labels"], IGNORE_INDEX)
                    rows.append({**item["pseudo"], "labels": unlabelled, "pseudo_labels": item["pseudo"]["labels"]})
        return pack(rows) if self.packing else collate(rows, self.pad_token_id)

    def _blank(self) -> Features:
        """The features of a row of one token, from which nothing is learned."""
        values = {"input_ids": self.pad_token_id, "attention_mask": 1, "mm_token_type_ids": 0, "labels": IGNORE_INDEX}
        features = {key: torch.tensor([value]) for key, value in values.items()}
        if self.topk:
            features |= {"topk_ids": torch.zeros(1, 1, dtype=torch.int32), "topk_logprobs": torch.zeros(1, 1)}
        return features
