"""A student is distilled from the teacher it was converted from: another one is refused, whatever differs."""

import json
import re

import pytest
from synthetic import make_processor, make_teacher
from synthetic_nvila import LAYOUTS, change_json, make_nvila

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.source import read_processor
from linmu_hf.conversion.teacher import check_pair, check_tokenizers, load_processor, load_teacher


def check(student, teacher):
    student_config = LinMUForConditionalGeneration.from_pretrained(student).config
    check_pair(student_config, load_teacher(teacher, dtype="float32").config)
    check_tokenizers(read_processor(student).tokenizer, load_processor(teacher).tokenizer)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "legacy rope", *LAYOUTS])
def test_a_student_and_its_own_teacher(tmp_path, processor, kind):
    if kind in LAYOUTS:
        make_nvila(tmp_path / "teacher", kind)
    else:
        make_teacher(tmp_path / "teacher", processor=processor)
    if kind == "legacy rope":  # as in the published config.json
        text = json.loads((tmp_path / "teacher" / "config.json").read_text())["text_config"]
        text |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        del text["rope_parameters"]
        change_json(tmp_path / "teacher" / "config.json", text_config=text)
    convert(str(tmp_path / "teacher"), str(tmp_path / "student"), keep_attention=[0], dtype="bfloat16")
    check(tmp_path / "student", tmp_path / "teacher")
    convert(str(tmp_path / "teacher"), str(tmp_path / "all"), keep_attention="all", preset="paper")
    check(tmp_path / "student", tmp_path / "all")


@pytest.fixture(scope="module")
def pair(processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    make_teacher(root / "teacher", processor=processor)
    convert(str(root / "teacher"), str(root / "student"))
    return root


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "rope_parameters", ROPE | {"rope_theta": 1e6}),
        ("text_config", "rope_parameters", ROPE | {"mrope_section": [4, 2, 2]}),
        ("text_config", "rms_norm_eps", 1e-4),
        ("vision_config", "window_size", 32),
        ("vision_config", "fullatt_block_indexes", [0]),
        ("vision_config", "tokens_per_second", 2),
        (None, "image_token_id", 17),
    ],
)
def test_another_setting_is_refused(pair, tmp_path, processor, part, name, value):
    other = tmp_path / "other"
    make_teacher(other, processor=processor)
    config = json.loads((other / "config.json").read_text())
    change_json(other / "config.json", **({name: value} if part is None else {part: config[part] | {name: value}}))
    with pytest.raises(ValueError, match=f"{f'{part}.' if part else ''}{name} is .*take the teacher that the student"):
        check(pair / "student", other)


def test_another_order_of_tokens_is_refused(pair, tmp_path):
    """As many tokens, two of them exchanged."""
    processor = make_processor()
    make_teacher(tmp_path / "other", processor=processor)
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[3], list(vocab)[200]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=re.escape(f"is {first!r} for the student and {second!r} for")):
        check(pair / "student", tmp_path / "other")
