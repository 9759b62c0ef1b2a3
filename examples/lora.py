"""Fine-tune a LinMU model on rows of your own with LoRA, by PEFT and the plain Trainer.

    python examples/lora.py MODEL DATASET OUTPUT

LoRA goes on the decoder's FFNs and on the projections of the M-MATE blocks, and is merged before saving.
"""

import sys

from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from linmu_hf import lora_targets
from linmu_hf.data import encode_rows


def main(model: str, dataset: str, output: str, steps: int = 20) -> None:
    processor = AutoProcessor.from_pretrained(model)
    student = AutoModelForImageTextToText.from_pretrained(model, dtype="float32")
    student = get_peft_model(student, LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets()))
    student.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        learning_rate=5e-4,
        per_device_train_batch_size=4,
        remove_unused_columns=False,  # the collator needs the images
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    rows = load_from_disk(dataset)["train"]
    Trainer(student, arguments, train_dataset=rows, data_collator=lambda batch: encode_rows(processor, batch)).train()
    student.merge_and_unload().save_pretrained(output)
    processor.save_pretrained(output)
    print(f"{output} is an ordinary model folder, LoRA merged")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
