"""`generate` in all its forms against a loop that runs the whole model for every token."""

import pytest
import tiny
import torch
from transformers import DynamicCache

from linmu_hf.modeling.generation import chunk_sizes


SAMPLES = {
    "text": tiny.Sample(9),
    "image": tiny.Sample(3, ("image", 3, 5), 4),
    "video": tiny.Sample(2, ("video", 5, 2, 3), 3),
    "many": tiny.Sample(1, ("image", 2, 3), 2, ("video", 3, 3, 2), 1, ("image", 1, 4), 6),
}
OPTIONS = {"default": {}, "hybrid": {"layer_types": ["m_mate", "full_attention", "m_mate", "full_attention"]}}
SPECIAL = [tiny.IMAGE, tiny.VIDEO, tiny.START, tiny.END]  # no image begins in an answer
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": SPECIAL}

both = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
all_samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


@torch.no_grad()
def greedy(model, sample, n=6):
    """The next n tokens, each from a forward pass over everything before it, without a cache."""
    new = []
    for _ in range(n):
        logits = model(**tiny.batch(tiny.extended(sample, new)), use_cache=False).logits
        new.append(int(logits[0, -1, : SPECIAL[0]].argmax()))
    return new


def new_tokens(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@both
@all_samples
@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=str,
)
def test_greedy(sample, options, how):
    model, inputs = tiny.model(**options), tiny.batch(sample)
    assert new_tokens(model.generate(**inputs, **GREEDY, **how), inputs) == [greedy(model, sample)]


@both
@torch.no_grad()
def test_a_second_image_later_does_not_change_the_answer_about_the_first(options):
    """Every logit of the first turn is the same with the second turn and its image after it."""
    model = tiny.model(**options)
    first, second = tiny.Sample(3, ("image", 3, 5), 6), tiny.Sample(3, ("image", 3, 5), 6, ("image", 2, 4), 5)
    alone, together = tiny.batch(first), tiny.batch(second)
    n = len(first.ids)
    assert first.ids == second.ids[:n]
    expected = model(**alone).logits
    torch.testing.assert_close(model(**together).logits[:, :n], expected, atol=2e-5, rtol=0)
    together["pixel_values"][: len(alone["pixel_values"])] += 1
    assert (model(**together).logits[:, :n] - expected).abs().max() > 1e-2


@all_samples
def test_without_token_types_and_mask(sample):
    model, inputs = tiny.model(), tiny.batch(sample)
    del inputs["mm_token_type_ids"], inputs["attention_mask"]
    assert new_tokens(model.generate(**inputs, **GREEDY), inputs) == [greedy(model, sample)]


@both
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_left_padded_batch(options, how):
    model, inputs = tiny.model(**options), tiny.batch(*SAMPLES.values(), padding="left")
    expected = [greedy(model, sample) for sample in SAMPLES.values()]
    assert new_tokens(model.generate(**inputs, **GREEDY, **how), inputs) == expected


@both
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_beams_of_a_batch_are_the_beams_of_its_rows(options, how):
    model = tiny.model(**options)
    beams = {**GREEDY, **how, "num_beams": 3, "num_return_sequences": 2}
    inputs = tiny.batch(*SAMPLES.values(), padding="left")
    together = new_tokens(model.generate(**inputs, **beams), inputs)
    alone = []
    for sample in SAMPLES.values():
        inputs = tiny.batch(sample)
        alone += new_tokens(model.generate(**inputs, **beams), inputs)
    assert together == alone


@torch.no_grad()
def test_beam_search_scores_are_those_of_a_forward_pass():
    """Beams jump between cached rows; the scores tell whether the states jumped with them."""
    model, sample = tiny.model(), SAMPLES["many"]
    out = model.generate(
        **tiny.batch(sample), **GREEDY, num_beams=4, num_return_sequences=4, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for sequence, score in zip(out.sequences, out.sequences_scores):
        new = sequence[len(sample) :].tolist()
        logits = model(**tiny.batch(tiny.extended(sample, new)), use_cache=False).logits[0, len(sample) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(new)), new].sum()
        assert float(score) == pytest.approx(float(expected), abs=1e-4)


@both
def test_num_return_sequences(options):
    model, samples = tiny.model(**options), (SAMPLES["image"], SAMPLES["many"])
    inputs = tiny.batch(*samples, padding="left")
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=True, num_return_sequences=3, eos_token_id=None,
        suppress_tokens=[tiny.IMAGE, tiny.VIDEO],  # what else is drawn depends on the torch
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, new in enumerate(new_tokens(out.sequences, inputs)):
        whole = tiny.batch(tiny.extended(samples[i // 3], new))
        expected = model(**whole, use_cache=False).logits[0, -4:-1]
        torch.testing.assert_close(torch.stack(out.logits)[:, i].double(), expected, atol=1e-4, rtol=0)


FIRST = tiny.Sample(2, ("video", 5, 2, 3), ("image", 2, 3), 3)
TURNS = {
    "text": (4,),
    "new image": (2, ("image", 3, 1), 3),
    "new image and video": (("video", 3, 1, 2), 1, ("image", 2, 2), 2),
}


@both
@pytest.mark.parametrize("ids", ["all ids", "new ids"])
@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_resume_a_conversation(turn, ids, options):
    """A second turn on the cache of the first equals the whole conversation at once."""
    model, inputs = tiny.model(**options), tiny.batch(FIRST)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    answer = first.sequences[0, len(FIRST) :].tolist()

    everything = tiny.Sample(*FIRST.parts, *turn)
    everything.ids[len(FIRST) : len(FIRST)] = answer
    past = first.past_key_values.get_seq_length()
    assert past == len(FIRST) + len(answer) - 1
    start = 0 if ids == "all ids" else past
    second = tiny.cut(everything, past, len(everything))
    second["input_ids"] = torch.tensor([everything.ids[start:]])
    second["mm_token_type_ids"] = tiny.batch(everything)["mm_token_type_ids"][:, start:]
    out = model.generate(**second, past_key_values=first.past_key_values, **GREEDY)
    assert new_tokens(out, second) == [greedy(model, everything)]


@both
@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunked_prefill_of_text(size, options):
    model, inputs = tiny.model(**options), tiny.batch(SAMPLES["text"])
    out = model.generate(**inputs, **GREEDY, prefill_chunk_size=size)
    assert new_tokens(out, inputs) == [greedy(model, SAMPLES["text"])]


def layout_of(sample, **options):
    inputs = {key: value for key, value in tiny.batch(sample).items() if "pixel" not in key}
    return tiny.model(**options).model.get_positions(**inputs)[1]


def test_chunks_end_between_spans_and_are_as_long_as_they_may_be():
    sample = tiny.Sample(3, ("image", 2, 2), 1, 9, ("video", 4, 2, 1), 5)  # spans at 4..7 and 20..27
    layout = layout_of(sample)
    with torch.device("meta"):  # as with torch.set_default_device
        assert chunk_sizes(layout, len(sample), 1000) == [len(sample)]
    assert chunk_sizes(layout, len(sample), 10) == [10, 10, 10, 4]
    assert chunk_sizes(layout, len(sample), 6) == [4, 6, 6, 4, 8, 6]
    assert chunk_sizes(layout, len(sample), 1) == [1] * 4 + [4] + [1] * 12 + [8] + [1] * 6
    assert chunk_sizes(None, 7, 3) == [3, 3, 1]
    assert chunk_sizes(layout_of(sample, max_span_frames=2), len(sample), 6) == [4, 6, 6, 4, 4, 6, 4]
    assert chunk_sizes(layout, len(sample), 10, "sequence") == [4, 24, 6]
    left = torch.nn.functional.pad(layout, (0, 0, 2, 0), value=-1)
    both = torch.cat([left, torch.nn.functional.pad(layout, (0, 0, 0, 2), value=-1)])
    assert chunk_sizes(both, len(sample) + 2, 5) == [4, 6, 5, 5, 10, 5, 1]


def test_prefill_holds_the_activations_of_one_chunk():
    """The longest input of any layer is a chunk, however long the prompt is."""
    model, sample, lengths = tiny.model(), tiny.Sample(100, ("image", 2, 3), 300), []
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    out = model.prefill(**tiny.batch(sample), chunk_size=32)
    assert max(lengths) == 32 and sum(lengths) == len(sample)
    expected = model(**tiny.batch(sample), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(out.logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids of shape \(1, 0\) hold no token"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"past_key_values": DynamicCache(config=tiny.text_config(num_hidden_layers=2))}, "with 2 layers"),
    ],
)
def test_prefill_refuses(how, message):
    with pytest.raises(ValueError, match=message):
        tiny.model().prefill(**{"input_ids": torch.tensor([[1, 2, 3]]), **how})


def test_chunked_prefill_without_a_cache_is_refused():
    inputs = tiny.batch(SAMPLES["text"])
    with pytest.raises(ValueError, match="prefill_chunk_size=4 needs a cache"):
        tiny.model().generate(**inputs, **GREEDY, prefill_chunk_size=4, use_cache=False)


def test_continuous_batching_is_refused():
    with pytest.raises(NotImplementedError, match="continuous batching pages keys and values"):
        tiny.model().init_continuous_batching()


def test_a_dynamic_cache_without_configuration_gets_its_layers():
    model, inputs = tiny.model(), tiny.batch(SAMPLES["image"])
    cache = DynamicCache()
    expected = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, expected)
    assert cache.get_seq_length() == len(SAMPLES["image"])


def test_positions_given_by_the_user_need_their_layout():
    model, sample = tiny.model(), SAMPLES["many"]
    inputs = tiny.batch(sample)
    positions, layout = model.model.get_positions(**{k: v for k, v in inputs.items() if "pixel" not in k})
    positions = torch.cat([torch.arange(len(sample)).expand(1, 1, -1), positions])
    with pytest.raises(ValueError, match="without image_grid_thw and video_grid_thw; pass these, or a vision_layout"):
        model.generate(**inputs, **GREEDY, position_ids=positions)
    out = model.generate(**inputs, **GREEDY, position_ids=positions, vision_layout=layout)
    assert new_tokens(out, inputs) == [greedy(model, sample)]


@pytest.mark.parametrize(
    "how",
    [{"prompt_lookup_num_tokens": 2}, {"assistant_model": True}, {"cache_implementation": "quantized"}],
    ids=str,
)
def test_what_a_recurrent_state_cannot_do_is_refused(how):
    model = tiny.model()
    if how.get("assistant_model"):
        how = {"assistant_model": tiny.model(num_hidden_layers=1)}
    with pytest.raises((ValueError, NotImplementedError)) as error:
        model.generate(**tiny.batch(SAMPLES["text"]), **GREEDY, **how)
    assert any(word in str(error.value) for word in ("stateful", "recurrent state", "support"))


def test_generate_from_embeddings():
    model, inputs = tiny.model(), tiny.batch(SAMPLES["text"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    assert out.tolist() == [greedy(model, SAMPLES["text"])]


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize("types", [True, False], ids=["types", "no types"])
def test_generate_from_embeddings_with_media(types, how):
    """Placeholders are known by their embeddings, too."""
    model, inputs = tiny.model(), tiny.batch(SAMPLES["many"])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    if not types:
        del inputs["mm_token_type_ids"]
    assert model.generate(**inputs, **GREEDY, **how).tolist() == [greedy(model, SAMPLES["many"])]
