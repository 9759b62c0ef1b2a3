import pytest
import torch

from linmu_hf.data import encode_rows
from linmu_hf.distillation.collator import DistillCollator, EncodedDataset


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
        "linmu_hf.distillation.collator.encode_rows", lambda *args: calls.append(1) or encode_rows(*args)
    )
    size = sum(value.nbytes for value in EncodedDataset(processor, rows)[0]["row"].values())
    dataset = EncodedDataset(processor, [rows[0]] * 3, cache_bytes=2 * size)
    calls.clear()
    for _ in range(2):
        for index in range(3):
            dataset[index]
    assert len(calls) == 4  # the third row does not fit


def test_pseudo_targets_share_the_rows_that_agree(processor, rows):
    pseudo = [row["messages"] for row in rows[:3]]
    changed = [dict(message) for message in pseudo[1]]
    changed[-1]["content"] = [{"type": "text", "text": "blue"}]
    dataset = EncodedDataset(processor, rows[:3], [pseudo[0], changed, pseudo[2]])
    batch = DistillCollator(processor.tokenizer.pad_token_id, pseudo=True)([dataset[i] for i in range(3)])
    assert batch["input_ids"].shape[0] == 4
    labels, pseudo_labels = batch["labels"], batch["pseudo_labels"]
    assert torch.equal(labels[[0, 2]], pseudo_labels[[0, 2]])
    assert (pseudo_labels[1] == -100).all() and (labels[3] == -100).all()
    answer = processor.tokenizer.decode(pseudo_labels[3][pseudo_labels[3] != -100])
    assert answer.endswith("blue<|im_end|>") and "blue" not in processor.tokenizer.decode(batch["input_ids"][1])


def test_a_bad_row_is_named(processor, rows):
    bad = {**rows[0], "images": []}
    with pytest.raises(ValueError, match=r"row 1 .*asks for 1 images"):
        EncodedDataset(processor, [rows[0], bad])[1]
