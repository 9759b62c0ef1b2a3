"""NVILA from processor to answer: forward, generate, pipeline, linmu-chat, and folders loaded as remote code."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nvila_processors import clip, picture, tiny
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import linmu_hf
from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, LinMUTextConfig, NVILAVisionConfig
from linmu_hf.commands import chat
from linmu_hf.data import encode_rows
from linmu_hf.distillation.rows.collator import DistillCollator, EncodedDataset
from linmu_hf.evaluation.retention import generate_answers
from linmu_hf.hub.check import check_folder
from linmu_hf.hub.push import files_to_upload


TILINGS = ["dynamic_s2", "dynamic", "resize"]


def make_model(processor, tiling, **vision) -> LinMUForConditionalGeneration:
    """Random weights; the placeholders are outside the vocabulary, as in the released checkpoints."""
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision_config = NVILAVisionConfig(
        tower_config={"image_size": 16, "patch_size": 2 if tiling == "dynamic" else 4, **tower},
        image_aspect_ratio=tiling,
        s2_scales=image_processor.s2_scales,
        projector_type=f"mlp_downsample_{'3x3' if tiling == 'dynamic' else '2x2'}_fix",
        out_hidden_size=32,
        **vision,
    )
    text = LinMUTextConfig(
        vocab_size=len(tokenizer) - 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["m_mate", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        state_size=24,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LinMUConfig(
        text_config=text,
        vision_config=vision_config,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=None,
        vision_end_token_id=None,
    )
    torch.manual_seed(0)
    return LinMUForConditionalGeneration(config).eval()


def save(folder, tiling):
    processor = tiny(tiling)
    make_model(processor, tiling).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TILINGS)
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("nvila") / "linmu-nvila", request.param)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def ask(*media, text="what is it?"):
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


IMAGE = {"type": "image", "image": picture(64, 16)}
VIDEO = {"type": "video", "video": clip(20)}
CONVERSATIONS = [ask(IMAGE), ask(IMAGE, IMAGE), ask(VIDEO), ask(IMAGE, VIDEO), ask()]


ROWS = [
    {"messages": [*ask({"type": "image"}), {"role": "assistant", "content": "7"}], "images": [picture(64, 16)]},
    {"messages": [*ask(), {"role": "assistant", "content": "7"}]},
    {"messages": [*ask({"type": "video"}), {"role": "assistant", "content": "up"}], "videos": [[picture(9, 9)] * 8]},
]


def test_a_batch_is_its_rows(model, processor):
    """Values of every row alone, left padded and right padded; greedy answers too."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    alone = [processor.apply_chat_template(conversation, **options) for conversation in CONVERSATIONS]
    with torch.no_grad():
        logits = [model(**inputs).logits[0] for inputs in alone]
    for side in ("left", "right"):
        kwargs = {"padding": True, "padding_side": side}
        batch = processor.apply_chat_template(CONVERSATIONS, **options, processor_kwargs=kwargs)
        with torch.no_grad():
            together = model(**batch).logits
        for row, expected in enumerate(logits):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real], expected, rtol=1e-3, atol=1e-4)
    batch = processor.apply_chat_template(
        CONVERSATIONS, **options, processor_kwargs={"padding": True, "padding_side": "left"}
    )
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for inputs, answer in zip(alone, answers):
        own = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(own, answer[: len(own)])


def test_a_training_step(model, processor):
    loss = model(**encode_rows(processor, ROWS)).loss
    loss.backward()
    assert loss.isfinite() and model.model.visual.mm_projector.layers[1].weight.grad.abs().sum() > 0
    model.zero_grad()


def test_pooled_videos():
    pools = {"video_encoder": "tsp", "pool_sizes": [[4, 1, 1], [2, 2, 2]]}
    processor = tiny("resize", **pools)
    model = make_model(processor, "resize", **pools)
    batch = processor.apply_chat_template(
        ask(VIDEO), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert batch["video_grid_thw"].tolist() == [[2, 2, 2], [4, 1, 1]]
    assert model.generate(**batch, max_new_tokens=2).shape[1] > batch["input_ids"].shape[1]


def test_collated_rows_are_rows_encoded_together(processor):
    batch = DistillCollator(processor.tokenizer.pad_token_id)([EncodedDataset(processor, ROWS)[i] for i in range(3)])
    expected = encode_rows(processor, ROWS)
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_folders_can_be_pushed(folder):
    check_folder(folder)
    assert {"processor_config.json", "linmu_remote_code.py", "chat_template.jinja"} <= set(files_to_upload(folder))


def test_trls_collator(processor):
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    collate = trl.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows = [
        {
            "images": [picture(64, 16)],
            "prompt": [{"role": "user", "content": "what?"}],
            "completion": ROWS[0]["messages"][1:],
        },
        {
            "images": [picture(9, 9)] * 2,
            "prompt": [{"role": "user", "content": "a?"}],
            "completion": ROWS[0]["messages"][1:],
        },
    ]
    batch = collate(rows)
    assert [processor.decode(row[row >= 0]) for row in batch["labels"]] == ["7<|im_end|>\n"] * 2


def test_trls_collator_without_completions(model, processor):
    """It leaves placeholders among the labels, and the model learns nothing from those."""
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    collate = trl.DataCollatorForVisionLanguageModeling(processor)
    batch = collate([{"images": [picture(64, 16)], "messages": ROWS[0]["messages"]}])
    placeholders = batch["labels"] == processor.image_token_id
    assert placeholders.any() and processor.image_token_id >= model.config.text_config.vocab_size
    loss = model(**batch).loss
    batch["labels"] = batch["labels"].masked_fill(placeholders, -100)
    assert torch.equal(loss, model(**batch).loss)


def test_pipeline(folder):
    answer = pipeline("image-text-to-text", model=str(folder))
    for conversation in (ask(IMAGE), ask(IMAGE, IMAGE), ask(VIDEO)):
        said = answer(text=conversation, max_new_tokens=3, do_sample=False)
        assert isinstance(said[0]["generated_text"][-1]["content"], str)


def test_linmu_chat(folder, tmp_path, capsys):
    picture(64, 16).save(tmp_path / "picture.png")
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(clip(10)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    media = ["--image", tmp_path / "picture.png", "--video", tmp_path / "frames"]
    chat.main([str(argument) for argument in ["--model", folder, *media, "--max_new_tokens", 3, "what?"]])
    assert capsys.readouterr().out.endswith("\n")


def test_answers_for_a_retention_table(model, processor):
    together = generate_answers(model, processor, ROWS, max_new_tokens=3)
    assert together == [generate_answers(model, processor, [row], max_new_tokens=3)[0] for row in ROWS]


def test_linmu_chat_takes_as_many_frames_as_the_processor(processor, tmp_path):
    for number, frame in enumerate(clip(20)):
        Image.fromarray(frame).save(tmp_path / f"{number:02}.png")
    frames = chat.read_video(str(tmp_path), processor).frames
    assert [np.asarray(frame)[0, 0, 0] for frame in frames] == [0, 3, 5, 8, 11, 14, 16, 19]


def test_linmu_chat_repeats_the_frames_of_a_short_file(processor, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 80 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = chat.read_video(str(tmp_path / "clip.mp4"), processor).frames
    brightness = [float(np.asarray(frame).mean()) for frame in frames]
    assert brightness == pytest.approx([0, 0, 80, 80, 80, 80, 160, 160], abs=6)


REMOTE = """
import importlib.util, os, sys
find = importlib.util.find_spec
hide = sys.argv[3] == "hidden"
if hide:
    importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in ("torchvision", "av") else find(name, *a)
    sys.modules["torchvision"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import is_torchvision_available
assert not (hide and is_torchvision_available())
folder, output, trust = sys.argv[1], sys.argv[2], {"trust_remote_code": True}
assert "linmu_hf" not in sys.modules
try:
    AutoProcessor.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded without trust")
processor = AutoProcessor.from_pretrained(folder, **trust)
assert type(processor).__module__ == "linmu_hf.families.nvila.processing"
processor.save_pretrained(output)
saved = [open(os.path.join(place, "processor_config.json")).read() for place in (folder, output)]
assert saved[0] == saved[1] and os.path.isfile(os.path.join(output, "linmu_remote_code.py"))
AutoProcessor.from_pretrained(output, **trust)
from PIL import Image
import numpy as np
media = [{"type": "image", "image": Image.new("RGB", (64, 16))}]
messages = [{"role": "user", "content": [*media, {"type": "text", "text": "what is it?"}]}]
print(pipeline("image-text-to-text", model=folder, **trust)(text=messages, max_new_tokens=2))
video = [{"role": "user", "content": [{"type": "video", "video": np.zeros((20, 16, 16, 3), dtype=np.uint8)}]}]
batch = processor.apply_chat_template(video, tokenize=True, return_dict=True, return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
model.generate(**batch, max_new_tokens=2)
"""


@pytest.mark.parametrize("torchvision", ["visible", "hidden"])
def test_remote_code(tmp_path, torchvision):
    """Nobody imported linmu_hf; torchvision is not needed, for videos neither."""
    folder = save(tmp_path / "linmu-nvila", "dynamic_s2")
    environment = os.environ | {
        "PYTHONPATH": str(Path(linmu_hf.__file__).parents[1]),
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder), str(tmp_path / "again"), torchvision],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
