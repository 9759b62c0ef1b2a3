import pytest
import torch

from linmu_hf.data import encode_rows
from linmu_hf.distillation.rows.collator import DistillCollator, EncodedDataset, encode_row


pytestmark = pytest.mark.core_training


@pytest.mark.parametrize("indices", [range(10), [0, 1, 3], [2, 5], [4]])
def test_rows_encoded_one_by_one_equal_the_batch(processor, rows, indices):
    dataset = EncodedDataset(processor, rows)
    batch = DistillCollator(processor.tokenizer.pad_token_id)([dataset[i] for i in indices])
    expected = encode_rows(processor, [rows[i] for i in indices])
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], torch.as_tensor(value), check_dtype=False)


def test_cache_keeps_what_fits(processor, rows, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "linmu_hf.distillation.rows.collator.encode_rows", lambda *args: calls.append(1) or encode_rows(*args)
    )
    size = sum(value.nbytes for value in EncodedDataset(processor, rows)[0]["row"].values())
    dataset = EncodedDataset(processor, [rows[0]] * 3, cache_bytes=2 * size)
    calls.clear()
    for _ in range(2):
        for index in range(3):
            dataset[index]
    assert len(calls) == 4  # the third row does not fit


def test_pseudo_targets_share_the_rows_that_agree(processor, rows):
    changed = [dict(message) for message in rows[1]["messages"]]
    changed[-1]["content"] = [{"type": "text", "text": "blue"}]

    def encode_pseudo(row, index):
        return encode_row(processor, {**row, "messages": changed} if index == 1 else row)

    dataset = EncodedDataset(processor, rows[:3], encode_pseudo)
    batch = DistillCollator(processor.tokenizer.pad_token_id, pseudo=True)([dataset[i] for i in range(3)])
    assert batch["input_ids"].shape[0] == 4
    labels, pseudo_labels = batch["labels"], batch["pseudo_labels"]
    assert torch.equal(labels[[0, 2]], pseudo_labels[[0, 2]])
    assert (pseudo_labels[1] == -100).all() and (labels[3] == -100).all()
    answer = processor.tokenizer.decode(pseudo_labels[3][pseudo_labels[3] != -100])
    assert answer.endswith("blue<|im_end|>") and "blue" not in processor.tokenizer.decode(batch["input_ids"][1])


def test_the_same_tokens_with_other_labels_are_a_row_of_their_own(processor, rows):
    """An answer cut at its last word equals the truth but for the end that was not said."""

    def encode_pseudo(row, index):
        features = encode_row(processor, row)
        last = (features["labels"] != -100).nonzero()[-1]
        return {**features, "labels": features["labels"].index_fill(0, last, -100)}

    item = EncodedDataset(processor, rows[:1], encode_pseudo)[0]
    assert torch.equal(item["pseudo"]["input_ids"], item["row"]["input_ids"])
    batch = DistillCollator(processor.tokenizer.pad_token_id, pseudo=True)([item])
    counts = [(batch[key] != -100).sum(1).tolist() for key in ("labels", "pseudo_labels")]
    assert counts[0][1] == counts[1][0] == 0 and counts[1][1] == counts[0][0] - 1 > 0


def test_a_bad_row_is_named(processor, rows):
    bad = {**rows[0], "images": []}
    with pytest.raises(ValueError, match=r"row 1 .*asks for 1 images"):
        EncodedDataset(processor, [rows[0], bad])[1]
