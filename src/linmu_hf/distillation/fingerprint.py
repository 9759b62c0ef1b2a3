"""What a run was made of, as short hashes: it is continued only with the same."""

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.teacher import teacher_settings
from ..data.hashing import update_hash
from ..data.loading import iterate, undecoded


def fingerprint_weights(model: nn.Module) -> str:
    """Returns a hash of the configuration and of every tensor: its name, shape, ends and the sum of all its bits."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        config.pop(name, None)
    _update_json(digest, config)
    for name, tensor in sorted(model.state_dict().items()):
        _update_tensor(digest, f"{name} {tensor.dtype}", tensor.shape, tensor.flatten(), [tensor.flatten()])
    return digest.hexdigest()[:16]


def fingerprint_teacher(teacher: nn.Module) -> str:
    """
    Returns a hash of all that decides what a teacher says: of the configuration only this, and every tensor's values,
    whether in half precision or, converted from it, in float32.
    """
    digest = hashlib.sha256()
    _update_json(digest, teacher_settings(teacher.config))
    for name, tensor in sorted(teacher.state_dict().items()):
        flat = tensor.flatten()
        pieces = (piece.float() if piece.is_floating_point() else piece for piece in flat.split(2**24))
        _update_tensor(digest, name, tensor.shape, flat, pieces)
    return digest.hexdigest()[:16]


def fingerprint_processor(processor) -> str:
    """Returns a hash of the tokenizer, the chat template and the settings of image and video processors."""
    digest = hashlib.sha256()
    tokenizer = processor.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    _update_json(
        digest, [processor.to_dict(), vocabulary, str(processor.chat_template), str(tokenizer.special_tokens_map)]
    )
    return digest.hexdigest()[:16]


def fingerprint_rows(dataset) -> str:
    """
    Returns a hash of all rows whole: every column, the bytes of pictures, and of a file that a row names its path,
    size and 64 KiB of its content, so that one that was lost may be put back. A `datasets.Dataset` is read as it is
    stored, nothing is decoded; of a stream, which may be endless, the first 256 rows count.
    """
    digest = hashlib.sha256()
    if hasattr(dataset, "data") and dataset.format["type"] is None:
        for table in dataset.with_format("arrow").iter(256):
            for row in table.to_pylist():
                update_hash(digest, row)
    elif not hasattr(dataset, "__len__"):
        for row in islice(iterate(undecoded(dataset)), 256):
            update_hash(digest, row)
    else:
        for index in range(len(dataset)):
            update_hash(digest, dataset[index])
    return digest.hexdigest()[:16]


def _update_json(digest, value: Any) -> None:
    """Adds settings; other than rows they name no files."""
    digest.update(json.dumps(value, sort_keys=True, default=str).encode())


def _update_tensor(digest, name: str, shape: torch.Size, flat: Tensor, pieces: Iterable[Tensor]) -> None:
    """Adds name, shape, ends and the sum of all bits of a tensor [n] that comes in pieces."""
    total = 0
    for piece in pieces:
        bits = piece.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[piece.element_size()])
        total += bits.sum(dtype=torch.int64).item()
    ends = torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy()  # a sum alone knows no order
    update_hash(digest, [name, list(shape), ends, total])
