"""`linmu-bench`: time to first token, throughput and memory of student and teacher against the prompt's length."""

import argparse
import os
import platform
import sys
from functools import partial
from pathlib import Path

import torch

from ..evaluation.loading import check_device, default_device, library_versions
from ..evaluation.speed.measure import Clock, Variant, encode_seconds, is_teacher, measure, summarise
from ..evaluation.speed.models import (
    ATTENTIONS,
    PRESETS,
    BenchmarkDecoder,
    FlexMAOnly,
    LocalSwinOnly,
    ablated,
    prompt_layout,
    text_config,
    vision_config,
    vision_encoder,
    with_attention,
)
from ..families import FAMILIES
from ..families.family import Preset
from ..files import check_report
from ..ops.backends import use_kernels
from .common import Parser, check_positive, run_command, write_report


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="linmu-bench", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", default="tiny", help=f"{', '.join(PRESETS)}, a folder, a config.json or a Hub id")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of the prompt"
    )
    parser.add_argument("--no_teacher", action="store_true", help="leave full attention out")
    parser.add_argument("--teacher_max_tokens", type=int, help="leave full attention out above this length")
    parser.add_argument(
        "--teacher_backends", nargs="+", default=[], choices=list(ATTENTIONS), metavar="NAME",
        help=f"also full attention by these backends of PyTorch: {', '.join(ATTENTIONS)}; the fastest one counts",
    )  # fmt: skip
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="also the student with these scans")
    parser.add_argument("--ablate", action="store_true", help="also the student without either branch (Table 4)")
    parser.add_argument("--media", choices=["video", "image"], help="default: video, for nvila-8b image")
    parser.add_argument(
        "--grid", metavar="HxW", help="vision tokens of a frame or image (default: 16x16, for nvila-8b 48x64)"
    )
    parser.add_argument("--vision_share", type=float, default=0.95, help="share of vision tokens in the prompt")
    parser.add_argument("--vision_encoder", action="store_true", help="also what the vision encoder takes")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], help="sequences decoded at once")
    parser.add_argument("--prefill_batch_sizes", type=int, nargs="+", default=[1], help="prompts read at once")
    parser.add_argument("--graphs", action="store_true", help="also decode compiled, on a GPU with CUDA graphs")
    parser.add_argument("--largest_batch", action="store_true", help="also the largest batch that fits (CUDA)")
    parser.add_argument("--prefill_chunk", type=int, metavar="N", help="read the prompt in chunks of N tokens")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements in turns, of which the fastest counts")
    parser.add_argument("--dtype", choices=list(DTYPES), help="by default bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves here, as in Fig. 6 and 7")
    arguments = parser.parse_args(argv)
    try:
        check(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Raises a `ValueError` naming the option, its value and the remedy; fills in what depends on others."""
    lists = ("lengths", "batch_sizes", "prefill_batch_sizes")
    check_positive(arguments, *lists, "teacher_max_tokens", "prefill_chunk", "steps", "repeats", "threads")
    for name in lists:
        setattr(arguments, name, sorted(set(getattr(arguments, name))))
    preset = PRESETS[arguments.model][1] if arguments.model in PRESETS else Preset({})
    media, grid = preset.media, preset.grid
    arguments.media, arguments.grid = arguments.media or media, arguments.grid or grid
    height, _, width = arguments.grid.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--grid {arguments.grid} must be height x width of at least 1, such as 16x16")
    arguments.grid = (int(height), int(width))
    if not 0 <= arguments.vision_share <= 1:
        raise ValueError(f"--vision_share {arguments.vision_share} must be between 0 and 1")
    most = arguments.teacher_max_tokens
    if most is not None and most < arguments.lengths[0]:
        raise ValueError(f"--teacher_max_tokens {most} leaves the teacher out at every length: give --no_teacher")
    arguments.device = arguments.device or default_device()
    device = check_device(arguments.device)
    if arguments.largest_batch and device.type != "cuda":
        raise ValueError(f"--largest_batch needs a GPU, and the device is {arguments.device}")
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if arguments.png is not None:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise ValueError("--png needs matplotlib: pip install matplotlib") from None
        if arguments.png.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
            raise ValueError(f"--png {arguments.png} must end in .png, or in .svg or .pdf")
    for name in ("teacher_backends", "teacher_max_tokens"):
        if arguments.no_teacher and getattr(arguments, name):
            raise ValueError(f"--{name} has no effect with --no_teacher: leave one of them out")
    for option, file in (("--json", arguments.json), ("--png", arguments.png)):
        if file is not None:
            file.absolute().parent.mkdir(parents=True, exist_ok=True)
            check_report(file, option)


def build_variants(arguments: argparse.Namespace, config) -> dict[str, Variant]:
    """Builds the curves that were asked for. Student and teacher share every weight outside the mixers."""
    dtype = DTYPES[arguments.dtype]
    student = BenchmarkDecoder(config, dtype, arguments.device)
    variants = {"student": Variant(student)}
    if not arguments.no_teacher:
        full = type(config).from_dict(
            config.to_dict() | {"layer_types": ["full_attention"] * config.num_hidden_layers}
        )
        teacher = BenchmarkDecoder(full, dtype, arguments.device, student)
        variants["teacher"] = Variant(teacher)
        for name in arguments.teacher_backends:
            variants[f"teacher, {name}"] = Variant(teacher, partial(with_attention, name))
    for name in arguments.backends:
        variants[f"student, {name}"] = Variant(student, partial(use_kernels, ssd=name))
    if arguments.ablate:
        variants["student without Local-Swin"] = Variant(ablated(student, FlexMAOnly))
        variants["student without Flex-MA"] = Variant(ablated(student, LocalSwinOnly))
    return variants


def benchmark(arguments: argparse.Namespace) -> dict:
    """Measures everything that was asked for, as it goes to the JSON file; that is written anew after every length."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = text_config(arguments.model)
    layouts = {
        tokens: prompt_layout(
            tokens,
            arguments.vision_share,
            arguments.grid,
            arguments.media,
            arguments.prefill_chunk,
            separators=FAMILIES[vision_config(arguments.model).model_type].separators,
        )
        for tokens in arguments.lengths
    }
    variants = build_variants(arguments, config)
    limit = arguments.teacher_max_tokens or arguments.lengths[-1]
    setting = {key: value for key, value in vars(arguments).items() if key not in ("json", "png")}
    setting |= {"clock": Clock(arguments.device).name, "text_config": config.to_dict()}
    rows: list[dict] = []
    for length in arguments.lengths:
        rows += measure(
            {name: v for name, v in variants.items() if not is_teacher(name) or length <= limit},
            [length],
            layout_of=layouts.__getitem__,
            batches=arguments.batch_sizes,
            prefill_batches=arguments.prefill_batch_sizes,
            steps=arguments.steps,
            repeats=arguments.repeats,
            device=arguments.device,
            chunk_size=arguments.prefill_chunk,
            largest=arguments.largest_batch,
            graphs=arguments.graphs,
        )
        if arguments.vision_encoder and layouts[length] is not None:
            kind = (arguments.media, DTYPES[arguments.dtype], arguments.device)
            seconds = encode_seconds(vision_encoder(arguments.model, layouts[length], *kind), arguments.device)
            for row in rows:
                if row["tokens"] == length:
                    row["vision_encoder_s"] = seconds
        results = {
            "setting": setting,
            "machine": machine(arguments.device),
            "versions": library_versions(),
            "rows": rows,
            **summarise(rows),
        }
        if arguments.json:
            write_json(results, arguments.json)
    return results


def machine(device: str = "cuda") -> dict:
    """Returns what the figures were measured on; of several GPUs the one that `device` names."""
    facts = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "system": platform.platform()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts["processor"] = models[0] if models else facts["processor"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device).index or 0)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def plot(results: dict, path: Path) -> None:
    """Draws TTFT and token throughput against the length of the prompt, one curve for each model (Fig. 6 and 7)."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    done = [row for row in results["rows"] if "ttft_s" in row]
    for name in dict.fromkeys(row["model"] for row in done):
        mine = [row for row in done if row["model"] == name]
        panels[0].plot([row["tokens"] for row in mine], [row["ttft_s"] for row in mine], marker="o", label=name)
        for batch in dict.fromkeys(batch for row in mine for batch in row["decode"]):
            points = [(row["tokens"], row["decode"].get(batch, {}).get("tokens_per_s")) for row in mine]
            points = [point for point in points if point[1] is not None]
            if len(points) > 1 or len(mine) == 1:
                panels[1].plot(*zip(*points, strict=True), marker="o", label=f"{name}, batch {batch}")
    for axes, label in zip(panels, ("time to first token (s)", "throughput (tokens / s)"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel=label)
        axes.xaxis.set_major_locator(_powers_of_two(done))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    device = results["machine"].get("gpu") or results["machine"]["processor"]
    figure.suptitle(f"{results['setting']['model']}, {results['setting']['dtype']}, {device}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _powers_of_two(rows):
    from matplotlib.ticker import FixedLocator

    return FixedLocator(sorted({row["tokens"] for row in rows}))


def format_summary(results: dict) -> str:
    lines = []
    for name, exponents in results["growth_exponents"].items():
        shown = ", ".join(f"{key} ~ n^{value:.2f}" for key, value in exponents.items() if value is not None)
        if shown:
            lines.append(f"{name}: {shown}")
    for row in results["speedups"]:
        throughput = ", ".join(f"{value:.2f} at batch {batch}" for batch, value in row["throughput"].items())
        name = f"{row['model']} against teacher, {row['tokens']} tokens"
        lines.append(f"{name}: speed-up of TTFT {row['ttft']:.2f}, of tokens/s {throughput}")
    return "\n".join(lines)


def write_json(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, results)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def run() -> None:
        results = benchmark(arguments)
        print(format_summary(results))
        if arguments.png:
            plot(results, arguments.png)

    return run_command("linmu-bench", run)


if __name__ == "__main__":
    sys.exit(main())
