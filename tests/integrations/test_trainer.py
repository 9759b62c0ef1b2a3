"""`transformers.Trainer` and TRL's `SFTTrainer` on a small model with images and videos."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, lora_targets
from linmu_hf.data import encode_rows
from linmu_hf.testbed.data import evaluation_rows
from linmu_hf.testbed.make_data import FEATURES
from linmu_hf.testbed.processor import build_processor
from linmu_hf.testbed.qwen2_5_vl import teacher_config


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def rows():
    """Images and clips by turns."""
    cells, clips = (list(evaluation_rows(task, 4)) for task in ("cell", "when"))
    return [row for pair in zip(cells, clips) for row in pair]


def small_model(processor):
    torch.manual_seed(0)
    options = {"state_size": 32, "image_window_size": [1, 2, 2], "window_size": [2, 2, 2]}
    model = LinMUForConditionalGeneration(LinMUConfig.from_teacher(teacher_config(processor.tokenizer), **options))
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    return model


def adapted_model(processor):
    model = small_model(processor)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=lora_targets()))


def trainer(model, processor, rows, folder, **options):
    arguments = {"max_steps": 6, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "logging_steps": 1}
    arguments |= {"save_steps": 3, "remove_unused_columns": False, "use_cpu": True, "report_to": "none"}
    arguments |= {"disable_tqdm": True, "output_dir": str(folder), **options}
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=lambda batch: encode_rows(processor, batch),
        processing_class=processor,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [small_model, adapted_model], ids=["all parameters", "LoRA"])
def test_loss_falls_and_a_resumed_run_ends_the_same(make, processor, rows, tmp_path):
    rate = 2e-3 if make is small_model else 1e-2
    whole = trainer(make(processor), processor, rows, tmp_path, learning_rate=rate)
    whole.train()
    assert len(losses(whole)) == 6 and losses(whole)[-1] < 0.8 * losses(whole)[0]
    resumed = trainer(make(processor), processor, rows, tmp_path, learning_rate=rate)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(whole))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_checkpoint_is_an_ordinary_model_folder(processor, rows, tmp_path):
    run = trainer(small_model(processor), processor, rows, tmp_path, max_steps=1, save_steps=1)
    run.train()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-1")
    batch = encode_rows(processor, rows)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, run.model.eval()(**batch).loss)


def test_a_lora_checkpoint_is_an_ordinary_adapter_folder(processor, rows, tmp_path):
    run = trainer(adapted_model(processor), processor, rows, tmp_path, max_steps=2, save_steps=2, learning_rate=1e-2)
    run.train()
    assert not list((tmp_path / "checkpoint-2").glob("model*.safetensors"))
    loaded = PeftModel.from_pretrained(small_model(processor), tmp_path / "checkpoint-2").eval()
    batch = encode_rows(processor, rows)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, run.model.eval()(**batch).loss)
        assert (loaded(**batch).loss - small_model(processor).eval()(**batch).loss).abs() > 1e-3


def test_accumulation_and_checkpointing_and_bfloat16(processor, rows, tmp_path):
    """Options that users combine; half a batch twice is the whole batch, as the answers are of one length."""
    plain = trainer(small_model(processor), processor, rows, tmp_path / "plain", max_steps=3)
    plain.train()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    other = trainer(small_model(processor), processor, rows, tmp_path / "other", max_steps=3, bf16=True, **options)
    other.train()
    assert other.model.is_activation_checkpointing
    assert losses(other) == pytest.approx(losses(plain), rel=0.02)


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 2), (1, 4)])
def test_accumulated_batches_weigh_tokens(size, micro_batches, processor, rows, tmp_path):
    """Answers of 2 to 40 tokens: accumulated, they move the weights as one batch of them does."""
    unequal = []
    for row, words in zip(rows[:4], (1, 20, 2, 12)):
        turns = [*row["messages"][:1], {"role": "assistant", "content": [{"type": "text", "text": "7 " * words}]}]
        unequal.append({"messages": turns, "images": row["images"], "videos": row["videos"]})
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "save_strategy": "no"}
    start = dict(small_model(processor).named_parameters())
    moved = []
    for batch, accumulated in ((4, 1), (size, micro_batches)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        run = trainer(small_model(processor), processor, unequal, tmp_path, **options, **sizes)
        run.train()
        moved.append(torch.cat([(p - start[name]).flatten() for name, p in run.model.named_parameters()]).detach())
    assert (moved[1] - moved[0]).norm() < 1e-3 * moved[0].norm()


def sft_trainer(processor, data, folder, adapters=False, **options):
    arguments = SFTConfig(
        str(folder), max_steps=4, learning_rate=1e-2 if adapters else 2e-3, per_device_train_batch_size=4,
        logging_steps=1, max_length=None, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    config = LoraConfig(r=8, lora_alpha=32, target_modules=lora_targets()) if adapters else None
    return SFTTrainer(
        small_model(processor),
        arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=config,
        **options,
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["all parameters", "LoRA"])
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_sft_trainer(form, adapters, processor, rows, tmp_path):
    """TRL's trainer with its own collator, which takes images and no videos."""
    images = [row for row in rows if row["images"]]
    if form == "messages":
        data = [{"messages": row["messages"], "images": row["images"]} for row in images]
    else:
        data = [
            {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
            for row in images
        ]
    run = sft_trainer(processor, Dataset.from_list(data), tmp_path, adapters)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]


def test_sft_trainer_with_videos(processor, rows, tmp_path):
    """With our collator TRL's trainer takes videos too, and the loss is that of the plain Trainer."""
    data = Dataset.from_list(rows, features=FEATURES)
    run = sft_trainer(processor, data, tmp_path, data_collator=lambda batch: encode_rows(processor, batch))
    run.train()
    plain = trainer(small_model(processor), processor, rows, tmp_path, max_steps=4, save_strategy="no")
    plain.train()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-3)
