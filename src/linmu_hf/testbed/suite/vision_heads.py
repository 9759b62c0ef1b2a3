"""What each vision token shows, and the heads that teach the tower to see it; they are thrown away."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents import FIELDS
from .drawing import Item, Scene
from .encoding import token_grid
from .processor import MERGE_SIZE, TOKEN
from .sources import COLOURS, ICON_NAMES


CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz:"
EARLY_BLOCK = 2  # of the tower, whose output shows what is where; the last one says what begins here
SLOTS = 4  # places for a character along one vision token
LONGEST = 6  # characters of a word
COUNTING_LAYER = 1  # of the decoder, after which a token knows how often its icon was shown before
NOTHING_WEIGHT = 0.15  # most places show nothing


@dataclass(frozen=True)
class Head:
    """A kind of thing that tokens show; class 0 of every place is nothing."""

    labels: tuple[str, ...]
    places: int = 1
    early: bool = False  # wherever the thing is, read from an early block; else where it begins, from the last
    weight: float = 1.0  # in the loss

    @property
    def classes(self) -> int:
        return len(self.labels) + 1


BARS = tuple(str(value) for value in range(1, 10))
HEADS = {
    "letter": Head(tuple(CHARACTERS), SLOTS, early=True),
    "icon": Head(ICON_NAMES, early=True),
    "colour": Head(tuple(COLOURS), early=True, weight=0.3),
    "bar": Head(BARS, early=True, weight=0.5),
    "word": Head(tuple(CHARACTERS), LONGEST),
    "field": Head(FIELDS),
    "this icon": Head(ICON_NAMES),
    "this colour": Head(tuple(COLOURS), weight=0.3),
    "this bar": Head(BARS, weight=0.5),
}


def token_targets(scene: Scene) -> dict[str, np.ndarray]:
    """Returns the class of every place of every token for each head, `[images or moments, rows, columns, places]`."""
    grid = token_grid(scene)
    targets = {name: np.zeros((*grid, head.places), np.int64) for name, head in HEADS.items()}
    for item in scene.items:
        for name, value in _classes(item).items():
            head = HEADS[name]
            where = _everywhere(item, grid) if head.early else _begin(item, grid)
            targets[name][item.picture][where] = value
    return targets


def _classes(item: Item) -> dict[str, int | np.ndarray]:
    """The classes of a thing for the heads that know its kind."""
    if item.kind == "word":
        spelled = [CHARACTERS.index(character) + 1 for character in item.label]
        return {"word": np.array(spelled + [0] * (LONGEST - len(spelled)))}
    names = [item.kind] if item.kind in ("letter", "field") else [item.kind, f"this {item.kind}"]
    found: dict[str, int | np.ndarray] = {name: HEADS[name].labels.index(item.label) + 1 for name in names}
    if item.colour is not None:
        found |= dict.fromkeys(("colour", "this colour"), HEADS["colour"].labels.index(str(item.colour)) + 1)
    return found


def _begin(item: Item, grid: tuple[int, int, int]) -> tuple:
    """The token that a text begins in, half way down, or that the corner of anything else is in."""
    left, top, _, bottom = item.box
    y = (top + bottom) / 2 if item.kind in ("word", "field") else top
    return min(max(0, int(y // TOKEN)), grid[1] - 1), min(max(0, int(left // TOKEN)), grid[2] - 1)


def _everywhere(item: Item, grid: tuple[int, int, int]) -> tuple:
    """The slot that the middle of a letter is in, or the tokens whose middle is covered."""
    _, rows, columns = grid
    left, top, right, bottom = item.box
    if item.kind == "letter":
        row, slot = int((top + bottom) / 2 // TOKEN), int((left + right) / 2 // (TOKEN // SLOTS))
        inside = 0 <= row < rows and 0 <= slot < columns * SLOTS
        return (row, slot // SLOTS, slot % SLOTS) if inside else ([],) * 3
    across, down = (np.arange(count) * TOKEN + TOKEN / 2 for count in (columns, rows))
    return np.ix_((down >= top) & (down < bottom), (across >= left) & (across < right))


def repeat_targets(scenes: Sequence[Scene]) -> Tensor:
    """Returns for every token `[tokens]` how often the icon that begins in it was shown until then; 0 if none does."""
    found = []
    for scene in scenes:
        grid = token_grid(scene)
        shown: dict[str, int] = {}
        times = np.zeros(grid, np.int64)
        for item in sorted((item for item in scene.items if item.kind == "icon"), key=lambda item: item.picture):
            shown[item.label] = shown.get(item.label, 0) + 1
            times[item.picture][_begin(item, grid)] = shown[item.label]
        found.append(times.ravel())
    return torch.from_numpy(np.concatenate(found))


def flat_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Returns the heads' targets `[tokens, places]` of a batch."""
    each = [token_targets(scene) for scene in scenes]
    return {
        name: torch.from_numpy(np.concatenate([one[name].reshape(-1, head.places) for one in each]))
        for name, head in HEADS.items()
    }


@dataclass
class Seen:
    """What the tower gave, `[tokens, 4 x hidden]` early and `[tokens, channels]` at its end, and the decoder after."""

    early: Tensor | None = None
    tokens: Tensor | None = None
    decoded: Tensor | None = None  # [b, t, d]


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Notes what a model gives meanwhile. The tower's windows are one token wide, so that tokens keep their order."""
    visual, seen = model.model.visual, Seen()

    def note_early(module, args, output):
        patches = output if isinstance(output, Tensor) else output[0]
        seen.early = patches.reshape(-1, MERGE_SIZE**2 * patches.shape[-1])

    def note_tokens(module, args, output):
        seen.tokens = output.pooler_output

    def note_decoded(module, args, output):
        seen.decoded = output if isinstance(output, Tensor) else output[0]

    hooks = [
        visual.blocks[EARLY_BLOCK].register_forward_hook(note_early),
        visual.register_forward_hook(note_tokens),
        model.model.language_model.layers[COUNTING_LAYER].register_forward_hook(note_decoded),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class VisionHeads(nn.ModuleDict):
    """A linear map for each of `HEADS`, for a tower whose blocks are `hidden` wide and whose output is `channels`."""

    def __init__(self, hidden: int, channels: int):
        super().__init__(
            {
                name: nn.Linear(MERGE_SIZE**2 * hidden if head.early else channels, head.places * head.classes)
                for name, head in HEADS.items()
            }
        )

    def loss(self, seen: Seen, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Returns the weighted cross entropy, and how often each head is right about tokens that show something."""
        assert seen.tokens is not None and seen.early is not None
        loss, right = seen.tokens.new_zeros(()), {}
        for name, head in HEADS.items():
            something = (targets[name] > 0).any(-1)
            if not something.any():
                continue
            logits = self[name](seen.early if head.early else seen.tokens).unflatten(-1, (head.places, head.classes))
            weight = torch.where(something, 1.0, NOTHING_WEIGHT)
            losses = F.cross_entropy(logits.flatten(0, 1), targets[name].flatten(), reduction="none")
            losses = losses.reshape(-1, head.places).mean(-1)
            loss = loss + head.weight * (losses * weight).sum() / weight.sum()
            right[name] = (logits.argmax(-1) == targets[name]).all(-1)[something].float().mean().item()
        return loss, right
