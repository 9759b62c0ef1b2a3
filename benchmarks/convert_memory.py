"""Peak memory of `linmu-convert` on a synthetic checkpoint that is far larger than the memory it may use.

    python benchmarks/convert_memory.py [--gigabytes 4] [--dtype bfloat16] [--convert_dtype float32] [--json FILE]

Writes a Qwen2.5-VL checkpoint of that size in 500 MB shards to a temporary folder, converts it in a process of its
own, prints the most memory that process held, and fails if it is more than the limit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from linmu_hf.safetensors_io import OutputTensor, pack_shards, write_index, write_shard


SHARD_BYTES = 500_000_000
LIMIT_BYTES = 1_500_000_000
HUB_NAMES = {"model.visual.": "visual.", "model.language_model.": "model."}


def make_config(n_bytes: int, dtype: torch.dtype) -> Qwen2_5_VLConfig:
    """As many layers as fit; embedding and head are the largest tensors, about 400 MB each in bfloat16."""
    hidden, intermediate, vocab = 2048, 11008, 100_000
    embeddings = 2 * vocab * hidden
    layer = 3 * hidden * intermediate + 2 * hidden * hidden + 2 * hidden * 256
    layers = max(1, round((n_bytes / dtype.itemsize - embeddings) / layer))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "out_hidden_size": hidden,
        },
        image_token_id=10,
        video_token_id=11,
        vision_start_token_id=12,
        vision_end_token_id=13,
    )
    config.dtype = dtype
    return config


def noise(numel: int, dtype: torch.dtype, seed: int) -> Iterator[memoryview]:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(2**20, generator=generator).mul(0.02).to(dtype)
    for start in range(0, numel, len(block)):
        yield memoryview(block[: numel - start].view(torch.uint8).numpy())


def write_teacher(folder: Path, n_bytes: int, dtype: torch.dtype) -> int:
    config = make_config(n_bytes, dtype)
    with torch.device("meta"):
        state = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    tensors = []
    for seed, (name, tensor) in enumerate(state.items()):
        for ours, hub in HUB_NAMES.items():
            if name.startswith(ours):
                name = name.replace(ours, hub, 1)
                break
        tensors.append(OutputTensor(name, dtype, tuple(tensor.shape), partial(noise, tensor.numel(), dtype, seed)))
    shards = pack_shards(tensors, SHARD_BYTES)
    folder.mkdir(parents=True)
    for file, shard in shards.items():
        write_shard(folder / file, shard, lambda n: None)
    write_index(folder, shards)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in tensors)


def measure(gigabytes: float, dtype: str, convert_dtype: str | None, folder: Path) -> dict:
    written = write_teacher(folder / "teacher", int(gigabytes * 1e9), getattr(torch, dtype))
    command = [sys.executable, "-m", "linmu_hf.commands.convert", "--teacher", folder / "teacher"]
    command += ["--output_dir", folder / "student", "--json", folder / "report.json"]
    command += ["--dtype", convert_dtype] if convert_dtype else []
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = json.loads((folder / "report.json").read_text())
    return {
        "checkpoint_bytes": written,
        "dtype": dtype,
        "written_bytes": report["bytes_written"],
        "written_dtype": report["dtype"],
        "peak_bytes": peak,
        "limit_bytes": LIMIT_BYTES,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--convert_dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--folder", help="where to put the checkpoints, removed afterwards (default: the system's)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.gigabytes, args.dtype, args.convert_dtype, Path(folder))
    print(
        f"{result['checkpoint_bytes'] / 1e9:.2f} GB of {result['dtype']} in, "
        f"{result['written_bytes'] / 1e9:.2f} GB of {result['written_dtype']} out, {result['seconds']:.0f} s: "
        f"peak memory {result['peak_bytes'] / 1e9:.2f} GB (limit {LIMIT_BYTES / 1e9:.1f} GB)"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if result["peak_bytes"] > LIMIT_BYTES:
        sys.exit("too much memory")


if __name__ == "__main__":
    main()
