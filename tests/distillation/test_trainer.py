import copy
import warnings

import pytest
import torch

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.distillation.config import DistillConfig
from linmu_hf.distillation.lora import add_lora
from linmu_hf.distillation.losses import IGNORE_INDEX, hidden_loss, squared_errors
from linmu_hf.distillation.rows.collator import EncodedDataset, encode_row
from linmu_hf.distillation.stages import FLEX, LORA, SWIN, Stage, set_trainable
from linmu_hf.distillation.teacher import SeparateTeacher, SharedTeacher
from linmu_hf.distillation.trainer import DistillTrainer
from linmu_hf.modeling import decoder
from linmu_hf.modeling.compat import checkpoint_activations
from linmu_hf.modeling.layout.prompt import Prompt


pytestmark = pytest.mark.core_training


def stage(**changes):
    values = {"name": "stage", "trains": (FLEX, SWIN), "max_steps": 2, "learning_rate": 1e-3, "hid": 0.5, "tok": 0.5}
    return Stage(**values | changes)


@pytest.fixture
def make_trainer(tmp_path, processor, rows, make_student, make_teacher):
    def make(stage, student=None, teacher=None, pseudo=None, **arguments):
        values = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, **values | arguments)
        student = student or make_student()
        if stage.lora_r:
            add_lora(student, stage.lora_r, stage.alpha())
        set_trainable(student, stage)
        encode_pseudo = pseudo and (lambda row, index: encode_row(processor, {**row, "messages": pseudo[index]}))
        dataset = EncodedDataset(processor, rows, encode_pseudo)
        return DistillTrainer(student, teacher or make_teacher(), config, stage, dataset)

    return make


def batch_of(trainer, indices):
    return trainer.data_collator([trainer.train_dataset[index] for index in indices])


def gradients(trainer, batches):
    """Gradients of one optimizer step over `batches` as micro-batches."""
    trainer.model.zero_grad()
    trainer.model.train()
    counts = trainer._get_num_items_in_batch(batches, "cpu")
    for batch in batches:
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts).backward()
    return {n: p.grad.clone() for n, p in trainer.student.named_parameters() if p.grad is not None}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_loss_equals_the_naive_formulas(make_trainer, rows):
    pseudo = [copy.deepcopy(row["messages"]) for row in rows]
    pseudo[1][-1]["content"] = "many more"
    weights = {"hid": 0.3, "tok": 0.5, "seq": 0.7, "sup": 0.9}
    trainer = make_trainer(stage(**weights), pseudo=pseudo, temperature=2.0)
    student, teacher = trainer.student.eval(), trainer.teacher.as_model()
    batch = batch_of(trainer, range(4))
    labels, pseudo_labels = batch["labels"], batch["pseudo_labels"]
    inputs = {key: value for key, value in batch.items() if "labels" not in key}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        s, t = (model(**inputs, output_mixer_states=True) for model in (student, teacher))

    def at(logits, targets):
        shifted = targets[:, 1:]
        return logits[:, :-1][shifted != IGNORE_INDEX], shifted[shifted != IGNORE_INDEX]

    mask = batch["attention_mask"]
    hid = hidden_loss(squared_errors(s.mixer_outputs, t.mixer_outputs, mask)[0], mask.sum())
    (s_logits, truth), (t_logits, _) = at(s.logits, labels), at(t.logits, labels)
    p_t, p_s = (torch.softmax(logits / 2, -1) for logits in (t_logits, s_logits))
    tok = 4 * (p_t * (p_t.log() - p_s.log())).sum(-1).mean()
    seq = torch.nn.functional.cross_entropy(*at(s.logits, pseudo_labels))
    sup = torch.nn.functional.cross_entropy(s_logits, truth)
    torch.testing.assert_close(loss, 0.3 * hid + 0.5 * tok + 0.7 * seq + 0.9 * sup, rtol=1e-4, atol=1e-5)


def spoil_vision(teacher):
    with torch.no_grad():
        next(teacher.model.visual.parameters()).add_(0.1)
    return teacher


VALUES = {
    "student-fed": {"sup": 0.3},
    "teacher-fed": {"tok": 0.0, "hidden_input": "teacher"},
    "lora": {"trains": (FLEX, SWIN, LORA), "lora_r": 2},
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("kept", [(), (1,)], ids=["all", "hybrid"])
def test_shared_and_separate_teachers_are_equal(make_trainer, make_student, values, kept):
    """Losses, errors and gradients, adapters in place; and one copy of the backbone in place of two."""
    found = []
    for shared in (True, False):
        student = make_student(keep_attention=kept)
        trainer = make_trainer(stage(**values), student=student, shared_teacher=shared)
        assert isinstance(trainer.teacher, SharedTeacher) == shared
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        batch = batch_of(trainer, range(6))
        _, sums = trainer.model(dict(batch), trainer._count([batch]), True)
        owned = sum(p.numel() for p in trainer.model.parameters())
        found.append((sums, gradients(trainer, [batch]), owned, sum(p.numel() for p in student.parameters())))
    (sums, grads, owned, own), (separate_sums, separate_grads, separate_owned, _) = found
    assert sums.keys() >= {"hid", "errors", "energies"}
    assert_same(sums, separate_sums, rtol=1e-5, atol=1e-6)
    assert_same(grads, separate_grads, rtol=1e-4, atol=1e-6)
    assert owned - own < 0.2 * (separate_owned - own)


def test_a_shared_teacher_as_a_model_answers_like_the_one_it_came_from(make_trainer, make_teacher):
    trainer, teacher = make_trainer(stage()), make_teacher()
    batch = {key: value for key, value in batch_of(trainer, range(6)).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(trainer.teacher.as_model()(**batch).logits, teacher(**batch).logits)
    prompt = {key: value[:1] if key in ("input_ids", "attention_mask") else value for key, value in batch.items()}
    prompt = {"input_ids": prompt["input_ids"][:, :1], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(trainer.teacher.as_model().generate(**prompt), teacher.generate(**prompt))


def test_a_teacher_with_a_backbone_of_its_own_is_kept_apart(make_trainer, make_teacher):
    teacher = spoil_vision(make_teacher())
    trainer = make_trainer(stage(), teacher=teacher)
    assert isinstance(trainer.teacher, SeparateTeacher) and not trainer.teacher.shares_vision
    with pytest.raises(ValueError, match=r"shared_teacher=True, but the weights model\.visual\..* differ"):
        make_trainer(stage(), teacher=teacher, shared_teacher=True)


def test_vision_features_serve_both_only_if_the_towers_are_equal(make_trainer, make_teacher):
    trainer = make_trainer(stage(), shared_teacher=False)
    assert trainer.teacher.shares_vision
    batch = batch_of(trainer, range(6))
    with torch.no_grad():
        one = trainer.compute_loss(trainer.model, dict(batch))
        trainer.teacher.shares_vision = False
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), one)
        spoil_vision(trainer.teacher.model)
        assert not torch.allclose(trainer.compute_loss(trainer.model, dict(batch)), one)


@pytest.mark.parametrize("shared", [True, False])
def test_a_padded_teacher_needs_no_square_mask(make_trainer, monkeypatch, shared):
    """And what it says about the real tokens is the same."""
    trainer = make_trainer(stage(), shared_teacher=shared)
    batch = batch_of(trainer, range(6))
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        masks, make_mask = [], decoder.create_causal_mask
        monkeypatch.setattr(decoder, "create_causal_mask", lambda **kw: masks.append(make_mask(**kw)) or masks[-1])
        loss = trainer.compute_loss(trainer.model, dict(batch))
        assert masks == [None]
        if shared:
            return
        trainer.teacher.is_causal = False
        masked = trainer.compute_loss(trainer.model, dict(batch))
    assert masks[1].shape[-2:] == (batch["input_ids"].shape[1],) * 2
    torch.testing.assert_close(loss, masked)


def test_gradient_accumulation_changes_nothing(make_trainer):
    trainer = make_trainer(stage(sup=0.5))
    whole = gradients(trainer, [batch_of(trainer, range(6))])
    parts = gradients(trainer, [batch_of(trainer, [0]), batch_of(trainer, [1, 2]), batch_of(trainer, [3, 4, 5])])
    assert_same(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "steps"), [(2, 3), (1, 6)])
def test_accumulated_steps_make_the_update_of_one_batch(make_trainer, batch_size, steps):
    """Rows of different label counts, through the Trainer's own loop: what the optimizer is given must agree."""

    def update(batch_size, steps):
        trainer = make_trainer(
            stage(max_steps=1, sup=0.5, learning_rate=1.0),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
        )
        before = {name: p.detach().clone() for name, p in trainer.student.named_parameters() if p.requires_grad}
        trainer.train()
        after = dict(trainer.student.named_parameters())
        return {name: after[name].detach() - value for name, value in before.items()}, trainer.state.log_history[0]

    (whole, logged), (parts, parts_logged) = update(6, 1), update(batch_size, steps)
    assert_same(parts, whole, rtol=2e-3, atol=2e-5)
    for key in ("loss", "loss_hid", "loss_tok", "loss_sup"):
        assert parts_logged[key] == pytest.approx(logged[key], rel=1e-3)


def test_a_step_changes_what_trains_and_nothing_else(make_trainer):
    trainer = make_trainer(stage(trains=(FLEX,)))
    student = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    teacher = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    assert teacher
    trainer.train()
    changed = {name for name, value in trainer.student.state_dict().items() if not torch.equal(value, student[name])}
    assert changed and all(".mixer." in name and ".local_swin." not in name for name in changed)
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert not trainer.teacher.training


def test_teacher_fed_mixers_alone_get_gradients(make_trainer):
    trainer = make_trainer(stage(tok=0.0, hidden_input="teacher"))
    trainer.student.requires_grad_(True)
    found = gradients(trainer, [batch_of(trainer, range(6))])
    assert found and all(".mixer." in name for name in found)
    assert set(found) >= {n for n, p in trainer.student.named_parameters() if "flex_ma" in n}
    # Each block sees the teacher's input: spoiling an earlier block leaves the later ones' gradients alone.
    with torch.no_grad():
        trainer.student.model.language_model.layers[0].mixer.flex_ma.o_proj.weight.mul_(3)
    spoiled = gradients(trainer, [batch_of(trainer, range(6))])
    assert_same(*({n: g for n, g in each.items() if ".layers.2." in n} for each in (found, spoiled)))


def test_student_fed_later_mixers_depend_on_earlier_ones(make_trainer):
    trainer = make_trainer(stage())
    before = gradients(trainer, [batch_of(trainer, range(6))])
    with torch.no_grad():
        trainer.student.model.language_model.layers[0].mixer.flex_ma.o_proj.weight.mul_(3)
    after = gradients(trainer, [batch_of(trainer, range(6))])
    name = "model.language_model.layers.2.mixer.flex_ma.o_proj.weight"
    assert not torch.allclose(before[name], after[name])


CHECKPOINTING = f"{'activation' if hasattr(DistillConfig, 'activation_checkpointing') else 'gradient'}_checkpointing"


def test_checkpoints_are_asked_for_by_their_newest_name(make_trainer):
    trainer = make_trainer(stage(trains=(FLEX,)), **{CHECKPOINTING: True})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*checkpointing", FutureWarning)
        trainer.train()
    assert trainer.student.model.language_model.gradient_checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(make_trainer, reentrant):
    values = stage(trains=(FLEX, SWIN, LORA), sup=0.5, lora_r=2)
    trainer = make_trainer(values)
    plain = gradients(trainer, [batch_of(trainer, range(4))])
    torch.manual_seed(0)
    kwargs = {"use_reentrant": reentrant}
    other = make_trainer(values, **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": kwargs})
    other.student.load_state_dict(trainer.student.state_dict())
    checkpoint_activations(other.student, True, kwargs)
    checkpointed = gradients(other, [batch_of(other, range(4))])
    assert_same(checkpointed, plain, rtol=1e-4, atol=1e-6)


def test_logs_every_term_and_layer(make_trainer):
    trainer = make_trainer(stage(sup=0.25))
    trainer.train()
    row = trainer.state.log_history[0]
    weighted = 0.5 * row["loss_hid"] + 0.5 * row["loss_tok"] + 0.25 * row["loss_sup"]
    assert row["loss"] == pytest.approx(weighted, rel=1e-4)
    layers = [row[f"relative_error_layer_{index}"] for index in range(3)]
    assert row["relative_error"] == pytest.approx(sum(layers) / 3)
    assert 0 <= row["agreement"] <= 1


def test_the_last_steps_are_logged_though_they_fill_no_window(make_trainer):
    trainer = make_trainer(stage(max_steps=5), logging_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert "relative_error_layer_0" in rows[-1]
    assert rows[-1]["loss"] == pytest.approx(0.5 * rows[-1]["loss_hid"] + 0.5 * rows[-1]["loss_tok"], rel=1e-4)


def test_hybrids_compare_replaced_layers_only(make_trainer, make_student):
    trainer = make_trainer(stage(), student=make_student(keep_attention=(1,)))
    trainer.train()
    row = trainer.state.log_history[0]
    assert {key for key in row if "layer_" in key} == {"relative_error_layer_0", "relative_error_layer_2"}


def test_layer_errors_are_logged_without_the_hidden_loss(make_trainer):
    trainer = make_trainer(stage(hid=0.0, sup=0.5), logging_steps=2)
    trainer.train()
    assert "relative_error" in trainer.state.log_history[0] and "loss_hid" not in trainer.state.log_history[0]


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer(stage())
    with torch.no_grad():
        trainer.student.model.language_model.layers[1].mixer.flex_ma.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"stage: the loss of step 1 is not finite \(hid nan"):
        trainer.train()


def test_teacher_of_another_width_is_refused(make_trainer, make_teacher):
    teacher = make_teacher()
    teacher.config.text_config.hidden_size = 64
    with pytest.raises(ValueError, match="hidden_size is 32 in the student and 64 in the teacher"):
        make_trainer(stage(), teacher=teacher)


def test_rows_start_at_any_position(make_trainer):
    trainer = make_trainer(stage(), position_shift=50)
    positions = torch.arange(15).view(3, 1, 5).repeat(1, 4, 1)
    torch.manual_seed(0)
    shift = trainer.distillation._shift(Prompt(positions=positions)) - positions
    assert torch.equal(shift, shift[:1, :, :1].expand_as(shift))
    assert 0 <= shift.min() and shift.max() <= 50 and len(shift.unique()) > 1
    # the teacher knows differences alone, features of the student where a token is
    found = {}
    for one in (trainer, make_trainer(stage(), student=trainer.student, teacher=trainer.teacher)):
        one.model.train()
        one.compute_loss(one.model, batch_of(one, range(4)))
        found[one.args.position_shift] = one._sums
    torch.testing.assert_close(found[50]["energies"], found[0]["energies"], rtol=1e-4, atol=0)
    assert not torch.allclose(found[50]["errors"], found[0]["errors"], rtol=1e-4)


def test_stored_log_probabilities_take_the_teachers_place(make_trainer, make_teacher, monkeypatch):
    """With the whole vocabulary stored, loss and gradients are those of the teacher itself, which is not asked."""
    trainer = make_trainer(stage(hid=0.0, sup=0.5))
    batch, teacher = batch_of(trainer, range(4)), make_teacher()
    with torch.no_grad():
        logits = teacher(**{key: value for key, value in batch.items() if key != "labels"}).logits
    logprobs, ids = logits.float().log_softmax(-1).sort(dim=-1, descending=True)
    expected = gradients(trainer, [batch])
    monkeypatch.setattr(type(trainer.teacher), "forward", None)
    found = gradients(trainer, [{**batch, "topk_ids": ids, "topk_logprobs": logprobs}])
    assert_same(found, expected, rtol=1e-3, atol=1e-6)


def test_a_teacher_of_another_size_with_another_padding_of_the_vocabulary(make_trainer, teacher_config, processor):
    config = copy.deepcopy(teacher_config)
    config.text_config.update(
        {
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_hidden_layers": 2,
            "vocab_size": len(processor.tokenizer) + 8,
        }
    )
    config.vision_config.out_hidden_size = 64
    torch.manual_seed(3)
    teacher = LinMUForConditionalGeneration(LinMUConfig.from_teacher(config, keep_attention="all")).eval()
    trainer = make_trainer(stage(hid=0.0), teacher=teacher)
    batch = batch_of(trainer, range(4))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        ours, theirs = (model(**inputs).logits[:, :-1] for model in (trainer.student, teacher))
    counted = batch["labels"][:, 1:] != IGNORE_INDEX
    n = ours.shape[-1]
    p, q = (logits[counted][:, :n].log_softmax(-1) for logits in (theirs, ours))
    torch.testing.assert_close(loss, 0.5 * (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    trainer.train()
    assert "relative_error" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match=r"hidden_size is 32 in the student and 64 in the teacher.*without `hid`"):
        make_trainer(stage(), teacher=teacher)
