"""Caches beyond one call: several turns, shared prefixes, other modes, chunks of padding, pickles."""

import copy
import pickle

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

from linmu_hf.modeling.compat import CACHE


KINDS = {
    "m_mate": ["m_mate"] * 4,
    "hybrid": ["full_attention", "m_mate"] * 2,
    "attention": ["full_attention"] * 4,
}
WORDS = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [60, 61, 62, 63], "max_new_tokens": 5}
NEW = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(params=KINDS)
def model(request):
    with torch.no_grad():
        yield tiny.model(layer_types=KINDS[request.param])


def recurrent(model):
    return "m_mate" in model.config.text_config.layer_types


def prefix(model, **batch):
    return model(**batch, use_cache=True)[CACHE]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ---- Chunks of a prefill


@pytest.mark.parametrize("chunk", [3, 7, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_of_a_padded_batch_with_a_static_cache(model, side, chunk):
    batch = tiny.batch(tiny.Sample(30), tiny.Sample(4, seed=3), padding=side)
    text = model.config.get_text_config()
    for cache in (DynamicCache(config=text), StaticCache(config=text, max_cache_len=40)):
        found = model.prefill(**batch, **{CACHE: cache}, chunk_size=chunk).logits[:, -1]
        real = slice(None) if side == "left" else slice(0, 1)  # the last column of the other row is padding
        assert_equal(found[real], model(**batch, use_cache=False).logits[real, -1])
    if side == "left":
        expected = model.generate(**batch, use_cache=False, **WORDS)
        found = model.generate(**batch, cache_implementation="static", prefill_chunk_size=chunk, **WORDS)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [4, 8])
def test_chunks_of_padding_alone(model, chunk):
    """Rows that are padded to a length far beyond the longest."""
    batch = tiny.batch(tiny.Sample(9), tiny.Sample(3, seed=1), padding="left", length=40)
    expected = model.generate(**batch, use_cache=False, **WORDS)
    assert torch.equal(model.generate(**batch, prefill_chunk_size=chunk, **WORDS), expected)
    right = tiny.batch(tiny.Sample(9), tiny.Sample(3, seed=1), padding="right", length=40)
    cache = model.prefill(**right, chunk_size=chunk)[CACHE]
    assert int(cache.get_seq_length()) == 40


def test_a_mask_that_hides_everything_is_refused(model):
    batch = tiny.batch(tiny.Sample(9))
    if recurrent(model):
        with pytest.raises(ValueError, match="hides all 9 new tokens"):
            model(**batch | {"attention_mask": torch.zeros(1, 9, dtype=torch.long)})


def test_chunks_give_the_hidden_states_of_the_last(model):
    ids = tiny.batch(tiny.Sample(10))["input_ids"]
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    whole = model.generate(input_ids=ids, **asked, **WORDS).hidden_states
    chunks = model.generate(input_ids=ids, prefill_chunk_size=4, **asked, **WORDS).hidden_states
    assert len(chunks) == len(whole) == 5 and len(chunks[0]) == len(whole[0]) == 5
    for ours, theirs in zip(chunks[0], whole[0], strict=True):
        assert_equal(ours, theirs[:, 8:])


# ---- Turns


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_turn_with_all_ids(model, chunk, mask):
    first = tiny.batch(tiny.Sample(12))
    ids = torch.cat([first["input_ids"], NEW], dim=1)
    given = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if mask else {})
    expected = model.generate(**given, use_cache=False, **WORDS)
    cache = prefix(model, **first)
    assert torch.equal(model.generate(**given, **{CACHE: cache}, prefill_chunk_size=chunk, **WORDS), expected)


def test_rows_that_ended_at_different_times(model):
    """`generate` goes on with padding after a row has ended, which the next turn hides: state has read it."""
    batch = tiny.batch(tiny.Sample(8), tiny.Sample(8, seed=1))
    cache = prefix(model, **batch)
    for _ in range(3):  # the second row has ended
        model(input_ids=torch.tensor([[5], [tiny.PAD]]), attention_mask=None, **{CACHE: cache})
    ids = torch.cat([batch["input_ids"], torch.tensor([[5] * 3, [tiny.PAD] * 3]), NEW.expand(2, -1)], dim=1)
    mask = torch.ones_like(ids)
    mask[1, 8:11] = 0
    turn = {"input_ids": ids, "attention_mask": mask}
    if recurrent(model):
        with pytest.raises(ValueError, match="hides 3 of the 11 tokens that row 1 of the cache has read, where 0"):
            model.generate(**turn, **{CACHE: copy.deepcopy(cache)}, **WORDS)
        with pytest.raises(ValueError, match="cannot forget them"):
            model(input_ids=NEW.expand(2, -1), attention_mask=mask, **{CACHE: cache})
        return
    alone = torch.cat([ids[1:, :8], NEW], dim=1)
    expected = model(input_ids=alone, use_cache=False).logits[0, -1]
    found = model(input_ids=NEW.expand(2, -1), attention_mask=mask, **{CACHE: copy.deepcopy(cache)}).logits[1, -1]
    assert_equal(found, expected)
    for _ in range(2):  # and once more
        answer = model.generate(**turn, **{CACHE: cache}, **WORDS)
        alone = model.generate(input_ids=alone, **WORDS)
        assert torch.equal(answer[1, -5:], alone[0, -5:])
        turn = {"input_ids": torch.cat([answer, NEW.expand(2, -1)], dim=1)}
        turn["attention_mask"] = torch.nn.functional.pad(
            mask, (0, turn["input_ids"].shape[1] - mask.shape[1]), value=1
        )
        alone = torch.cat([alone, NEW], dim=1)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_that_was_hidden_before_may_stay_hidden(model, padding):
    batch = tiny.batch(tiny.Sample(8), tiny.Sample(5, seed=1), padding=padding)
    cache = prefix(model, **batch)
    steps = torch.tensor([[1], [0]])  # a step that the second row has no part in
    mask = torch.cat([batch["attention_mask"], steps], dim=1)
    model(input_ids=torch.tensor([[7], [tiny.PAD]]), attention_mask=mask, **{CACHE: cache})
    mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
    found = model(input_ids=NEW.expand(2, -1), attention_mask=mask, **{CACHE: cache}).logits[:, -1]
    real = batch["attention_mask"].bool()
    for row, extra in ((0, [7]), (1, [])):
        ids = torch.cat([batch["input_ids"][row][real[row]], torch.tensor(extra, dtype=torch.long), NEW[0]])
        assert_equal(found[row], model(input_ids=ids[None], use_cache=False).logits[0, -1])


def test_beams_on_a_prefix_that_was_repeated_before(model):
    first = tiny.batch(tiny.Sample(12))
    ids = torch.cat([first["input_ids"], NEW], dim=1)
    cache = prefix(model, **first)
    cache.batch_repeat_interleave(3)
    expected = model.generate(input_ids=ids, use_cache=False, num_beams=3, **WORDS)
    assert torch.equal(model.generate(input_ids=ids, **{CACHE: cache}, num_beams=3, **WORDS), expected)


# ---- Modes and pickles


def go_on_outside_inference_mode(model, cache=None):
    first = tiny.batch(tiny.Sample(12))
    ids = torch.cat([first["input_ids"], NEW], dim=1)
    with torch.inference_mode():
        cache = model(**first, use_cache=True, **{CACHE: cache})[CACHE]
    expected = model.generate(input_ids=ids, use_cache=False, **WORDS)
    assert torch.equal(model.generate(input_ids=ids, **{CACHE: cache}, **WORDS), expected)


def test_a_cache_of_inference_mode_goes_on_outside(model):
    go_on_outside_inference_mode(model)


@torch.no_grad()
def test_a_static_cache_of_inference_mode_goes_on_outside():
    """Of M-MATE layers: static keys and values are Transformers' own."""
    model = tiny.model()
    go_on_outside_inference_mode(model, StaticCache(config=model.config.get_text_config(), max_cache_len=40))


def test_a_cache_goes_through_a_pickle(model):
    first = tiny.batch(tiny.Sample(12))
    ids = torch.cat([first["input_ids"], NEW], dim=1)
    cache = pickle.loads(pickle.dumps(prefix(model, **first)))
    expected = model.generate(input_ids=ids, use_cache=False, **WORDS)
    for one in (copy.deepcopy(cache), cache):
        assert torch.equal(model.generate(input_ids=ids, **{CACHE: one}, **WORDS), expected)


# ---- Packed rows


def test_sequences_begin_where_positions_do_not_go_on(model):
    samples = tiny.Sample(7), tiny.Sample(5, seed=1)
    ids = torch.tensor([samples[0].ids + samples[1].ids])
    expected = torch.cat([model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0] for one in samples])
    for first in (0, 1, 9):  # a collator may count from 1, or from anywhere
        positions = torch.tensor([[*range(first, first + 7), *range(first, first + 5)]])
        found = model(input_ids=ids, position_ids=positions.expand(4, 1, -1), use_cache=False).logits[0]
        # rotary frequencies are float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 if first == 0 else 1e-5)


def test_packed_rows_of_a_larger_batch(model):
    samples = tiny.Sample(7), tiny.Sample(5, seed=1), tiny.Sample(12, seed=2)
    ids = torch.tensor([samples[0].ids + samples[1].ids, samples[2].ids])
    positions = torch.tensor([[*range(7), *range(5)], [*range(12)]]).expand(4, 2, -1)
    if recurrent(model):
        with pytest.raises(ValueError, match="position_ids of row 0 of 2 begin anew inside it"):
            model(input_ids=ids, position_ids=positions, use_cache=False)
        return
    found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    expected = torch.cat([model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0] for one in samples[:2]])
    assert_equal(found, expected)
