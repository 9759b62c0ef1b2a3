"""
What a delta rule would remember of the far text: a figure that says whether kernels for it are worth building.

    python -m benchmarks.real.far_memory --base runs/real [--layers 5 15 25] [--steps 100] [--seeds 0 1]

Takes the teacher that `make real` builds, and what its attention gathers from tokens that have left a window: with
weights w over them, M = sum(w) and f = sum(w v) / M. A memory of constant size reads those tokens as they leave, and
is trained on the teacher's own q, k and v to give M f, for every layer and head on its own. The error is
|M f - found|^2 / |M f|^2 on held-out text: 1 where nothing is remembered.

    scan        ours: features softmax(z, -z) of rotated k and q, decays that depend on the token, divided by their sum
    delta rule  S = a S (1 - b k k^T) + b v k^T, with k and q of length 1 (Gated DeltaNet, Yang et al. 2025)

Both have a state of so many features times the head's channels, one for each head, and a learned share M.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.files import write_text
from linmu_hf.modeling.mixers.flex_ma import initial_feature_weight, softmax_features
from linmu_hf.modeling.mixers.projection import rotate
from linmu_hf.ops.segments import Segments
from linmu_hf.ops.ssd.scan import ssd

from .text import TextRows


WINDOW, SINKS, LENGTH, CHUNK = 128, 4, 1024, 64
TRAIN_ROWS, HELD_OUT_ROWS, BATCH = 48, 8, 2


class FarText:
    """
    One layer's q [rows, t, h, p], k and v [rows, t, g, p] and input x [rows, t, d], each where a memory takes it: k, v
    and x of the token that leaves the window, q of the token that reads, and `target`, M f [rows, t, h, p].
    """

    def __init__(self, mixer: nn.Module, inputs: Tensor, rope: tuple[Tensor, Tensor]):
        parts = {name: [] for name in ("q", "k", "v", "x", "reader", "target")}
        for x in inputs:
            q, k, v = (
                proj(x).unflatten(-1, (-1, mixer.head_dim)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
            )
            q, k = rotate(q, rope), rotate(k, rope)
            left = slice(SINKS, LENGTH - WINDOW)
            read = slice(SINKS + WINDOW, LENGTH)
            values = {"q": q[read], "k": k[left], "v": v[left], "x": x[left], "reader": x[read]}
            for name, value in values.items():
                parts[name].append(value)
            parts["target"].append(far_attention(q, k, v)[read])
        self.parts = {name: torch.stack(rows) for name, rows in parts.items()}

    def rows(self, chosen) -> dict[str, Tensor]:
        return {name: value[chosen] for name, value in self.parts.items()}


def far_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the sum of w v [t, h, p] over tokens that are not sinks and at least `WINDOW` tokens back."""
    t, h, p = q.shape
    k, v = (one.repeat_interleave(h // one.shape[1], dim=1) for one in (k, v))
    distance = torch.arange(t)[:, None] - torch.arange(t)
    scores = torch.einsum("thp,shp->hts", q, k) * p**-0.5
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    far = (distance >= WINDOW) & (torch.arange(t) >= SINKS)
    return torch.einsum("hts,shp->thp", weights * far, v)


class Memory(nn.Module):
    """A memory of `features` times p numbers for each of h heads; g heads of k and v."""

    def __init__(self, d: int, h: int, g: int, p: int, features: int):
        super().__init__()
        self.h, self.g = h, g
        half = initial_feature_weight(p, features // 2)
        self.q_features, self.k_features = (nn.Parameter(half.expand(h, *half.shape).clone()) for _ in range(2))
        self.decay, self.share = nn.Linear(d, h), nn.Linear(d, h)
        half_life = 32 * 32 ** torch.linspace(0, 1, h)
        with torch.no_grad():
            for linear in (self.decay, self.share):
                linear.weight.zero_()
            self.decay.bias.copy_(torch.log(torch.expm1(math.log(2) / half_life)))
            self.share.bias.fill_(-2.0)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        k = k.repeat_interleave(self.h // self.g, dim=1)
        return softmax_features(q, self.q_features), softmax_features(k, self.k_features)

    def forward(self, q, k, v, x, reader, target=None) -> Tensor:
        """Returns the estimate of M f, [rows, t, h, p]."""
        rows, t = q.shape[:2]
        queries, keys = self.features(q.flatten(0, 1), k.flatten(0, 1))
        values = v.repeat_interleave(self.h // self.g, dim=2)
        steps = F.softplus(self.decay(x))
        read = self.recall(queries.unflatten(0, (rows, t)), keys.unflatten(0, (rows, t)), values, steps, x)
        return self.share(reader).sigmoid()[..., None] * read


class Scan(Memory):
    def recall(self, q, k, v, steps, x) -> Tensor:
        rows, t = q.shape[:2]
        q, k, v, steps = (one.flatten(0, 1) for one in (q, k, v, steps))
        segments = Segments.build((t,) * rows)
        found, _ = ssd(v, steps, -torch.ones(self.h), k, q, segments, normalized=True, backend="chunked")
        return found.unflatten(0, (rows, t))


class DeltaRule(Memory):
    def __init__(self, d: int, h: int, g: int, p: int, features: int):
        super().__init__(d, h, g, p, features)
        self.beta, self.gain = nn.Linear(d, h), nn.Parameter(torch.ones(h))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Centred and of length 1: features that are all positive keep any two keys at less than a right angle."""
        return tuple(F.normalize(one - one.mean(-1, keepdim=True), dim=-1) for one in super().features(q, k))

    def recall(self, q, k, v, steps, x) -> Tensor:
        heads = (one.transpose(1, 2) for one in (q, k, v))
        found = delta_rule(*heads, -steps.transpose(1, 2), self.beta(x).sigmoid().transpose(1, 2))
        return found.transpose(1, 2) * self.gain[:, None]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """
    The gated delta rule in pieces of `CHUNK` tokens: S_t = a_t S_{t-1} (1 - b_t k_t k_t^T) + b_t v_t k_t^T, read as
    o_t = S_t q_t.

    What token i writes, u_i = b_i (v_i - a S k_i), depends on those before it: a triangular system in each piece.

    Args:
        q, k (`Tensor` of shape `[..., t, n]`), v (`Tensor` of shape `[..., t, p]`): Of each head; k of length 1.
        decay (`Tensor` of shape `[..., t]`): log a. beta (`Tensor` of shape `[..., t]`): b.
    """
    state = q.new_zeros(*q.shape[:-2], k.shape[-1], v.shape[-1])
    outputs = []
    pieces = (one.split(CHUNK, dim=dim) for one, dim in ((q, -2), (k, -2), (v, -2), (decay, -1), (beta, -1)))
    for q, k, v, decay, beta in zip(*pieces):
        total = decay.cumsum(-1)
        between = total[..., :, None] - total[..., None, :]
        weight = between.masked_fill(between.new_ones(between.shape[-2:]).triu(1).bool(), -torch.inf).exp()
        overlap = (beta[..., None] * weight * (k @ k.mT)).tril(-1)
        kept = total.exp()[..., None]
        wanted = beta[..., None] * (v - kept * (k @ state))
        eye = torch.eye(overlap.shape[-1])
        written = torch.linalg.solve_triangular(eye + overlap, wanted, upper=False, unitriangular=True)
        outputs.append(kept * (q @ state) + (weight * (q @ k.mT)) @ written)
        rest = (total[..., -1:] - total).exp()[..., None]
        state = kept[..., -1:, :] * state + (rest * k).mT @ written
    return torch.cat(outputs, dim=-2)


MEMORIES = {"scan": Scan, "delta rule": DeltaRule}


def error(found: Tensor, target: Tensor) -> Tensor:
    return (found - target).square().sum() / target.square().sum()


def fit(memory: Memory, train: FarText, held_out: FarText, steps: int, rate: float, seed: int) -> float:
    """Trains a memory and returns its error on held-out rows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(memory.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = train.rows(torch.randperm(TRAIN_ROWS, generator=generator)[:BATCH])
        loss = error(memory(**rows), rows["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rows = held_out.rows(slice(None))
        return float(error(memory(**rows), rows["target"]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, default=Path("runs/real"), help="folder of `make real`: teacher and text")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--features", type=int, nargs="+", default=[64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2], help="of several the best one counts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("runs/far_memory.json"))
    arguments = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    teacher = load_teacher(arguments.base / "teacher")
    tokenizer = load_processor(arguments.base / "teacher").tokenizer
    text = {split: TextRows(arguments.base / "text", split, tokenizer, LENGTH) for split in ("train", "held_out")}
    results: list[dict] = []
    decoder = teacher.model.language_model
    for layer in tqdm(arguments.layers, desc="layers"):
        mixer = decoder.layers[layer].mixer
        seen = {}
        for split, count in (("train", TRAIN_ROWS), ("held_out", HELD_OUT_ROWS)):
            inputs = []
            for row in range(count):
                with torch.no_grad():
                    known = teacher.model(input_ids=text[split][row][None], use_cache=False, output_mixer_states=True)
                inputs.append(known.mixer_inputs[layer][0])
            cos, sin = decoder.rope(inputs[0][None], torch.arange(LENGTH)[None])
            with torch.no_grad():
                seen[split] = FarText(mixer, torch.stack(inputs), (cos[0], sin[0]))
        text = teacher.config.text_config
        h, g, p = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        for name, kind in MEMORIES.items():
            for features in arguments.features:
                for seed in arguments.seeds:
                    found = []
                    for rate in arguments.rates:
                        memory = kind(inputs[0].shape[-1], h, g, p, features)
                        found.append(fit(memory, seen["train"], seen["held_out"], arguments.steps, rate, seed))
                    results.append(
                        {"layer": layer, "memory": name, "features": features, "seed": seed, "error": min(found)}
                    )
                    print(results[-1], flush=True)
                    write_text(arguments.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
