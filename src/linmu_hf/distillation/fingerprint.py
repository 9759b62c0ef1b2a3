"""What a run was made of, as short hashes: it is continued only with the same."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn


def fingerprint_weights(model: nn.Module) -> str:
    """Returns a hash of the configuration and of every tensor: its name, shape, ends and the sum of all its bits."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        config.pop(name, None)
    _update(digest, config)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        ends = torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy()  # a sum alone knows no order
        _update(digest, [name, str(tensor.dtype), list(tensor.shape), ends, bits.sum(dtype=torch.int64).item()])
    return digest.hexdigest()[:16]


def fingerprint_processor(processor) -> str:
    """Returns a hash of the tokenizer, the chat template and the settings of image and video processors."""
    digest = hashlib.sha256()
    tokenizer = processor.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    _update(digest, [processor.to_dict(), vocabulary, str(processor.chat_template), str(tokenizer.special_tokens_map)])
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
                _update(digest, row)
    else:
        for index in range(len(dataset)):
            _update(digest, dataset[index])
    return digest.hexdigest()[:16]


def _update(digest, value: Any) -> None:
    """Adds one value of any nesting to a hash."""
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, Image):
        # One that was opened and not yet read is still what its file holds.
        if getattr(value, "fp", None) is not None and os.path.isfile(getattr(value, "filename", "") or ""):
            _update(digest, value.filename)
        else:
            digest.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif isinstance(value, bytes):
        digest.update(f"bytes{len(value)}".encode() + value)
    elif isinstance(value, str):
        digest.update(f"str{len(value)}{value}".encode(errors="surrogatepass"))
        if len(value) < 4096 and os.path.isfile(value):
            status = os.stat(value)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    else:  # numbers and None by value; of what else there may be, the type
        known = value is None or isinstance(value, (bool, int, float, np.generic))
        digest.update((repr(value) if known else type(value).__name__).encode())
