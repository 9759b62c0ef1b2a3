"""Packs and buckets hold every row once; packed rows cost what padded ones do and do not see each other."""

import pytest
import torch

from linmu_hf.distillation.rows.collator import DistillCollator, EncodedDataset, encode_row
from linmu_hf.distillation.rows.packing import LengthBuckets, PackedDataset, PackedStream, arrange
from linmu_hf.distillation.rows.stream import EncodedStream


pytestmark = pytest.mark.core_training


@pytest.fixture(scope="module")
def timed_rows(rows):
    """The rows, the clips at rates of their own."""
    return [{**row, "fps": [0.5, 4.0][i % 2]} if row["videos"] else row for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def items(processor, timed_rows):
    dataset = EncodedDataset(processor, timed_rows)
    return [dataset[i] for i in range(len(dataset))]


def batches(processor, items, pseudo=False):
    pad = processor.tokenizer.pad_token_id
    return [DistillCollator(pad, pseudo, packing)(items) for packing in (False, True)]


def loss_and_gradients(model, batch):
    model.zero_grad()
    output = model(**batch, use_cache=False)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chosen", [range(6), [2, 5], [4]])
@pytest.mark.parametrize("keep_attention", [(), (1,)])
def test_packed_equals_padded(processor, items, make_student, chosen, keep_attention):
    model = make_student(keep_attention)
    padded, packed = batches(processor, [items[i] for i in chosen])
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum())) and "attention_mask" not in packed
    (one, gradients), (other, packed_gradients) = (loss_and_gradients(model, batch) for batch in (padded, packed))
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-5, atol=1e-6)
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(other.logits[0], one.logits[real], rtol=1e-4, atol=1e-4)
    assert gradients.keys() == packed_gradients.keys() and gradients
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name)


def test_packed_rows_do_not_see_each_other(processor, items, make_student):
    model = make_student()
    changed = {"row": dict(items[1]["row"])}
    changed["row"]["input_ids"] = changed["row"]["input_ids"].clone()
    text = (changed["row"]["mm_token_type_ids"] == 0).nonzero()[:3].flatten()
    changed["row"]["input_ids"][text] += 1
    changed["row"]["pixel_values"] = changed["row"]["pixel_values"] + 1.0
    with torch.no_grad():
        before, after = (
            model(**batches(processor, [items[0], middle, items[2]])[1], use_cache=False).logits[0]
            for middle in (items[1], changed)
        )
    starts = batches(processor, items[:3])[1]["cu_seq_lens_q"].tolist()
    moved = (before - after).abs().amax(-1) > 0
    assert not moved[: starts[1]].any() and not moved[starts[2] :].any() and moved[starts[1] : starts[2]].any()


def test_no_label_comes_from_the_row_before(processor, items):
    first = {**items[0]["row"], "labels": items[0]["row"]["input_ids"].clone()}  # even the first token has one
    packed = batches(processor, [{"row": first}] * 3)[1]
    assert (packed["labels"][0, packed["cu_seq_lens_q"][:-1].long()] == -100).all()


def test_pseudo_targets_are_packed(processor, rows, items):
    changed = [dict(message) for message in rows[1]["messages"]]
    changed[-1]["content"] = [{"type": "text", "text": "blue"}]
    pseudo = encode_row(processor, {**rows[1], "messages": changed})
    pair = [items[0], {**items[1], "pseudo": pseudo}]
    padded, packed = batches(processor, pair, pseudo=True)
    real = padded["attention_mask"].bool()
    for key in ("input_ids", "labels", "pseudo_labels"):
        assert torch.equal(packed[key][0], padded[key][real])
    assert len(packed["cu_seq_lens_q"]) == 4


def test_top_k_is_packed(items, processor):
    with_topk = {"row": {**items[0]["row"], "topk_ids": torch.ones(len(items[0]["row"]["input_ids"]), 2)}}
    padded, packed = batches(processor, [with_topk, items[1]])
    real = padded["attention_mask"].bool()
    assert torch.equal(packed["topk_ids"][0], padded["topk_ids"][real])


@pytest.mark.parametrize("max_length", [1, 60, 150, 10_000])
def test_packs_hold_every_row_once(processor, rows, max_length):
    features = EncodedDataset(processor, rows)
    packs = PackedDataset(features, max_length, seed=1)
    lengths = features.lengths()
    assert lengths == [len(features[i]["row"]["input_ids"]) for i in range(len(rows))]
    assert sorted(row for pack in packs.packs for row in pack) == list(range(len(rows)))
    assert all(len(pack) == 1 or sum(lengths[row] for row in pack) <= max_length for pack in packs.packs)
    assert packs.packs == PackedDataset(features, max_length, seed=1).packs
    batch = DistillCollator(0, packing=True)([packs[0]])
    assert (batch["cu_seq_lens_q"].diff() == torch.tensor([lengths[row] for row in packs.packs[0]])).all()


def test_packs_of_a_stream(processor, rows):
    stream = EncodedStream(processor, rows)
    packs = iter(PackedStream(stream, 150))
    seen = [next(packs) for _ in range(60)]
    numbers = [row.number for pack in seen for row in pack]
    times = [numbers.count(i) for i in range(10)]
    assert min(times) > 5 and max(times) - min(times) <= 5  # as many rows as open packs may hold are to come
    for pack in seen[:12]:
        assert len(pack) == 1 or sum(row.count_tokens() for row in pack) <= 150
        batch = DistillCollator(0, packing=True)([pack])
        assert batch["input_ids"].shape[1] == sum(row.count_tokens() for row in pack)


def test_buckets_hold_every_row_once_and_pad_little():
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (4003,), generator=random).tolist()
    sampler = LengthBuckets(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(4003)) and order == list(LengthBuckets(lengths, 8, seed=3))

    def padding(order):
        parts = [[lengths[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(part) * len(part) - sum(part) for part in parts) / sum(lengths)

    assert padding(order) < 0.05 < 0.4 < padding(range(4003))
    sampler.set_epoch(1)
    assert list(sampler) != order and sorted(sampler) == list(range(4003))


def test_arrange(processor, rows):
    features, stream = EncodedDataset(processor, rows), EncodedStream(processor, rows)
    assert arrange(features, 0)[0] is features and not arrange(features, 0)[1].packing
    packed, collator = arrange(features, 0, packing=True, max_length=150, seed=4)
    assert isinstance(packed, PackedDataset) and collator.packing
    streamed, _ = arrange(stream, 0, packing=True, max_length=150, batch_size=3, seed=4)
    assert isinstance(streamed, PackedStream) and (stream.batch_size, stream.seed) == (3, 4)
    assert arrange(stream, 0, packing=True)[0] is stream
