"""
Safetensors checkpoints as streams: headers read and checked first, tensors copied in chunks, never held whole.

The format is read and written here because `save_file` takes every tensor of a file at once: with shards of 2 GB that
is 2 GB of memory, with one file the whole model. Chunks also let a shard be hashed and checked as it is written.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import whole_file, write_text


CHUNK_BYTES = 32 * 2**20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: `file[begin:end]` holds `shape` elements of `dtype`, row by row."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Yields the tensor's bytes, in pieces of at most `CHUNK_BYTES` read at a time."""
        with open(self.file, "rb") as file:
            file.seek(self.begin)
            left = self.end - self.begin
            while left:
                data = bytearray(min(left, CHUNK_BYTES))
                if file.readinto(data) != len(data):
                    raise OSError(f"{self.file} ended while it was read")
                left -= len(data)
                yield memoryview(data)

    def values(self) -> Iterator[torch.Tensor]:
        """Yields the tensor's values in the same pieces, flat."""
        return (torch.frombuffer(chunk, dtype=self.dtype) for chunk in self.chunks())


def tensor_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yields the bytes of a tensor in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    yield memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """
    Reads the tensors of a safetensors file.

    Raises:
        `ValueError`: The header is broken, or the file is not as long as the header says.
    """
    size = file.stat().st_size
    remedy = "download or copy it again"
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {
            name: StoredTensor(
                file,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except KeyError as error:
        raise ValueError(f"{file} holds tensors of an unsupported kind: {error}") from error
    except (ValueError, struct.error, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is corrupt or no safetensors file ({error}): {remedy}") from error
    for name, tensor in tensors.items():
        if tensor.end - tensor.begin != tensor.numel * tensor.dtype.itemsize:
            raise ValueError(
                f"{file} is corrupt: the size of {name!r} does not fit its shape {tensor.shape}; {remedy}"
            )
    end = max((tensor.end for tensor in tensors.values()), default=start)
    if end != size:
        raise ValueError(f"{file} is truncated or corrupt: it has {size} bytes, its header needs {end}; {remedy}")
    return tensors


def read_config(file: Path) -> dict:
    """
    Reads a JSON configuration.

    Raises:
        `FileNotFoundError`, `ValueError`: It is not there, or broken.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: download or copy it too")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}): download or copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object: download or copy it again")
    return config


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """
    Reads the tensors of a checkpoint folder, one file or sharded, with every header checked.

    Raises:
        `FileNotFoundError`: There are no safetensors weights, or the index names a shard that is missing.
        `ValueError`: A shard is corrupt or truncated, or the index does not fit the shards.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise FileNotFoundError(
                f"{folder} holds only pickled weights (.bin, .pt), which are not read: "
                "load it with Transformers and save_pretrained it, which writes safetensors"
            )
        raise FileNotFoundError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_file} is corrupt ({error!r}): download or copy it again") from error
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(
            f"{index_file} names {len(missing)} of {len(shards)} shards that are missing, "
            f"{missing[0]} first: download or copy them"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(f"{index_file} places {name!r} in {shard}, which does not hold it: download both again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written, and where its bytes come from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pack_shards(tensors: Sequence[OutputTensor], max_shard_size: int) -> dict[str, list[OutputTensor]]:
    """Splits tensors, in order, into files of at most `max_shard_size` bytes; a larger tensor has one of its own."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_shard(file: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], object]) -> dict[str, str]:
    """
    Writes a safetensors file chunk by chunk; it appears under its name only when complete and on disk.

    Returns:
        `dict[str, str]`: The SHA-256 of each tensor's bytes, as they came from their source.
    """
    # Wide elements first keeps every tensor aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    hashes = {}
    with whole_file(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for tensor in tensors:
            digest = hashlib.sha256()
            written = 0
            for chunk in tensor.chunks():
                stream.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                progress(len(chunk))
            assert written == tensor.nbytes, tensor.name
            hashes[tensor.name] = digest.hexdigest()
    return hashes


def write_index(folder: Path, shards: dict[str, list[OutputTensor]]) -> None:
    """Writes the index of a sharded checkpoint; a single file needs none."""
    if list(shards) == [SINGLE_FILE]:
        return
    tensors = [tensor for shard in shards.values() for tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def file_hash(tensor: StoredTensor, progress: Callable[[int], object]) -> str:
    """Returns the SHA-256 of a stored tensor's bytes."""
    digest = hashlib.sha256()
    for chunk in tensor.chunks():
        digest.update(chunk)
        progress(len(chunk))
    return digest.hexdigest()
