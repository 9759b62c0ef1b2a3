"""
How near a closed-form calibration brings the testbed's student to its teacher.

    python benchmarks/calibration.py [--samples 2] [--rows 64] [--steps 0] [--json FILE]

Each sample of rows is calibrated on by itself, from the same conversion. Measured on 32 rows of none of them: the
relative error of the last hidden states, and of the answer tokens KL(teacher || student) and how often both prefer the
same one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.calibrate import calibrate
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.data import encode_rows
from linmu_hf.testbed.ablations.plans import WINDOWS
from linmu_hf.testbed.check_teacher import TEACHERS
from linmu_hf.testbed.make_data import make_data


BATCH = 8
HELD_OUT = 32


@torch.no_grad()
def compare(student, teacher, batches) -> dict[str, float]:
    """Returns `hidden`, `kl` and `agreement` of a student on batches with labels."""
    wrong = size = divergence = same = count = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        real, answers = inputs["attention_mask"].bool(), batch["labels"].roll(-1, 1) >= 0  # the last token has no next
        answers[:, -1] = False
        ours, theirs = (model.model(**inputs, use_cache=False).last_hidden_state for model in (student, teacher))
        wrong += float((ours - theirs)[real].double().square().sum())
        size += float(theirs[real].double().square().sum())
        p, q = (
            model.lm_head(hidden[answers]).float().log_softmax(-1)
            for model, hidden in ((teacher, theirs), (student, ours))
        )
        divergence += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += int(answers.sum())
    return {"hidden": wrong / size, "kl": divergence / count, "agreement": same / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="of a sample; the last batch of 8 is held out")
    parser.add_argument("--steps", type=int, default=0, help="`scan_steps` of the calibration")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.samples < 1 or args.rows < 2 * BATCH or args.rows % BATCH:
        parser.error(f"--rows {args.rows} must be a multiple of {BATCH} from {2 * BATCH}, --samples at least 1")
    disable_progress_bars()
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        total = args.samples * args.rows + HELD_OUT
        data = make_data(Path(folder) / "data", total, 1, seed=5)["train"]
        convert(str(TEACHERS["qwen"]), f"{folder}/student", mixer_options=WINDOWS)
        teacher, processor = load_teacher(TEACHERS["qwen"]), load_processor(TEACHERS["qwen"])
        batches = [
            encode_rows(processor, data.select(range(i, min(i + BATCH, total)))) for i in range(0, total, BATCH)
        ]
        each, held_out = args.rows // BATCH, batches[-HELD_OUT // BATCH :]
        for sample in (None, *range(args.samples)):
            student = LinMUForConditionalGeneration.from_pretrained(f"{folder}/student").eval()
            start = time.process_time()
            if sample is not None:
                some = batches[sample * each : (sample + 1) * each]
                print(calibrate(student, teacher, some, scan_steps=args.steps))
            seconds = time.process_time() - start
            found.append({"sample": sample, "seconds": seconds, **compare(student, teacher, held_out)})
    for figures in found:
        name = "converted" if figures["sample"] is None else f"sample {figures['sample']}"
        print(
            f"{name:10} last hidden {figures['hidden']:.4f}  KL {figures['kl']:.4f}  same first choice "
            f"{figures['agreement']:.1%}  {figures['seconds']:.0f} s of CPU"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
