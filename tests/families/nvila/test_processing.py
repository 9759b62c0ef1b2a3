"""NVILA's processor: exact token sequences, labels, padding, and saved folders."""

import pytest
import torch
from nvila_processors import clip, make_tokenizer, picture, released, tiny
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers.utils import DummyObject

from linmu_hf import NVILAImageProcessor, NVILAProcessor, NVILAVideoProcessor, NVILAVisionConfig
from linmu_hf.data import encode_prompts, encode_rows
from linmu_hf.families.nvila.processing import build_processor


SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
CONFIG = NVILAVisionConfig(tower_config={"image_size": 16, "patch_size": 4})
POOLED = {"video_encoder": "tsp", "pool_sizes": [[8, 1, 1]]}


def parts(images=0, videos=0, text="what is it?"):
    media = [{"type": "image"}] * images + [{"type": "video"}] * videos
    return [*media, {"type": "text", "text": text}]


def user(*args, **kwargs):
    return {"role": "user", "content": parts(*args, **kwargs)}


def say(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text_ids(processor, text):
    return processor.tokenizer(text)["input_ids"]


def question(processor, block, text="what is it?"):
    """The ids of a question whose only medium has these ids."""
    before = text_ids(processor, SYSTEM + "<|im_start|>user\n")
    return before + block + text_ids(processor, text + "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("tiling", "options", "media", "block"),
    [
        ("dynamic_s2", {}, {"images": [(640, 480)]}, "i*3072 n"),
        ("dynamic_s2", {}, {"images": [(64, 48)] * 2}, "i*256 n i*256 n"),
        ("dynamic", {}, {"images": [(1000, 100)]}, " ".join(["i*121 n n"] * 11)),
        ("dynamic", {}, {"images": [(448, 448)]}, "i*121 n n"),
        ("dynamic", {}, {"images": [(640, 480)] * 3}, " ".join(["i*121 n"] * 3)),
        ("resize", {}, {"images": [(640, 480)]}, "i*256 n"),
        ("dynamic_s2", {}, {"videos": [20]}, " ".join(["v*256 n"] * 8)),
        ("dynamic", {}, {"videos": [20]}, " ".join(["v*121 n"] * 8)),
        ("resize", {"num_video_frames": 16, **POOLED}, {"videos": [20]}, "v*256 n v*256 n"),
        ("resize", {"video_encoder": "tsp", "pool_sizes": [[8, 4, 4], [4, 8, 8]]}, {"videos": [8]},
         "v*16 n v*4 n v*4 n"),
        ("dynamic", {}, {"images": [(448, 448)], "videos": [20]}, "i*121 n n " + " ".join(["v*121 n"] * 8)),
    ],
)  # fmt: skip
def test_token_sequences_of_the_released_models(tiling, options, media, block):
    processor = released(tiling, **options)
    ids = {"i": [processor.image_token_id], "v": [processor.video_token_id], "n": text_ids(processor, "\n")}
    expected = [id for part in block.split() for id in ids[part[0]] * int(part[2:] or 1)]
    images = [picture(*size) for size in media.get("images", [])]
    videos = [clip(frames) for frames in media.get("videos", [])]
    text = processor.apply_chat_template([user(len(images), len(videos))], add_generation_prompt=True)
    batch = processor(text=text, images=images or None, videos=videos or None)
    assert batch["input_ids"][0] == question(processor, expected)
    kinds = [{"i": 1, "v": 2, "n": 0}[part[0]] for part in block.split() for _ in range(int(part[2:] or 1))]
    start = len(text_ids(processor, SYSTEM + "<|im_start|>user\n"))
    types = batch["mm_token_type_ids"][0]
    assert types[start : start + len(kinds)] == kinds and sum(types) == sum(kinds)


def test_eight_frames_of_nvila_8b():
    processor = released()
    batch = processor(text="<vila/video>", videos=[clip(30)])
    assert len(batch["input_ids"][0]) == 2056
    assert batch["pixel_values_videos"].shape == (8, 3, 448, 448)


@pytest.mark.parametrize("text", ["\nwhat?", "\n\nwhat?", "\n", "\n\n", "what?\n\n"])
def test_separators_never_merge_with_the_text(text):
    processor = tiny()
    twice = text_ids(processor, "\n\n")
    assert len(twice) == 1 and twice != text_ids(processor, "\n")  # the tokenizer does merge
    batch = processor(text="<image>" + text, images=picture(16, 16), images_kwargs={"image_aspect_ratio": "resize"})
    separator = text_ids(processor, "\n")
    assert batch["input_ids"][0] == [processor.image_token_id] * 4 + separator + text_ids(processor, text)


BEFORE = ("", "a", "a\n", "\n", "a \n ", "a you")
AFTER = ("what?", "\nwhat?", "\n\nwhat?", " what?", " \nwhat?", "\r\nwhat?", "\n", "", " ", "what?\n", " \n \n?")


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("tiling", ["dynamic", "dynamic_s2"])
def test_prompt_forms(tiling, before):
    """In NVILA the text of a `dynamic` image is `<image>\\n` for every tile, stripped and tokenized as a whole."""
    processor = tiny(tiling)
    break_id, image_id = text_ids(processor, "\n"), processor.image_token_id
    for after in AFTER:
        for size in ((16, 16), (64, 16)):
            content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
            text = processor.apply_chat_template([{"role": "user", "content": content}])
            encoded = processor(text=text, images=picture(*size), return_offsets_mapping=True)
            if tiling == "dynamic":
                tiles, placeholders = {(16, 16): (1, 9), (64, 16): (5, 9)}[size]
                value = (before + "<image>\n" * tiles + after).strip()
            else:
                placeholders = encoded["mm_token_type_ids"][0].count(1)
                value = (before + "<image>" + after).strip()
            whole = text_ids(processor, SYSTEM + "<|im_start|>user\n" + value + "<|im_end|>\n")
            block = [image_id] * placeholders + break_id
            assert encoded["input_ids"][0] == [i for id in whole for i in (block if id == image_id else [id])], value
            for id, (start, end) in zip(encoded["input_ids"][0], encoded["offset_mapping"][0]):
                assert processor.decode([id]).endswith(text[start:end])


def test_chat_template():
    processor = tiny()
    messages = [user(1, text="  what is it? \n"), say(" 7\n"), {"role": "user", "content": " and now? "}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        SYSTEM + "<|im_start|>user\n<image>  what is it?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
        "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "Be brief"}, user(1, 1), say("7")]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n<image><vila/video>what is it?<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
    )
    behind = [{"role": "user", "content": [{"type": "text", "text": "what is "}, {"type": "image"}]}]
    assert processor.apply_chat_template(behind).endswith("user\nwhat is <image><|im_end|>\n")


def test_conversations_with_their_media():
    processor = tiny()
    image, video = picture(30, 30), clip(9)
    first = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a?"}]}]
    second = [
        {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "what is it?"}]}
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for side in ("left", "right"):
        batch = processor.apply_chat_template(
            [first, second], **options, processor_kwargs={"padding": True, "padding_side": side}
        )
        for row, (conversation, kind) in enumerate([(first, "image"), (second, "video")]):
            alone = processor.apply_chat_template(conversation, **options)
            real = batch["attention_mask"][row].bool()
            assert torch.equal(batch["input_ids"][row][real], alone["input_ids"][0])
            assert torch.equal(batch["mm_token_type_ids"][row][real], alone["mm_token_type_ids"][0])
            pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
            assert torch.equal(batch[pixels], alone[pixels])
            assert torch.equal(batch[f"{kind}_grid_thw"], alone[f"{kind}_grid_thw"])
            assert not batch["mm_token_type_ids"][row][~real].any()
        assert not batch["attention_mask"].all() and batch["attention_mask"][:, 0 if side == "right" else -1].all()
    assert set(batch) <= set(processor.model_input_names)


def test_images_belong_to_their_texts():
    """One image is tiled, two in one text are not, in whatever nesting they come."""
    processor = tiny("dynamic")
    images = [picture(64, 16, seed) for seed in range(3)]
    texts = ["<image>a", "b", "<image><image>c"]
    for given in (images, [images[:1], [], images[1:]], [images[:1], images[1:]]):
        batch = processor(text=texts, images=given, padding=True, return_tensors="pt")
        assert batch["image_grid_thw"].tolist() == [[1, 3, 12], [1, 3, 3], [1, 3, 3]]
        assert (batch["mm_token_type_ids"] == 1).sum(1).tolist() == [45, 0, 18]
        assert len(batch["pixel_values"]) == 5 + 1 + 1
    untiled = processor(text=texts[0], images=images[:1], image_aspect_ratio="resize")
    assert untiled["mm_token_type_ids"][0].count(1) == 9
    assert untiled["input_ids"][0][8:11] == [processor.image_token_id, *text_ids(processor, "\na")]


def test_media_without_text():
    processor = tiny()
    images = [picture(30, 30, 0), picture(30, 30, 1)]
    assert processor(images=images)["image_grid_thw"].tolist() == [[1, 6, 6]] * 2
    assert processor(images=[images])["image_grid_thw"].tolist() == [[1, 2, 2]] * 2
    assert set(processor(videos=clip(8))) == {"pixel_values_videos", "video_grid_thw"}
    assert set(processor(text="hi")) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    with pytest.raises(ValueError, match="nothing to process"):
        processor()


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<image>", 0, 0, "has 1 <image> placeholders for 0 images"),
        ("a", 1, 0, "has 0 <image> placeholders for 1 images"),
        (["<image>", "<image><image>"], 2, 0, "has 3 <image> placeholders for 2 images"),
        ("<vila/video><image>", 1, 0, "has 1 <vila/video> placeholders for 0 videos"),
        ("<vila/video>", 0, 2, "has 1 <vila/video> placeholders for 2 videos"),
    ],
)
def test_placeholders_must_match_media(text, images, videos, message):
    images, videos = [picture(16, 16)] * images or None, [clip(8)] * videos or None
    with pytest.raises(ValueError, match=message):
        tiny()(text=text, images=images, videos=videos)


def test_truncation_spares_media():
    processor = tiny("resize")
    text = "<image>what is it? you are"
    whole = processor(text=text, images=picture(16, 16))["input_ids"][0]
    cut = processor(text=text, images=picture(16, 16), truncation=True, max_length=8)
    assert cut["input_ids"][0] == whole[:8] and len(cut["mm_token_type_ids"][0]) == 8
    padded = processor(text=text, images=picture(16, 16), padding="max_length", max_length=len(whole) + 2)
    assert sum(padded["attention_mask"][0]) == len(whole) == len(padded["input_ids"][0]) - 2
    with pytest.raises(ValueError, match="cut to max_length=3, would lose part of an image or video"):
        processor(text=text, images=picture(16, 16), truncation=True, max_length=3)


def test_options_of_the_tokenizer():
    processor = tiny("resize")
    batch = processor(
        text=["<image>a", "a you"],
        images=picture(16, 16),
        padding=True,
        padding_side="left",
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_mm_token_type_ids=False,
    )
    assert "mm_token_type_ids" not in batch
    assert batch["offset_mapping"][0] == [(0, 7)] * 4 + [(0, 0), (7, 8)]
    alone = processor.tokenizer("a you", return_offsets_mapping=True)["offset_mapping"]
    assert batch["offset_mapping"][1] == [(0, 0)] * (6 - len(alone)) + alone
    assert [len(row) for row in batch["special_tokens_mask"]] == [6, 6]
    assert "attention_mask" not in processor(text="a", return_attention_mask=False)


def trained(processor, batch, row):
    labels = batch["labels"][row]
    kept = labels >= 0
    assert torch.equal(labels[kept], batch["input_ids"][row][kept])
    return processor.tokenizer.decode(labels[kept])


ROWS = [
    {"messages": [user(1), say("7\n\nor so"), user(text="\n\nand now?"), say(" three ")], "images": [picture(64, 16)]},
    {
        "messages": [user(2, 1), say("8"), user(1), say("9")],
        "images": [picture(9, 9)] * 3,
        "videos": [[picture(9, 9)] * 8],
    },
    {"messages": [user(), say("hello you")]},
]


@pytest.mark.parametrize("tiling", ["dynamic_s2", "dynamic", "resize"])
def test_labels_are_the_assistant_turns(tiling):
    processor = tiny(tiling)
    batch = encode_rows(processor, ROWS)
    assert trained(processor, batch, 0) == "7\n\nor so<|im_end|>three<|im_end|>"
    assert trained(processor, batch, 1) == "8<|im_end|>9<|im_end|>"
    assert trained(processor, batch, 2) == "hello you<|im_end|>"
    assert not (batch["labels"] >= 0)[batch["mm_token_type_ids"] > 0].any()


def test_assistant_mask_of_the_template():
    processor = tiny("dynamic")
    image = {"type": "image", "image": picture(64, 16)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}, say("7\n\nor so")]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    answer = batch["input_ids"][0][torch.as_tensor(batch["assistant_masks"][0]).bool()]
    assert processor.decode(answer) == "7\n\nor so<|im_end|>"


def test_prompts_are_padded_on_the_left():
    processor = tiny()
    batch = encode_prompts(processor, ROWS)
    assert batch["attention_mask"][:, -1].all()
    assert all(text.endswith("<|im_start|>assistant\n") for text in processor.batch_decode(batch["input_ids"]))
    assert batch["video_grid_thw"].tolist() == [[8, 2, 2]]


def same(batch, other):
    return set(batch) == set(other) and all(torch.equal(batch[name], other[name]) for name in batch)


def inputs(processor):
    return processor(text="<image>a<vila/video>", images=picture(64, 16), videos=[clip(16)], return_tensors="pt")


def loaded_by(auto, plain, folder):
    """By an Auto class or, where that is a dummy for want of torchvision, by the class itself."""
    return (plain if isinstance(auto, DummyObject) else auto).from_pretrained(folder)


def test_saved_folders_load_through_the_auto_classes(tmp_path):
    processor = tiny("dynamic", num_video_frames=16, mean_std=([0.2] * 3, [0.3] * 3), **POOLED)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is NVILAProcessor and loaded.chat_template == processor.chat_template
    assert same(inputs(loaded), inputs(processor)) and loaded.to_dict() == processor.to_dict()
    assert type(loaded_by(AutoImageProcessor, NVILAImageProcessor, tmp_path)) is NVILAImageProcessor
    assert type(loaded_by(AutoVideoProcessor, NVILAVideoProcessor, tmp_path)) is NVILAVideoProcessor
    loaded.save_pretrained(tmp_path / "again")
    for file in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "linmu_remote_code.py"):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / file).read_text(), file


def test_parts_can_be_saved_alone(tmp_path):
    processor = tiny("dynamic")
    processor.image_processor.save_pretrained(tmp_path / "image")
    processor.video_processor.save_pretrained(tmp_path / "video")
    image = loaded_by(AutoImageProcessor, NVILAImageProcessor, tmp_path / "image")
    video = loaded_by(AutoVideoProcessor, NVILAVideoProcessor, tmp_path / "video")
    assert image.to_dict() == processor.image_processor.to_dict()
    assert video.to_dict() == processor.video_processor.to_dict()


def test_new_tokens_come_in_the_released_order():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    processor = build_processor(CONFIG, tokenizer)
    tokens = ["<vila/sentinel>", "<image>", "<vila/video>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [size, size + 1, size + 2]
    assert (processor.image_token_id, processor.video_token_id) == (size + 1, size + 2)
    build_processor(CONFIG, tokenizer)
    assert len(tokenizer) == size + 3
    assert processor.decode([size + 1, 5], skip_special_tokens=True) == processor.decode([5])


def test_tokens_that_a_release_has_elsewhere_stay():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<vila/video>", "<image>"], special_tokens=True)
    size = len(tokenizer)
    processor = build_processor(CONFIG, tokenizer)
    assert (processor.image_token_id, processor.video_token_id) == (size - 1, size - 2)


def test_tokenizers_that_do_not_fit(tmp_path):
    processor = tiny()
    with pytest.raises(ValueError, match=r"encodes '<image>' as \d+ tokens.*build_processor"):
        NVILAProcessor(processor.image_processor, make_tokenizer(), processor.video_processor)
    with pytest.raises(TypeError, match="video_processor is a NVILAImageProcessor"):
        NVILAProcessor(processor.image_processor, processor.tokenizer, processor.image_processor)


def test_counts_of_placeholders_without_pixels():
    for tiling in ("dynamic_s2", "dynamic", "resize"):
        processor = tiny(tiling)
        sizes = [(16, 16), (20, 60), (60, 20)]
        counts = processor._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=[(8, 20, 20)])
        for i, (height, width) in enumerate(sizes):
            batch = processor(text="<image>", images=picture(width, height))
            assert counts["num_image_tokens"][i] == batch["mm_token_type_ids"][0].count(1)
            assert counts["num_image_patches"][i] == len(batch["pixel_values"])
        batch = processor(text="<vila/video>", videos=[clip(8)])
        assert counts["num_video_tokens"] == [batch["mm_token_type_ids"][0].count(2)]
