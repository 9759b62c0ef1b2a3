"""
A family that does not exist: a tower of one matrix, a learned line break after every row of an image.

It is one module, this one, and one entry; nothing else of the package names it. Its line break takes a feature, as in
LLaVA-OneVision, but is not a cell of the image's grid.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from synthetic import SPECIAL_TOKENS, make_processor
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

import linmu_hf
from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.source import open_source
from linmu_hf.conversion.teacher import check_pair, load_teacher
from linmu_hf.families import FAMILIES, add_family
from linmu_hf.families.family import Checkpoint, Family, Preset, WeightMap
from linmu_hf.hub import find_origin, write_model_card
from linmu_hf.modeling.layout.positions import text_positions
from linmu_hf.modeling.vision_side import VISION_SIDES, VisionSide, grid_coordinates
from linmu_hf.safetensors_io import read_checkpoint


pytestmark = pytest.mark.extras  # Transformers builds the processor beside its checkpoint only with torchvision

WIDTH, PIXELS = 32, 5


class FakeVisionConfig(PreTrainedConfig):
    model_type = "fake_vision"
    base_config_key = "vision_config"
    pixels: int = PIXELS
    out_hidden_size: int = WIDTH


class FakeTower(PreTrainedModel):
    config_class = FakeVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patch = nn.Linear(config.pixels, config.out_hidden_size)
        self.line_break = nn.Parameter(torch.zeros(config.out_hidden_size))
        self.post_init()

    def forward(self, pixel_values, grids):
        images = self.patch(pixel_values).split([h * w for _, h, w in grids.tolist()])
        tokens = []
        for image, (_, h, w) in zip(images, grids.tolist()):
            ends = self.line_break.expand(h, 1, -1)
            tokens.append(torch.cat([image.unflatten(0, (h, w)), ends], dim=1).flatten(0, 1))
        return BaseModelOutputWithPooling(pooler_output=tuple(tokens))


class FakeVision(VisionSide):
    tower_class = FakeTower
    all_cells = False
    argument_names = {"image_cells": "pixel_values", "image_sizes": "image_grid_thw"}

    def features(self, kind, pixels, grids, return_dict=True, **kwargs):
        self.check_pixels(kind, pixels, grids)
        return self.visual(pixels, grids)

    def runs(self, kind, grids):
        return [[h * (w + 1)] for _, h, w in grids.tolist()]

    def coordinates(self, kind, grids):
        media = []
        for t, h, w in grids.tolist():
            cells = grid_coordinates(t, h, w).unflatten(0, (h, w))
            media.append(torch.cat([cells, cells.new_full((h, 1, 3), -1)], dim=1).flatten(0, 1))
        return media

    def positions(self, input_ids, types, attention_mask, grids, second_per_grid_ts=None):
        return text_positions(input_ids, attention_mask)

    def pixels(self, kind, grids):
        return (int(grids.prod(1).sum()), self.config.vision_config.pixels), "[cells, pixels]"


class FakeConfig(PreTrainedConfig):
    """What a `config.json` of the family comes down to; Transformers does not know it."""

    model_type = "fake"
    sub_configs = {"text_config": Qwen2Config, "vision_config": FakeVisionConfig}


def open_fake(folder, raw_config):
    config = FakeConfig(
        text_config=Qwen2Config(**raw_config["text"]),
        vision_config=FakeVisionConfig(**raw_config["vision"]),
        image_token_id=raw_config["image"],
        video_token_id=raw_config["video"],
        vision_start_token_id=None,
        vision_end_token_id=None,
        tie_word_embeddings=False,
    )
    return Checkpoint(config, read_checkpoint(folder))


FAKE = Family(
    name="Fake-VL",
    vision_type="fake_vision",
    vision=FakeVision,
    weights=WeightMap(
        prefixes={"tower.": "model.visual.", "text.model.": "model.language_model.", "text.lm_head.": "lm_head."},
        vision=(r"model\.visual\.(patch\.(weight|bias)|line_break)",),
        dropped={},
    ),
    reads=lambda raw_config: raw_config.get("model_type") == "fake",
    open=open_fake,
    register=lambda: AutoConfig.register("fake_vision", FakeVisionConfig, exist_ok=True),
    in_transformers=False,
    license_note="Fake-VL is nobody's.",
    presets={"fake-1b": Preset({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})},
)


@pytest.fixture(scope="module", autouse=True)
def entry():
    """The one entry."""
    add_family(FAKE)
    yield
    del FAMILIES["fake_vision"], VISION_SIDES["fake_vision"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake") / "teacher"
    folder.mkdir()
    processor = make_processor()
    ids = dict(zip(SPECIAL_TOKENS, processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(Qwen2Config(**text))
    tower = {"patch.weight": (WIDTH, PIXELS), "patch.bias": (WIDTH,), "line_break": (WIDTH,)}
    tensors = {f"text.{name}": 4 * tensor for name, tensor in llm.state_dict().items()}
    tensors |= {f"tower.{name}": torch.randn(shape) for name, shape in tower.items()}
    save_torch_state_dict(tensors, folder, max_shard_size="50KB")
    raw = {
        "model_type": "fake", "text": text, "vision": {"pixels": PIXELS, "out_hidden_size": WIDTH},
        "image": ids["<|image_pad|>"], "video": ids["<|video_pad|>"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    processor.save_pretrained(folder)
    return folder


def prompt(folder, *sizes):
    """A text around images of these sizes, in cells."""
    image = json.loads((folder / "config.json").read_text())["image"]
    ids = [5, *(token for h, w in sizes for token in [image] * (h * (w + 1)) + [7]), 9]
    grids = torch.tensor([[1, h, w] for h, w in sizes])
    pixels = torch.randn(int(grids.prod(1).sum()), PIXELS, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_grid_thw": grids}


@torch.no_grad()
def test_teacher_is_the_plain_decoder_around_its_features(folder):
    model = load_teacher(folder)
    batch = prompt(folder, (2, 3), (1, 4))
    source = open_source(folder)
    llm = Qwen2ForCausalLM(source.teacher.config.text_config).eval()
    llm.load_state_dict(
        {name.removeprefix("text."): value(t) for name, t in source.tensors.items() if name.startswith("text.")}
    )
    embeds = llm.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(model.model.visual(batch["pixel_values"], batch["image_grid_thw"]).pooler_output)
    assert torch.equal(features[3], model.model.visual.line_break) and len(features) == 2 * 4 + 5
    places = batch["input_ids"] == model.config.image_token_id
    embeds[places] = features
    assert torch.allclose(model(**batch).logits, llm(inputs_embeds=embeds).logits, atol=1e-5)


def value(stored):
    return torch.cat(list(stored.values())).view(stored.shape)


@torch.no_grad()
def test_arguments_go_by_the_familys_names(folder):
    model, batch = load_teacher(folder), prompt(folder, (2, 3), (1, 4))
    renamed = {"image_cells": "pixel_values", "image_sizes": "image_grid_thw", "input_ids": "input_ids"}
    own = {name: batch[ours] for name, ours in renamed.items()}
    assert torch.equal(model(**own).logits, model(**batch).logits)
    assert torch.equal(model.prefill(**own).logits, model.prefill(**batch).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**own, **options), model.generate(**batch, **options))
    with pytest.raises(ValueError, match="both image_cells and pixel_values"):
        model(**own, pixel_values=batch["pixel_values"])


def test_a_line_break_takes_a_feature_and_is_no_cell(folder):
    model = load_teacher(folder)
    batch = prompt(folder, (2, 3))
    _, layout = model.model.get_positions(**batch)
    start = [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [-1] * 4, [0, 0, 1, 0]
    assert layout[0, 1:6].tolist() == list(start)
    assert (layout[0, :, 0] >= 0).sum() == 6


@torch.no_grad()
def test_converts_loads_and_generates(folder, tmp_path):
    report = convert(str(folder), str(tmp_path / "student"), keep_attention=[1])
    assert report.layers_replaced == [0] and not report.dropped
    student = LinMUForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    check_pair(student.config, load_teacher(folder).config)
    batch = prompt(folder, (2, 3), (3, 2))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    answer = student.generate(**batch, **options)
    ids = batch["input_ids"]
    for _ in range(5):  # whole forwards without a cache
        logits = student(**batch | {"input_ids": ids}, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, ids)
    assert student.generate(**batch, **options, num_beams=2).shape == answer.shape
    layout = student.model.get_positions(**batch)
    again = student(**batch, position_ids=layout[0], vision_layout=layout[1]).logits
    assert torch.equal(again, student(**batch).logits)
    write_model_card(tmp_path / "student", find_origin(str(folder)))
    card = (tmp_path / "student" / "README.md").read_text()
    assert "Fake-VL" in card and "Fake-VL is nobody's." in card


def test_nothing_else_names_a_family():
    """Outside of its folder a family occurs where classes are exported and, for now, in configuration and testbed."""
    package = Path(linmu_hf.__file__).parent
    named = re.compile(r"nvila_vision|qwen2_5_vl_vision|families\.(nvila|qwen2_5_vl)|is_nvila|NVILA[A-Z]")
    files = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if named.search(path.read_text()) and path.relative_to(package).parts[0] not in ("families", "testbed")
    }
    assert files == {"__init__.py", "modeling/configuration_linmu.py"}
