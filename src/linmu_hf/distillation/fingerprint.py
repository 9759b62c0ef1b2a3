"""What a run was made of, as short hashes: it is continued only with the same."""

import hashlib

import torch
from torch import nn

from ..data.hashing import update_hash


def fingerprint_weights(model: nn.Module) -> str:
    """Returns a hash of the configuration and of every tensor: its name, shape, ends and the sum of all its bits."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        config.pop(name, None)
    update_hash(digest, config)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        ends = torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy()  # a sum alone knows no order
        update_hash(digest, [name, str(tensor.dtype), list(tensor.shape), ends, bits.sum(dtype=torch.int64).item()])
    return digest.hexdigest()[:16]


def fingerprint_processor(processor) -> str:
    """Returns a hash of the tokenizer, the chat template and the settings of image and video processors."""
    digest = hashlib.sha256()
    tokenizer = processor.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    update_hash(
        digest, [processor.to_dict(), vocabulary, str(processor.chat_template), str(tokenizer.special_tokens_map)]
    )
    return digest.hexdigest()[:16]


def fingerprint_rows(dataset) -> str:
    """
    Returns a hash of all rows whole: every column, the bytes of pictures, and of a file that a row names its path,
    size and time of change. A `datasets.Dataset` is read as it is stored, nothing is decoded.
    """
    digest = hashlib.sha256()
    if hasattr(dataset, "data") and dataset.format["type"] is None:
        for table in dataset.with_format("arrow").iter(256):
            for row in table.to_pylist():
                update_hash(digest, row)
    else:
        for index in range(len(dataset)):
            update_hash(digest, dataset[index])
    return digest.hexdigest()[:16]
