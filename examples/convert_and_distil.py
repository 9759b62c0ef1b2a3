"""From a Qwen2.5-VL to a distilled LinMU in Python: what `linmu-convert` and `linmu-distill` do.

    python examples/convert_and_distil.py TEACHER DATASET OUTPUT

DATASET is a folder written by `datasets.DatasetDict.save_to_disk`; `linmu_hf/data/rows.py` says what its rows hold.
`python -m linmu_hf.testbed.make_data --output DATASET` makes one for the testbed's teacher.
"""

import sys

from datasets import load_from_disk
from transformers import AutoModelForImageTextToText, AutoProcessor

from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.distillation import DistillConfig, distill


def main(teacher: str, dataset: str, output: str, steps: int = 10) -> None:
    print(convert(teacher, f"{output}/init", overwrite=True))

    config = DistillConfig(
        output_dir=f"{output}/student",
        recipe="quick",  # the default is the paper's; `linmu-distill --print_stages` shows them, `stages` takes a file
        stage_overrides=[
            f"all.max_steps={steps}",
            f"stage-1.max_steps={3 * steps}",  # every block on the teacher's own layer input: cheap, and most
            "stage-3.max_steps=0",  # of the way; 0 leaves a stage out
        ],
        per_device_train_batch_size=8,
    )
    distill(
        config,
        student=AutoModelForImageTextToText.from_pretrained(f"{output}/init", dtype="float32"),
        teacher=load_teacher(teacher, dtype="float32"),
        dataset=load_from_disk(dataset)["train"],
        processor=AutoProcessor.from_pretrained(f"{output}/init"),
    )
    print(f"{output}/student is an ordinary model folder now")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
