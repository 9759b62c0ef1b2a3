"""An NVILA student as users have it: generation, placeholders outside the vocabulary, saving, training, devices."""

import pytest
import tiny
import tiny_nvila
import torch
from perturbation import layer_function, moved
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from linmu_hf import LinMUForConditionalGeneration, LinMUModel, lora_targets
from linmu_hf.modeling.generation import WideScores, chunk_sizes


IMAGE = tiny_nvila.Sample(3, ("image", 2, 3), 2, ("video", 2), 4)
TILES = tiny_nvila.LiteSample(2, ("image", 2, 2), 4)
STUDENTS = {"scales": (tiny_nvila.S2, IMAGE), "tiles": (tiny_nvila.LITE, TILES)}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

students = pytest.mark.parametrize(("vision", "sample"), STUDENTS.values(), ids=STUDENTS)


def generate(model, sample=IMAGE, **how):
    return model.generate(**tiny.batch(sample, dtype=torch.float32), **GREEDY | how)[:, len(sample) :]


@pytest.mark.parametrize(
    "how",
    [
        {"repetition_penalty": 1.3},
        {"encoder_repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9], [tiny_nvila.IMAGE], [tiny_nvila.IMAGE, 3]]},
        {"sequence_bias": [[[5], 1.0], [[tiny_nvila.VIDEO, 6], 2.0]]},
        {"suppress_tokens": [5, tiny_nvila.VIDEO]},
        {"repetition_penalty": 1.3, "num_beams": 2, "no_repeat_ngram_size": 3},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1},
        {"guidance_scale": 1.5, "repetition_penalty": 1.1},
        {"renormalize_logits": True, "remove_invalid_values": True, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_processors_that_look_the_prompt_up(how):
    """They see placeholders among the ids of the prompt, for which the head has no logits."""
    model = tiny_nvila.plain()
    new = generate(model, **how)
    assert new.shape == (1, 4) and int(new.max()) < 64


def test_a_penalty_is_that_of_the_ids_with_logits():
    ids, scores = torch.tensor([[3, 66, 66, 5]]), torch.randn(1, 64)
    processor = RepetitionPenaltyLogitsProcessor(2.0)
    actual = WideScores(processor, 68)(ids, scores.clone())
    assert torch.equal(actual, processor(ids[:, [0, 3]], scores.clone()))


def test_own_processors_see_the_scores_of_the_vocabulary():
    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert scores.shape == (1, 64)
            return scores

    generate(tiny_nvila.plain(), logits_processor=LogitsProcessorList([Own()]), repetition_penalty=1.2)


def test_resized_embeddings_take_placeholders_in():
    model = tiny_nvila.plain()
    expected = generate(model)
    model.resize_token_embeddings(68)
    with torch.no_grad():
        model.lm_head.weight[64:] = 0  # as conversion suppresses them
    assert torch.equal(generate(model, suppress_tokens=[64, 65, 66, 67]), expected)


@students
def test_placeholder_embeddings_do_not_matter(vision, sample):
    """The id that stands in for them when embeddings are looked up leaves no trace, in values or gradients."""
    model, inputs = tiny_nvila.plain(vision=vision), tiny.batch(sample, dtype=torch.float32)
    assert 0 not in sample.ids
    before = model(**inputs).logits
    before.square().sum().backward()
    assert not model.get_input_embeddings().weight.grad[0].any()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 100
        assert torch.equal(model(**inputs).logits, before)


@students
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_from_embeddings(vision, sample, beams):
    """Types say where images belong, also among beams; without types nobody can know."""
    model, inputs = tiny_nvila.plain(vision=vision), tiny.batch(sample, dtype=torch.float32)
    expected = model.generate(**inputs, **GREEDY, num_beams=beams)[:, len(sample) :]
    inputs["inputs_embeds"] = model.model.embed(inputs.pop("input_ids"))
    for chunks in ({}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=beams, **chunks), expected)
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match=r"placeholder 6[67] lies outside the vocabulary .*; pass mm_token_type_ids"):
        model.generate(**inputs, **GREEDY, num_beams=beams)


def test_only_placeholders_may_lie_outside_the_vocabulary():
    model, inputs = tiny_nvila.plain(), tiny.batch(tiny_nvila.Sample(5))
    for wrong in (64, 65, 68):
        inputs["input_ids"][0, 2] = wrong
        for run in (model, model.generate):
            with pytest.raises(ValueError, match=f"input_ids hold {wrong}, outside the vocabulary of 64"):
                run(**inputs)
    inputs["input_ids"][0, 2] = tiny_nvila.IMAGE
    inputs["mm_token_type_ids"][0, 2] = 1
    with pytest.raises(ValueError, match="the prompt has 1 image tokens but image_grid_thw describes 0"):
        model(**inputs)


def test_chunks_keep_tiles_and_pooled_videos_whole():
    sample = tiny_nvila.LiteSample(2, ("image", 2, 2), 4)  # tokens 2 to 29, with separators between and after
    inputs = {name: value for name, value in tiny.batch(sample).items() if "pixel" not in name}
    layout = tiny_nvila.plain(vision=tiny_nvila.LITE).model.get_positions(**inputs)[1]
    assert chunk_sizes(layout, len(sample), 5) == [2, 28, 5, 1]
    sample = tiny_nvila.Sample(1, ("video", 4), 3)  # four frames of four tokens and a separator
    inputs = {name: value for name, value in tiny.batch(sample).items() if "pixel" not in name}
    layout = tiny_nvila.plain(max_span_frames=2).model.get_positions(**inputs)[1]
    assert chunk_sizes(layout, len(sample), 6) == [1, 9, 1, 9, 4]


@pytest.mark.parametrize(("vision", "sample"), [*STUDENTS.values()], ids=STUDENTS)
@pytest.mark.parametrize("layer_idx", range(4))
def test_who_sees_whom_with_separators_inside_a_span(layer_idx, vision, sample):
    """Values and gradients: a vision token sees its span, text what is before it; nobody sees a later span."""
    inputs = {name: value for name, value in tiny.batch(sample).items() if "pixel" not in name}
    positions, layout = tiny_nvila.plain(vision=vision).model.get_positions(**inputs)
    t, span = len(sample), layout[0, :, 0]
    function = layer_function(layer_idx, positions, layout, inputs["attention_mask"])
    embeds = torch.randn(1, t, 32, dtype=torch.float64)
    effect = moved(function, embeds) > 1e-12
    given = embeds.clone().requires_grad_()
    outputs = function(given)
    weight = torch.randn_like(outputs)
    rows = [
        torch.autograd.grad((outputs[0, i] * weight[0, i]).sum(), given, retain_graph=True)[0][0] for i in range(t)
    ]
    assert torch.equal(torch.stack(rows).abs().amax(-1) > 1e-12, effect)
    order = torch.arange(t)
    text = span < 0
    assert torch.equal(effect[text][:, text], (order[:, None] >= order[None])[text][:, text])
    for own in range(int(span.max()) + 1):
        places = (span == own).nonzero().flatten()
        assert effect[places][:, places].all()
        first, last = int(places.min()), int(places.max())
        assert effect[last + 1 :, : last + 1].all()  # what follows a span sees all of it
        assert effect[places][:, :first].all()  # a span sees all before it
        assert not effect[: last + 1, last + 1 :].any()  # nothing up to its end sees what follows


@students
@torch.no_grad()
def test_round_trip(vision, sample, tmp_path):
    model, inputs = tiny_nvila.plain(vision=vision), tiny.batch(sample, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LinMUForConditionalGeneration and not any(info.values())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LinMUModel
    torch.testing.assert_close(model.lm_head(base(**inputs).last_hidden_state), model(**inputs).logits)
    with torch.device("meta"):
        empty = LinMUForConditionalGeneration(model.config)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.visual.parameters()} == {torch.bfloat16}
    assert half(**tiny.batch(sample, dtype=torch.float32)).logits.isfinite().all()  # pixels are cast


@pytest.mark.extras
@torch.no_grad()
@pytest.mark.parametrize("place", ["whole", "parts"])
def test_device_map(place, tmp_path):
    """Offloaded as a whole, and split over places between the layers of the tower."""
    model, inputs = tiny_nvila.plain(), tiny.batch(IMAGE, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys((name for name, _ in model.named_children()), "cpu") | {"model": "cpu"}
    if place == "whole":
        parts = {"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
    else:
        tower = "model.visual.vision_tower."
        parts = {
            f"{tower}embeddings": "disk", f"{tower}encoder.layers.0": "cpu", f"{tower}encoder.layers.1": "disk",
            f"{tower}encoder.layers.2": "cpu", f"{tower}post_layernorm": "disk", "model.visual.mm_projector": "disk",
            "model.language_model": "cpu", "lm_head": "cpu",
        }  # fmt: skip
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "disk"
    )
    assert any(parameter.is_meta for parameter in loaded.model.visual.parameters())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(loaded), generate(model))


def test_no_layer_of_the_tower_is_split():
    assert {"SiglipEncoderLayer", "SiglipVisionEmbeddings", "LinMUDecoderLayer"} <= set(
        tiny_nvila.plain()._no_split_modules
    )


@pytest.mark.extras
def test_lora_leaves_tower_and_projector_alone():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_nvila.plain(layer_types=["m_mate", "full_attention", "m_mate", "m_mate"])
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=lora_targets()), model)
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) > 50 and all(".language_model.layers." in name for name in names)


@students
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_gives_the_tower_its_gradients(reentrant, vision, sample):
    inputs, results = tiny.batch(sample), []
    for checkpointing in (False, True):
        model = tiny_nvila.model(vision=vision).train()
        if checkpointing:
            tiny.checkpoint(model, use_reentrant=reentrant)
            assert all(layer.gradient_checkpointing for layer in model.model.visual.vision_tower.encoder.layers)
            model.enable_input_require_grads()
        model(**inputs).logits.square().mean().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in results[0].items():
        unused = "encoder.layers.2." in name or "post_layernorm" in name
        assert (grad is None) == unused, name
        if not unused:
            assert grad.any() or "k_proj.bias" in name, name
            torch.testing.assert_close(results[1][name], grad, atol=1e-9, rtol=1e-9, msg=name)


def test_a_frozen_tower_gets_no_gradient_and_keeps_no_graph():
    model, inputs = tiny_nvila.plain().train(), tiny.batch(IMAGE, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert not any(own.requires_grad for own in features)
    model(**inputs).logits.sum().backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None} == {
        "language_model",
        "weight",
    }


@students
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype, vision, sample):
    model = tiny_nvila.plain(vision=vision)
    expected = model(**tiny.batch(sample, dtype=torch.float32)).logits
    actual = model.to(dtype)(**tiny.batch(sample, dtype=dtype)).logits.float()
    assert (actual - expected).norm() / expected.norm() < (0.08 if dtype == torch.bfloat16 else 0.02)


def test_features_of_images_as_transformers_returns_them():
    model, inputs = tiny_nvila.plain(), tiny.batch(tiny_nvila.Sample(1, ("image", 2, 3), ("image", 1, 1), 1))
    pixels, grids = inputs["pixel_values"].float(), inputs["image_grid_thw"]
    output = model.get_image_features(pixels, grids)
    assert [tuple(own.shape) for own in output.pooler_output] == [(24, 32), (4, 32)]
    assert output.last_hidden_state.shape == (8, 4, 4, 16)
    assert isinstance(model.get_image_features(pixels, grids, return_dict=False), tuple)
