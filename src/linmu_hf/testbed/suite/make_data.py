"""Write the suite's data set: `train` with several questions per row, and three test splits with one.

    python -m linmu_hf.testbed.suite.make_data --output DIR [--train 20000] [--test 200] [--seed 0]

`seen` has new scenes of what training rows are made of, `test` held-out sources, `beyond` held-out sources in larger
sizes. `--test` counts rows per task. `examples.png` shows a row of every task.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, disable_progress_bars
from PIL import Image, ImageDraw
from tqdm import tqdm

from ...commands.common import Parser, check_positive
from ...files import locked, whole_folder
from ..make_data import FEATURES as TESTBED_FEATURES
from ..make_data import _png
from .data import EVALUATION_SPLITS, evaluation_rows, training_rows
from .sources import load_font
from .tasks import TASKS


FEATURES = Features({**TESTBED_FEATURES, "id": Value("string")})
EXAMPLES = "examples.png"
ZOOM = 2
FRAMES_SHOWN = 8
PAPER, INK = (255, 255, 255), (20, 20, 20)


def make_data(
    output: str | Path,
    train: int,
    test: int,
    seed: int = 0,
    splits: tuple[str, ...] = EVALUATION_SPLITS,
    tasks: tuple[str, ...] = tuple(TASKS),
) -> DatasetDict:
    """Composes `train` training rows and `test` rows per task and test split; `output` appears whole or not at all."""
    with tempfile.TemporaryDirectory() as cache, locked(Path(output)), whole_folder(Path(output)) as folder:
        made = {
            name: Dataset.from_generator(
                _stored_rows,
                features=FEATURES,
                cache_dir=cache,
                gen_kwargs={"split": name, "n": train if name == "train" else test, "seed": seed, "tasks": tasks},
            )
            for name in ("train", *splits)
        }
        DatasetDict(made).save_to_disk(str(folder))
        draw_examples(seed).save(folder / EXAMPLES)
    return DatasetDict.load_from_disk(str(output))


def _stored_rows(split: str, n: int, seed: int, tasks: tuple[str, ...]) -> Iterator[dict]:
    if split == "train":
        rows, total = training_rows(seed, n), n
    else:
        rows, total = (row for task in tasks for row in evaluation_rows(task, n, split, seed)), n * len(tasks)
    for row in tqdm(rows, desc=split, total=total, mininterval=2):
        yield {
            **row,
            "images": [_png(image) for image in row["images"]],
            "videos": [_png_frames(video) for video in row["videos"]],
        }


def _png_frames(frames: list[Image.Image]) -> list[dict]:
    """Compresses frames; most of a video's are alike."""
    known: dict[bytes, dict] = {}
    stored = []
    for frame in frames:
        pixels = frame.tobytes()
        if pixels not in known:
            known[pixels] = _png(frame)
        stored.append(known[pixels])
    return stored


def draw_examples(seed: int = 0) -> Image.Image:
    """Draws one row of every task with its question and answer; of a video some of the frames that show something."""
    strips = []
    for task in TASKS:
        row = next(evaluation_rows(task, 1, "test", seed))
        pictures = row["images"] or _shown_frames(row["videos"][0])
        texts = [message["content"][-1]["text"] for message in row["messages"]]
        if len(texts) > 4:
            texts = [*texts[:2], "...", *texts[-2:]]
        strips.append((task, pictures, texts))
    font = load_font("DejaVu Sans", 13)
    heights = [max(ZOOM * pictures[0].height, 18 * len(texts) + 4) + 8 for _, pictures, texts in strips]
    sheet = Image.new("RGB", (900, sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(sheet), 4
    for (task, pictures, texts), height in zip(strips, heights):
        draw.text((6, top), task, font=font, fill=INK)
        left = 90
        for picture in pictures:
            large = picture.resize((ZOOM * picture.width, ZOOM * picture.height), Image.Resampling.NEAREST)
            sheet.paste(large, (left, top))
            left += large.width + 4
        for line, text in enumerate(texts):
            draw.text((max(left + 8, 360), top + 18 * line), text, font=font, fill=INK)
        top += height
    return sheet


def _shown_frames(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames that differ from the one before them, from the beginning: enough to see what the video is."""
    changed = [
        frame for last, frame in zip([None, *frames], frames) if last is None or frame.tobytes() != last.tobytes()
    ]
    return changed[: FRAMES_SHOWN // 2]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for `load_from_disk`")
    parser.add_argument("--train", type=int, default=20000, help="training rows, of several questions each")
    parser.add_argument("--test", type=int, default=200, help="rows per task and test split, of one question each")
    parser.add_argument("--splits", nargs="+", choices=EVALUATION_SPLITS, default=list(EVALUATION_SPLITS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="of the test splits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    disable_progress_bars()  # ours know the number of rows
    started = time.time()
    try:
        check_positive(args, "train", "test")
        dataset = make_data(args.output, args.train, args.test, args.seed, tuple(args.splits), tuple(args.tasks))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    seconds = time.time() - started
    rows = ", ".join(f"{name} {len(split)}" for name, split in dataset.items())
    print(f"wrote {args.output} ({rows} rows) in {seconds:.0f} s; {EXAMPLES} shows a row of every task")


if __name__ == "__main__":
    main()
