"""What `generate` offers, beside `tests/modeling/test_generation.py`: in place of `GenerationTesterMixin`"""

import pytest
import torch
from testers import EOS, FIRST_WORD, VisionTextTester
from transformers import LogitsProcessor, LogitsProcessorList, set_seed

from linmu_hf import LinMUForConditionalGeneration


NEW = 4
LAYERS = {
    "m_mate": ("m_mate", "m_mate"),
    "hybrid": ("full_attention", "m_mate"),
    "teacher": ("full_attention", "full_attention"),
}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beam": {"num_beams": 3},
    "beam sample": {"num_beams": 3, "do_sample": True},
}


class WordsOnly(LogitsProcessor):
    """Draws no placeholder: it would mean an image that is not there."""

    def __call__(self, input_ids, scores):
        scores[:, EOS + 1 : FIRST_WORD] = -torch.inf
        return scores


@pytest.fixture(scope="module", params=LAYERS)
def case(request):
    set_seed(0)
    config, inputs = VisionTextTester(None, LAYERS[request.param]).prepare_config_and_inputs_for_common()
    return LinMUForConditionalGeneration(config).eval(), inputs


def generate(case, **options):
    model, inputs = case
    set_seed(1)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, logits_processor=LogitsProcessorList([WordsOnly()]), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_outputs(case, mode, use_cache):
    """Scores, logits and hidden states of each new token, in the shapes that Transformers documents."""
    model, inputs = case
    out = generate(
        case, **MODES[mode], use_cache=use_cache, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    b, t = inputs["input_ids"].shape
    rows = b * MODES[mode].get("num_beams", 1)
    assert out.sequences.shape == (b, t + NEW)
    assert torch.equal(out.sequences[:, :t], inputs["input_ids"])
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert {tuple(one.shape) for one in (*out.scores, *out.logits)} == {(rows, model.config.text_config.vocab_size)}
    for step, states in enumerate(out.hidden_states):
        read = t + step if not use_cache else t if step == 0 else 1
        assert {tuple(one.shape) for one in states} == {(rows, read, 32)} and len(states) == 3
    assert (out.past_key_values is not None) == use_cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_caches_agree(case, mode, implementation):
    attention = "full_attention" in case[0].config.text_config.layer_types
    if implementation == "offloaded" and attention and not torch.cuda.is_available():
        pytest.skip("Transformers offloads keys and values through a CUDA stream; LinMU's own layers are tested")
    expected = generate(case, **MODES[mode])
    assert torch.equal(generate(case, **MODES[mode], cache_implementation=implementation), expected)


@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_cache_agree(case, mode):
    torch.testing.assert_close(generate(case, **MODES[mode], use_cache=False), generate(case, **MODES[mode]))


def test_attentions_of_the_layers_that_have_them(case):
    model, inputs = case
    model.set_attn_implementation("eager")
    out = generate(case, return_dict_in_generate=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    b, t = inputs["input_ids"].shape
    attention = model.config.text_config.layer_types.count("full_attention")
    for step, weights in enumerate(out.attentions):
        assert len(weights) == attention
        assert {tuple(one.shape) for one in weights} <= {(b, 4, t if step == 0 else 1, t + step)}


def test_scores_are_those_of_the_sequence(case):
    model, inputs = case
    out = generate(case, return_dict_in_generate=True, output_scores=True)
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    full = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    full.pop("mm_token_type_ids")
    t = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**full).logits[:, t - 1 : -1]
    logits[..., EOS] = logits[..., EOS + 1 : FIRST_WORD] = -torch.inf  # EOS: min_new_tokens
    expected = logits.log_softmax(-1).gather(2, out.sequences[:, t:, None])[..., 0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, {"penalty_alpha": 0.6, "top_k": 4}],
    ids=str,
)
def test_what_transformers_moved_to_the_hub_says_so(case, mode):
    """Group beams and contrastive search are no longer part of `generate`, for any model."""
    with pytest.raises((ValueError, OSError), match=r"transformers-community|trust_remote_code"):
        generate(case, **mode)
