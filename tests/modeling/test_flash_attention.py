"""Kernels that take no mask, in layers with full attention and in windows; stand-ins keep to their contracts."""

import pytest
import tiny
import torch
import varlen_kernels
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from linmu_hf.modeling.mixers import attention as varlen
from linmu_hf.ops.attention import window as window_attention


NAME = "flash_stand_in"
SAMPLES = tiny.Sample(3, ("image", 2, 2), 2), tiny.Sample(5, ("image", 2, 3), 4), tiny.Sample(9)


def attend(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention within the rows of a batch or, with bounds given, within the sequences of one row."""
    b, _, t, _ = query.shape
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attention_mask is not None:
        assert attention_mask.shape == (b, key.shape[2])
        bounds = None
    else:
        bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        mask = torch.ones(t, key.shape[2], dtype=torch.bool).tril(key.shape[2] - t)
        if attention_mask is not None:
            # a query that is padding sees itself, which nobody reads
            mask = (mask & attention_mask.bool()[:, None]) | torch.eye(key.shape[2], dtype=torch.bool)[-t:]
            mask = mask[:, None]
    else:
        assert b == 1 and bounds.dtype == kwargs["cu_seq_lens_k"].dtype == torch.int32
        lengths = bounds.diff()
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == lengths.max()
        mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths.tolist())).bool()
    y = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return y.transpose(1, 2), None


@pytest.fixture(params=[["m_mate", "full_attention"], ["full_attention"] * 2], ids=["hybrid", "teacher"])
def model(request, monkeypatch):
    for interface, function in ((AttentionInterface, attend), (AttentionMaskInterface, flash_attention_mask)):
        monkeypatch.setitem(interface._global_mapping, NAME, function)
    model = tiny.model(layer_types=request.param, num_hidden_layers=2)
    model.config.get_text_config()._attn_implementation = NAME
    return model


def alone(model, sample):
    model.config.get_text_config()._attn_implementation = "sdpa"
    logits = model(**tiny.batch(sample)).logits[0]
    model.config.get_text_config()._attn_implementation = NAME
    return logits


def packed(told: str):
    """The samples in one row, and their lengths."""
    row = {key: value for key, value in tiny.batch(*SAMPLES).items() if "pixel" in key or "grid" in key}
    row["input_ids"] = torch.tensor([[i for sample in SAMPLES for i in sample.ids]])
    lengths = [len(sample) for sample in SAMPLES]
    if told == "bounds":
        row["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).int()
    else:
        row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return row, lengths


@pytest.mark.parametrize("told", ["bounds", "positions"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model, told):
    row, lengths = packed(told)
    for logits, sample in zip(model(**row).logits[0].split(lengths), SAMPLES):
        torch.testing.assert_close(logits, alone(model, sample))


@pytest.mark.parametrize("told", ["bounds", "positions"])
def test_packed_rows_without_a_mask(model, monkeypatch, told):
    """`attn_implementation="torch_varlen"`, which has nothing to do with rows of a batch."""
    calls = varlen_kernels.install(monkeypatch, "torch_varlen")
    monkeypatch.setattr(varlen, "why_unfit", lambda name, q: None)
    model.set_attn_implementation("torch_varlen")
    row, lengths = packed(told)
    layers = model.config.get_text_config().layer_types.count("full_attention")
    for logits, sample in zip(model(**row).logits[0].split(lengths), SAMPLES):
        torch.testing.assert_close(logits, model(**tiny.batch(sample)).logits[0])
    assert [shape[0] for shape in calls] == [sum(lengths)] * layers


def test_what_the_kernel_cannot_take_is_refused(model):
    pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later has it")
    model.set_attn_implementation("torch_varlen")
    with pytest.raises(ValueError, match=r"'torch_varlen' cannot read a packed row: x is torch\.float64, and"):
        model(**packed("bounds")[0])


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen"])
@torch.no_grad()
def test_windows_in_one_call(monkeypatch, backend):
    model = tiny.model(num_hidden_layers=2)
    inputs = tiny.batch(*SAMPLES, tiny.Sample(2, ("video", 5, 3, 4), 3), padding="left")
    expected = model(**inputs).logits
    calls = varlen_kernels.install(monkeypatch, backend)
    monkeypatch.setattr(window_attention, "choose_window_backend", lambda q: backend)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_padded_rows(model, padding):
    inputs = tiny.batch(*SAMPLES, padding=padding)
    logits = model(**inputs).logits
    for row, mask, sample in zip(logits, inputs["attention_mask"].bool(), SAMPLES):
        torch.testing.assert_close(row[mask], alone(model, sample))


def test_greedy_tokens(model):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    inputs = tiny.batch(*SAMPLES, padding="left")
    tokens = model.generate(**inputs, **options)
    model.config.get_text_config()._attn_implementation = "sdpa"
    assert torch.equal(tokens, model.generate(**inputs, **options))
