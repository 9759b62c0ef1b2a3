"""Write the testbed's data set: `train` with eight questions per row, `test` with one on held-out digits.

python -m linmu_hf.testbed.make_data --output DIR [--train 20000] [--test 200] [--sizes teacher|test|wide] [--seed 0]
"""

import io
import tempfile
import time
from pathlib import Path
from typing import get_args

from datasets import Dataset, DatasetDict, Features, Image, List, Value, disable_progress_bars
from PIL import Image as PILImage
from tqdm import tqdm

from ..commands.common import Parser
from .data import TASKS, Sizes, evaluation_rows, training_rows


PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "images": List(Image()),
        "videos": List(List(Image())),
        "task": Value("string"),
    }
)
EXAMPLE_ZOOM = 6


def make_data(output: str | Path, train: int, test: int, sizes: Sizes = "teacher", seed: int = 0) -> DatasetDict:
    """Composes `train` training rows and `test` rows per task, and saves both splits to `output`.

    `sizes` is that of [`training_scenes`]; `"test"` is for models that resize every image to one canvas, to which each
    size is a task of its own.
    """
    with tempfile.TemporaryDirectory() as cache:
        splits = {
            name: Dataset.from_generator(
                _stored_rows,
                features=FEATURES,
                cache_dir=cache,
                gen_kwargs={"split": name, "train": train, "test": test, "sizes": sizes, "seed": seed},
            )
            for name in ("train", "test")
        }
        dataset = DatasetDict(splits)
        dataset.save_to_disk(str(output))
    return DatasetDict.load_from_disk(str(output))


def write_examples(output: str | Path, seed: int = 0) -> None:
    """Saves one enlarged picture per task, a clip as one frame per moment; the file name has question and answer."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        row = next(evaluation_rows(task, 1, seed))
        frames = row["images"] or row["videos"][0][::2]
        width, height = (side * EXAMPLE_ZOOM for side in frames[0].size)
        strip = PILImage.new("RGB", ((width + EXAMPLE_ZOOM) * len(frames) - EXAMPLE_ZOOM, height), (90, 90, 90))
        for i, frame in enumerate(frames):
            strip.paste(frame.resize((width, height), PILImage.Resampling.NEAREST), (i * (width + EXAMPLE_ZOOM), 0))
        question, answer = (message["content"][-1]["text"] for message in row["messages"])
        strip.save(output / f"{task}: {question} {answer}.png".replace(" ", "_").replace("?", "").replace(":", ""))


def _stored_rows(split: str, train: int, test: int, sizes: Sizes, seed: int):
    if split == "train":
        rows, total = training_rows(seed, train, sizes), train
    else:
        rows, total = (row for task in TASKS for row in evaluation_rows(task, test, seed)), test * len(TASKS)
    for row in tqdm(rows, desc=split, total=total):
        yield {
            **row,
            "images": [_png(image) for image in row["images"]],
            "videos": [[_png(frame) for frame in video] for video in row["videos"]],
        }


def _png(image: PILImage.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for `load_from_disk`; examples/ shows rows, enlarged")
    parser.add_argument("--train", type=int, default=20000, help="training rows, eight questions each")
    parser.add_argument("--test", type=int, default=200, help="test rows per task, one question each")
    parser.add_argument(
        "--sizes",
        choices=get_args(Sizes),
        default="teacher",
        help="of training scenes: as the teacher learned them, the test's alone, or smaller and larger ones too",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.train < 1 or args.test < 1:
        parser.error(f"--train {args.train} and --test {args.test} must be at least 1")
    disable_progress_bars()  # ours know the number of rows
    started = time.time()
    dataset = make_data(args.output, args.train, args.test, args.sizes, args.seed)
    write_examples(Path(args.output) / "examples", args.seed)
    rows = ", ".join(f"{name} {len(split)}" for name, split in dataset.items())
    print(f"wrote {args.output} ({rows} rows) in {time.time() - started:.0f} s; examples/ shows them, enlarged")


if __name__ == "__main__":
    main()
