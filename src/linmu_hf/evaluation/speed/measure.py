"""Speed and memory of the decoder against the length of the prompt: student, teacher and variants in one run.

Weights are random and prompts are random embeddings: only shapes matter for speed. The vision encoder is left out, as
in Sec. 4 of the paper; what it takes can be measured beside it. Positions are one-dimensional, whatever the model.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import StaticCache

from ...modeling.cache import MMateCacheLayer
from ..loading import first_line
from .models import BenchmarkDecoder


@dataclass
class Variant:
    """
    One curve of the benchmark.

    Args:
        decoder (`BenchmarkDecoder`): The model.
        patch (`Callable`, *optional*): Makes the context manager in which it runs.
        failure (`str`, *optional*): Why it does not run any more.
    """

    decoder: BenchmarkDecoder
    patch: Callable[[], AbstractContextManager] | None = None
    failure: str | None = None

    def run(self, function):
        """Runs `function` inside the variant's context, without gradients; `None` once memory was not enough."""
        if self.failure:
            return None
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.patch:
                stack.enter_context(self.patch())
            try:
                return function()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    self.failure = "out of memory"
                elif self.patch:  # a kernel that was named besides; the other curves are worth having
                    self.failure = f"{type(error).__name__}: {first_line(error)}"
                else:
                    raise
        return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Clock:
    """
    Seconds of a call and its peak memory. A CPU run on one thread is timed by the seconds that the processor spent on
    it, which other programs on the machine do not lengthen; anything else by the wall clock.
    """

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.name = "process" if not self.cuda and torch.get_num_threads() == 1 else "wall"
        self._now = time.process_time if self.name == "process" else time.perf_counter

    def __call__(self, function):
        """
        Returns `(seconds, bytes or None, result)`; the bytes are the most that was held at once, weights included.
        """
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory
        start = self._now()
        result = function()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return self._now() - start, self._peak(), result

    def _peak(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def cache_bytes(cache) -> int:
    """Returns the bytes that a cache holds, keys and values or states."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [t for value in held for t in (value.values() if isinstance(value, dict) else [value])]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def largest_batch(fits: Callable[[int], bool], limit: int = 1 << 16) -> int:
    """Returns the largest batch for which `fits` holds, to about 6%; 0 for none."""
    if not fits(1):
        return 0
    good = 1
    while good < limit and fits(min(2 * good, limit)):
        good = min(2 * good, limit)
    bad = min(2 * good, limit + 1)
    while bad - good > max(good // 16, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def growth_exponent(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Fits e of values ~ lengths^e by least squares in log-log; `None` for fewer than two points."""
    if len(set(lengths)) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def in_turns(variants: dict[str, Variant], call: Callable[[str], tuple], repeats: int) -> dict[str, list]:
    """Returns what `call` gives for each variant that runs, `repeats` times in turns."""
    results: dict[str, list] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            result = variant.run(partial(call, name))
            if result is None:
                results[name] = []
            else:
                results[name].append(result)
    return results


def measure(
    variants: dict[str, Variant], lengths: Iterable[int], *, layout_of: Callable, batches: Sequence[int] = (1,),
    prefill_batches: Sequence[int] = (1,), steps: int = 16, repeats: int = 3, device: str = "cpu",
    chunk_size: int | None = None, largest: bool = False, graphs: bool = False, report: Callable[[str], None] = print,
) -> list[dict]:  # fmt: skip
    """
    Measures TTFT, decode throughput and memory of every variant at every length.

    Args:
        variants (`dict[str, Variant]`): What to measure; all in turns, so that a busy machine slows all.
        lengths (`Iterable[int]`): Tokens of the prompt, ascending.
        layout_of (`Callable`): Gives the `vision_layout` of a prompt of so many tokens.
        batches, prefill_batches (`Sequence[int]`): Sequences decoded at once, and prompts read at once.
        steps, repeats (`int`): Decode steps of one measurement; measurements, of which the fastest counts; a decode
            step, which is short, is measured at least three times.
        chunk_size (`int`, *optional*): Prefill in chunks.
        largest (`bool`): Also decode the largest batch that fits (CUDA only).
        graphs (`bool`): Also decode as `generate(cache_implementation="static")` does: compiled, with CUDA graphs.

    Returns:
        `list[dict]`: One row for each length and variant.
    """
    clock, rows = Clock(device), []
    for tokens in lengths:
        layout = layout_of(tokens)
        vision = 0 if layout is None else int((layout[..., 0] >= 0).sum())
        layout = None if layout is None else layout.to(device)
        vocabulary = min(v.decoder.text.config.vocab_size for v in variants.values())
        ids = torch.randint(vocabulary, (1, tokens), device=device)
        caches: dict = {}

        def prefill(name, layout=layout, ids=ids, caches=caches):
            decoder = variants[name].decoder
            caches.pop(name, None)
            embeds = decoder.text.embed_tokens(ids)
            seconds, peak, (_, caches[name]) = clock(lambda: decoder.prefill(embeds, layout, chunk_size))
            return seconds, peak

        found = in_turns(variants, prefill, repeats)
        for name, measured in found.items():
            row: dict = {"model": name, "tokens": tokens, "vision_tokens": vision}
            if not measured:
                rows.append(row | {"error": variants[name].failure})
                report(f"{name:32s} {tokens:8d} tokens  {variants[name].failure}")
                continue
            row |= {"ttft_s": min(m[0] for m in measured), "peak_bytes": max(m[1] or 0 for m in measured) or None}
            row |= {"cache_bytes": cache_bytes(caches[name]), "decode": {}}
            rows.append(row)
            report(f"{name:32s} {tokens:8d} tokens  TTFT {row['ttft_s']:.4f} s")
        for batch in prefill_batches:
            if batch > 1:
                _prefill(variants, rows[-len(variants) :], ids, layout, batch, chunk_size, repeats, clock, report)
        for batch in batches:
            _decode(variants, rows[-len(variants) :], caches, batch, steps, max(repeats, 3), clock, report)
            for row in rows[-len(variants) :] if graphs else ():
                if "decode" in row and variants[row["model"]].patch is None:
                    _decode_compiled(variants[row["model"]], row, caches, batch, steps, max(repeats, 3), clock, report)
        if largest and clock.cuda:
            for row in rows[-len(variants) :]:
                if "decode" in row and variants[row["model"]].patch is None:
                    row["largest_batch"] = _largest_batch(variants[row["model"]], caches[row["model"]])
                    if row["largest_batch"]:
                        one = {row["model"]: variants[row["model"]]}
                        _decode(one, [row], caches, row["largest_batch"], steps, 1, clock, report)
    return rows


def _prefill(variants, rows, ids, layout, batch: int, chunk_size, repeats: int, clock: Clock, report) -> None:
    """Adds the seconds until a batch of equal prompts has its first tokens."""

    def run(name):
        decoder = variants[name].decoder
        embeds = decoder.text.embed_tokens(ids.expand(batch, -1))
        repeated = None if layout is None else layout.expand(batch, -1, -1)
        return clock(lambda: decoder.prefill(embeds, repeated, chunk_size)[0])[0]

    running = {row["model"]: variants[row["model"]] for row in rows if "ttft_s" in row}
    for name, measured in in_turns(running, run, repeats).items():
        row = next(row for row in rows if row["model"] == name)
        entry = {"ttft_s": min(measured)} if measured else {"error": running[name].failure}
        row.setdefault("prefill", {})[str(batch)] = entry
        running[name].failure = None  # a smaller batch fits
        shown = f"TTFT {entry['ttft_s']:.4f} s" if measured else entry["error"]
        report(f"{name:32s} {row['tokens']:8d} tokens  {shown}, batch {batch}")


def _decode_compiled(variant, row, caches, batch: int, steps: int, repeats: int, clock: Clock, report) -> None:
    """Adds to `row["decode_graphs"]` what [`_decode`] adds for the same steps, compiled and from a static cache."""
    decoder, name, entry = variant.decoder, row["model"], {}
    # without a GPU there are no graphs to capture; the path is walked all the same
    how = {"mode": "reduce-overhead"} if clock.cuda else {"backend": "aot_eager"}

    def run():
        torch._dynamo.reset()  # every batch is compiled anew, and dynamo counts
        step = torch.compile(decoder.step, fullgraph=True, dynamic=False, **how)
        cache = static_copy(caches[name], decoder.text.config, batch, row["tokens"] + (repeats + 1) * (steps + 4))
        ids = torch.zeros(batch, 1, dtype=torch.long, device=decoder.head.weight.device)

        def go(count, ids=ids):
            for _ in range(count):
                ids = step(ids, cache).clone()  # a graph writes its next answer to the same place

        go(4)  # compiles, warms up, captures
        return min(clock(lambda: go(steps))[0] for _ in range(repeats)) / steps

    try:
        seconds = variant.run(run)
        entry = {"step_s": seconds, "tokens_per_s": batch / seconds} if seconds else {"error": variant.failure}
    except Exception as error:  # whatever a compiler raises; the other figures are worth having
        entry = {"error": f"{type(error).__name__}: {first_line(error)}"}
    variant.failure = None
    row.setdefault("decode_graphs", {})[str(batch)] = entry
    shown = entry.get("error") or f"{entry['tokens_per_s']:.1f} tokens/s"
    report(f"{name:32s} {row['tokens']:8d} tokens  {shown}, batch {batch}, compiled")


def static_copy(cache, config, batch: int, length: int) -> StaticCache:
    """Copies a cache of one sequence, `batch` times, into a static cache with room for `length` tokens."""
    copied = StaticCache(config=config, max_cache_len=length)
    for layer, filled in zip(copied.layers, cache.layers, strict=True):
        if isinstance(layer, MMateCacheLayer):
            layer.copy(filled, batch)
        else:
            layer.update(*(t.expand(batch, *t.shape[1:]) for t in (filled.keys, filled.values)))
    return copied


def _decode(variants, rows, caches, batch: int, steps: int, repeats: int, clock: Clock, report) -> None:
    """Adds `{"step_s", "tokens_per_s"}` of a batch to the rows."""

    def run(name):
        decoder = variants[name].decoder
        cache = _copies(caches[name], batch)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=decoder.head.weight.device)
        decoder.step(ids, cache)

        def go(ids=ids):
            for _ in range(steps):
                ids = decoder.step(ids, cache)

        return clock(go)[0] / steps

    running = {row["model"]: variants[row["model"]] for row in rows if "decode" in row}
    for name, measured in in_turns(running, run, repeats).items():
        row = next(row for row in rows if row["model"] == name)
        if not measured:
            row["decode"][str(batch)] = {"error": running[name].failure}
            running[name].failure = None  # a smaller batch fits
            continue
        row["decode"][str(batch)] = {"step_s": min(measured), "tokens_per_s": batch / min(measured)}
        report(f"{name:32s} {row['tokens']:8d} tokens  {batch / min(measured):.1f} tokens/s, batch {batch}")


def _copies(cache, batch: int):
    """The cache of one sequence for a batch of the same; the given one stays as it is."""
    copied = copy.deepcopy(cache)
    if batch > 1:
        copied.batch_repeat_interleave(batch)
    return copied


def _largest_batch(variant: Variant, cache) -> int:
    def fits(batch):
        def step():
            ids = torch.zeros(batch, 1, dtype=torch.long, device=variant.decoder.head.weight.device)
            variant.decoder.step(ids, _copies(cache, batch))
            return True

        fitted = bool(variant.run(step))
        variant.failure = None
        torch.cuda.empty_cache()
        return fitted

    return largest_batch(fits)


def summarise(rows: list[dict]) -> dict:
    """
    Returns the growth exponents of every model, and at every length the ratios to the fastest teacher: models whose
    names begin with that word.
    """
    done = [row for row in rows if "ttft_s" in row]
    growth, ratios = {}, []
    for name in dict.fromkeys(row["model"] for row in done):
        mine = [row for row in done if row["model"] == name]
        lengths = [row["tokens"] for row in mine]
        growth[name] = {"ttft": growth_exponent(lengths, [row["ttft_s"] for row in mine])}
        alone = [row for row in mine if "step_s" in row["decode"].get("1", {})]
        growth[name]["decode"] = growth_exponent(
            [row["tokens"] for row in alone], [row["decode"]["1"]["step_s"] for row in alone]
        )
    for row in done:
        teachers = [other for other in done if is_teacher(other["model"]) and other["tokens"] == row["tokens"]]
        if is_teacher(row["model"]) or not teachers:
            continue
        own, others = throughput([row]), throughput(teachers)
        speedups = {batch: own[batch] / others[batch] for batch in own if batch in others}
        ratio = min(teacher["ttft_s"] for teacher in teachers) / row["ttft_s"]
        ratios.append({"model": row["model"], "tokens": row["tokens"], "ttft": ratio, "throughput": speedups})
    return {"growth_exponents": growth, "speedups": ratios}


def is_teacher(name: str) -> bool:
    return name.startswith("teacher")


def throughput(rows: list[dict]) -> dict[str, float]:
    """Returns the tokens per second of every batch, by whichever of the rows is fastest, compiled or not."""
    best: dict[str, float] = {}
    ways = [way for row in rows for way in (row["decode"], row.get("decode_graphs", {}))]
    for batch, entry in (item for way in ways for item in way.items()):
        best[batch] = max(entry.get("tokens_per_s", 0.0), best.get(batch, 0.0))
    return {batch: tokens for batch, tokens in best.items() if tokens}


def encode_seconds(encode: Callable[[], object], device: str) -> float:
    """Returns the seconds of a [`vision_encoder`]: from pixels to vision tokens."""
    clock = Clock(device)
    with torch.no_grad():
        return min(clock(encode)[0] for _ in range(2))
