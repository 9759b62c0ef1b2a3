"""The student's own answers: what it says alone, judged by the teacher, whatever the batch and the processes."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from killing import Killed, kill_at
from safetensors.torch import load_file

from linmu_hf.distillation import DistillConfig, DistillTrainer, decode_pseudo_targets, distill
from linmu_hf.distillation.lora import add_lora
from linmu_hf.distillation.losses import IGNORE_INDEX, token_kd_loss, topk_kd_loss
from linmu_hf.distillation.on_policy import Draws, append_answer, cut_last_answer
from linmu_hf.distillation.rows.collator import TOKEN_FIELDS, EncodedDataset, encode_row
from linmu_hf.distillation.rows.stream import EncodedStream
from linmu_hf.distillation.stages import FLEX, LORA, SWIN, Stage, set_trainable
from linmu_hf.distillation.targets.decode import suppressed
from linmu_hf.distillation.targets.encode import answer_spans
from linmu_hf.distillation.teacher import SeparateTeacher, SharedTeacher


pytestmark = pytest.mark.core_training

LIMIT = 5


def stage(**changes):
    values = {"name": "own", "trains": (FLEX, SWIN), "max_steps": 2, "learning_rate": 1e-3, "tok": 1.0, "lmbda": 1.0}
    return Stage(**values | changes)


@pytest.fixture
def make_trainer(tmp_path, processor, rows, make_student, make_teacher):
    def make(stage, student=None, teacher=None, rows=rows, dataset=None, **arguments):
        values = {"per_device_train_batch_size": 5, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        values |= {"max_completion_length": LIMIT, "train_sampling_strategy": "sequential", "report_to": []}
        config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, **values | arguments)
        student = student or make_student()
        if stage.lora_r:
            add_lora(student, stage.lora_r, stage.alpha())
        set_trainable(student, stage)
        dataset = dataset or EncodedDataset(processor, rows)
        return DistillTrainer(student, teacher or make_teacher(), config, stage, dataset)

    return make


def batches_of(trainer, micro_batches=1):
    """The batches of the first step, as the Trainer's loop gets them, and their counts."""
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), micro_batches, "cpu")


def said_in(batch):
    """The labelled ids of every row."""
    return [row[row != IGNORE_INDEX].tolist() for row in batch["labels"]]


def alone(student, processor, row, scores=None):
    """What `generate` says to a row's last question, row by row, without any of our code."""
    features = encode_row(processor, row)
    start = answer_spans(features.pop("labels"))[-1][0]
    prompt = {key: value[None, :start] if key in TOKEN_FIELDS else value for key, value in features.items()}
    banned = suppressed(student)
    out = student.eval().generate(
        **prompt, max_new_tokens=LIMIT, do_sample=False, suppress_tokens=banned, logits_processor=scores or []
    )
    return out[0, start:].tolist(), prompt


# ---- What is said


def test_answers_are_what_the_student_says_to_each_row_alone(make_trainer, processor, rows):
    """Greedily, in a padded batch of rows with images, clips and several turns; an answer may be cut."""
    trainer = make_trainer(stage(sampling_temperature=0.0), per_device_train_batch_size=10)
    student, end = trainer.student, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    student.generation_config.eos_token_id = stops = [end, alone(student, processor, rows[0])[0][2]]
    (batch,), counts = batches_of(trainer)
    expected = [alone(student, processor, row)[0] for row in rows]
    assert said_in(batch) == expected
    assert not batch["attention_mask"].all() and len(set(map(tuple, expected))) > 3
    assert {(ids[-1] in stops, len(ids) == LIMIT) for ids in expected} >= {(True, False), (False, True)}
    assert counts.tolist() == [batch["attention_mask"].sum(), sum(map(len, expected)), 1]
    for row, ids, out in zip(rows, expected, batch["input_ids"]):
        prompt = alone(trainer.student, processor, row)[1]["input_ids"][0]
        assert out[: len(prompt) + len(ids)].tolist() == [*prompt.tolist(), *ids]


def test_draws_do_not_depend_on_the_batch(make_trainer):
    """However a step is split, a row says the same; another step, seed or temperature changes what it says."""

    def said(batch_size, micro_batches, step=0, **changes):
        values = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": micro_batches}
        seed = changes.pop("seed", 42)
        trainer = make_trainer(stage(**changes), seed=seed, **values)
        trainer.state.global_step = step
        return [ids for batch in batches_of(trainer, micro_batches)[0] for ids in said_in(batch)]

    drawn = said(10, 1)
    assert said(5, 2) == said(1, 10) == drawn
    for changes in ({"step": 1}, {"seed": 1}, {"sampling_temperature": 3.0}):
        assert said(10, 1, **changes) != drawn
    assert len(set(map(tuple, drawn))) > 5


def test_two_processes_draw_what_one_does(make_trainer):
    whole = batches_of(make_trainer(stage(), per_device_train_batch_size=4, gradient_accumulation_steps=2), 2)[0]
    found = {}
    for process in (0, 1):
        trainer = make_trainer(stage(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
        items = [trainer.train_dataset[index] for index in range(8)]
        trainer.args.distributed_state = copy.copy(trainer.args.distributed_state)
        trainer.args.distributed_state.num_processes, trainer.args.distributed_state.process_index = 2, process
        for number in (0, 1):
            start = (2 * number + process) * 2
            found[start] = said_in(trainer._let_answer(items[start : start + 2], number))
    assert [ids for start in sorted(found) for ids in found[start]] == [ids for b in whole for ids in said_in(b)]


def test_draws_have_the_students_probabilities():
    """20,000 draws against the softmax at the temperature; what pads the vocabulary is never drawn."""
    logits, n = torch.tensor([1.0, 0.0, -1.0, -torch.inf, 9.0]), 20_000
    draws = Draws(range(n), temperature=2.0, known=4)
    counts = draws(None, logits.expand(n, -1)).argmax(-1).bincount(minlength=5)
    p = (logits[:4] / 2).softmax(-1)
    assert counts[3:].tolist() == [0, 0]
    torch.testing.assert_close(counts[:4] / n, p, atol=4 * 0.5 / math.sqrt(n), rtol=0)
    assert draws(None, logits.expand(n, -1)).argmax(-1).bincount(minlength=5).tolist() != counts.tolist()


def test_settings_of_the_model_do_not_change_what_is_drawn(make_trainer):
    plain, spoiled = make_trainer(stage()), make_trainer(stage())
    spoiled.student.generation_config.repetition_penalty = 0.1  # liked instead of avoided
    spoiled.student.config.use_cache = False
    assert said_in(batches_of(spoiled)[0][0]) == said_in(batches_of(plain)[0][0])


def test_answers_are_drawn_at_the_positions_at_which_the_model_is_asked(make_trainer):
    plain, shifted = (make_trainer(stage(), position_shift=shift) for shift in (0, 1000))
    assert said_in(batches_of(shifted)[0][0]) == said_in(batches_of(plain)[0][0])


def test_a_share_of_the_rows_keeps_its_given_answers(make_trainer, processor, rows):
    trainer = make_trainer(stage(lmbda=0.5), per_device_train_batch_size=10)
    (batch,), _ = batches_of(trainer)
    given = [encode_row(processor, row) for row in rows]
    kept = [
        said == features["labels"][features["labels"] != IGNORE_INDEX].tolist()
        for said, features in zip(said_in(batch), given)
    ]
    assert kept == [np.random.default_rng((42, 0, place)).random() >= 0.5 for place in range(10)]
    assert 0 < sum(kept) < 10
    (whole,), _ = batches_of(make_trainer(stage(), per_device_train_batch_size=10))
    assert all(one == other for one, other, k in zip(said_in(batch), said_in(whole), kept) if not k)


def test_rows_that_cannot_answer_stay(processor, rows):
    features = encode_row(processor, rows[0])
    assert cut_last_answer({**features, "labels": torch.full_like(features["labels"], IGNORE_INDEX)}) is None
    asks = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and?"}]}
    more = {**rows[0], "messages": [*rows[0]["messages"], asks], "images": [*rows[0]["images"], rows[0]["images"][0]]}
    assert cut_last_answer(encode_row(processor, more)) is None
    text = {**rows[0], "messages": [*rows[0]["messages"], {"role": "user", "content": "and?"}]}
    prompt, expected = cut_last_answer(encode_row(processor, text)), cut_last_answer(features)
    assert all(torch.equal(value, expected[key]) for key, value in prompt.items())
    end = answer_spans(features["labels"])[-1][1]
    again = append_answer(expected, features["input_ids"][len(expected["input_ids"]) : end].tolist())
    assert all(torch.equal(again[key], features[key][:end]) for key in TOKEN_FIELDS)


@pytest.mark.parametrize("packing", [False, True])
def test_bad_rows_leave_the_draws_of_the_others(make_trainer, processor, rows, packing):
    trainer = make_trainer(stage(), packing=packing)
    items = [trainer.train_dataset[index] for index in range(5)]
    rest = trainer._let_answer([*items[:2], None, *items[3:]], 0)
    whole = trainer._let_answer(items, 0)
    labels = [batch["labels"][batch["labels"] != IGNORE_INDEX].tolist() for batch in (rest, whole)]
    third = len(trainer.on_policy(items, 0, 0)[2]["row"]["labels"]) - len(
        cut_last_answer(items[2]["row"])["input_ids"]
    )
    before = sum((x["row"]["labels"] != IGNORE_INDEX).sum() for x in trainer.on_policy(items[:2], 0, 0))
    assert labels[0] == labels[1][:before] + labels[1][before + third :]
    assert trainer._let_answer([None], 0)["labels"].tolist() == [[IGNORE_INDEX]]


# ---- What is learned from it


def by_hand(student, teacher, processor, rows, beta, draws=None):
    """The mean divergence at the tokens that the student says, row by row, in float64."""
    total, tokens = 0.0, 0
    for index, row in enumerate(rows):
        ids, prompt = alone(student, processor, row, [draws(index)] if draws else None)
        said = torch.tensor([ids])
        whole = {
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], said], 1),
            "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(said)], 1),
            "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(said)], 1),
        }
        s, t = (model(**whole).logits[0, -len(ids) - 1 : -1].double().log_softmax(-1) for model in (student, teacher))
        p, q = s.exp(), t.detach().exp()
        if beta in (0, 1):
            each = (q * (t.detach() - s)) if beta == 0 else p * (s - t.detach())
        else:
            m = (beta * q + (1 - beta) * p).log()
            each = beta * q * (t.detach() - m) + (1 - beta) * p * (s - m)
        total, tokens = total + each.sum(), tokens + len(ids)
    return total / tokens


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_equal_those_by_hand(make_trainer, make_teacher, processor, rows, beta, shared):
    values = {"sampling_temperature": 0.0, "beta": beta, "trains": (FLEX, SWIN, LORA), "lora_r": 2}
    trainer = make_trainer(stage(**values), shared_teacher=shared)
    assert isinstance(trainer.teacher, SharedTeacher if shared else SeparateTeacher)
    student = trainer.student
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    expected = by_hand(student, make_teacher(), processor, rows[:5], beta)
    expected.backward()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    (batch,), counts = batches_of(trainer)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys() and any("lora_A" in name for name in found)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_and_accumulated_batches_give_the_same_loss(make_trainer):
    losses = []
    for batch_size, micro_batches, packing in ((6, 1, False), (2, 3, False), (3, 2, True)):
        values = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": micro_batches}
        trainer = make_trainer(stage(hid=0.1, beta=1.0), packing=packing, **values)
        batches, counts = batches_of(trainer, micro_batches)
        assert ("cu_seq_lens_q" in batches[0]) == packing
        with torch.no_grad():
            losses.append(sum(trainer.compute_loss(trainer.model, b, num_items_in_batch=counts) for b in batches))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(make_trainer, make_student, beta):
    trainer = make_trainer(stage(beta=beta), teacher=SeparateTeacher(copy.deepcopy(make_student())))
    (batch,), counts = batches_of(trainer)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in trainer.student.parameters() if p.grad is not None) < 1e-4
    with torch.no_grad():
        trainer.student.lm_head.weight[7] += 1.0
        assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts) > 1e-4


def test_it_lowers_the_reverse_divergence_on_the_students_own_answers(make_trainer, make_teacher, processor, rows):
    values = {"beta": 1.0, "max_steps": 15, "learning_rate": 5e-3}
    trainer = make_trainer(stage(**values), per_device_train_batch_size=10, warmup_steps=0)

    def draws(index):
        return Draws([index], 1.0, len(processor.tokenizer))

    def measure():
        with torch.no_grad():
            return by_hand(trainer.student, make_teacher(), processor, rows, 1.0, draws).item()

    before = measure()
    trainer.train()
    assert measure() < 0.8 * before
    logged = [row["loss_tok"] for row in trainer.state.log_history if "loss_tok" in row]
    assert len(logged) == 15 and all(math.isfinite(loss) for loss in logged)


@pytest.mark.parametrize("precision", ["bf16", "checkpoints", "stream"])
def test_other_ways_to_train(make_trainer, processor, rows, make_student, precision):
    """In half precision, with gradient checkpoints, and from a stream, whose rows are encoded in the collator."""
    changes = {"bf16": {"bf16": True}, "checkpoints": {"gradient_checkpointing": True}, "stream": {}}[precision]
    dataset = EncodedStream(processor, rows) if precision == "stream" else None
    trainer = make_trainer(stage(beta=1.0), student=make_student(), dataset=dataset, **changes)
    trainer.train()
    plain = make_trainer(stage(beta=1.0))
    plain.train()
    found, expected = (t.state.log_history[0]["loss_tok"] for t in (trainer, plain))
    assert found == pytest.approx(expected, rel=0.2 if precision == "bf16" else 1e-5)


def test_beta_needs_no_answers_of_the_student(make_trainer):
    trainer = make_trainer(stage(lmbda=0.0, beta=1.0))
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    counted = batch["labels"][:, 1:] != IGNORE_INDEX
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        s, t = (
            model(**inputs).logits[:, :-1][counted].double().log_softmax(-1)
            for model in (trainer.student, trainer.teacher.as_model())
        )
    torch.testing.assert_close(loss.double(), (s.exp() * (s - t)).sum(-1).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_divergence_is_trls(beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = torch.randn(2, 6, 9).unbind()
    ours = token_kd_loss(student, teacher, 6, temperature=2.0, beta=beta)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0)
    torch.testing.assert_close(ours, 4 * theirs)


# ---- Whole runs

GIVEN = Stage("given", trains=(FLEX,), max_steps=2, learning_rate=1e-3, tok=1.0)
OWN = stage(max_steps=4, beta=1.0, lmbda=0.8, trains=(FLEX, SWIN, LORA), lora_r=2)


@pytest.fixture(scope="module")
def run(rows, processor, make_student, make_teacher):
    def run(folder, stages=(GIVEN, OWN), held_out=None, **changes):
        values = {"save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "max_completion_length": LIMIT}
        config = DistillConfig(
            output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, report_to=[], **values | changes
        )
        distill(config, make_student(), make_teacher(), rows, processor, eval_dataset=held_out, stages=stages)
        return load_file(folder / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, run(folder)


@pytest.mark.parametrize("call", [3, 5])
def test_a_resumed_run_ends_with_the_same_bits(run, finished, tmp_path, monkeypatch, call):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, DistillTrainer, "training_step", call)
        run(tmp_path / "out")
    found, expected = run(tmp_path / "out"), finished[1]
    assert found.keys() == expected.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())


def test_held_out_rows_are_measured_on_their_given_answers(run, finished, rows, tmp_path):
    """And leave no trace in the training."""
    found = run(tmp_path / "out", held_out=rows[:3], eval_steps=1)
    assert all(torch.equal(value, found[name]) for name, value in finished[1].items())
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").open()]
    measured = [row for row in log if row["stage"] == "own" and "eval_loss_tok" in row]
    assert len(measured) == 4 and all(row["eval_loss"] == pytest.approx(row["eval_loss_tok"]) for row in measured)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "own: lmbda=0.8 lets the student generate, .*leave fsdp out"),
        ({"max_length": 64}, "own: lmbda=0.8 .*no packs of max_length=64: leave max_length out"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_they_begin(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_stored_log_probabilities_are_no_judge(run, rows, processor, make_teacher, make_trainer, tmp_path):
    decode_pseudo_targets(make_teacher(), processor, rows, tmp_path / "answers", max_new_tokens=LIMIT, top_k=3)
    for values, said in (({"lmbda": 0.8}, "lmbda=0.8"), ({"lmbda": 0.0, "beta": 0.5}, "beta=0.5")):
        with pytest.raises(ValueError, match=f"own: {said} asks the teacher itself, .*without --top_k, or set"):
            run(tmp_path / "out", stages=(GIVEN, stage(**values)), pseudo_targets=str(tmp_path / "answers"))
    dataset = EncodedDataset(processor, rows, stored_topk=lambda row, features, index: {})
    with pytest.raises(ValueError, match=r"own: lmbda=1\.0 asks the teacher itself"):
        make_trainer(stage(), dataset=dataset)
    with pytest.raises(ValueError, match=r"beta=0\.5 needs the teacher's whole distribution.*set beta to 0"):
        topk_kd_loss(torch.randn(2, 5), torch.tensor([[0], [1]]), torch.zeros(2, 1), 2, beta=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lmbda": 1.5}, "own: lmbda=1.5 must be from 0 to 1"),
        ({"beta": -0.1}, "own: beta=-0.1 must be from 0 to 1"),
        ({"beta": math.nan}, "own: beta=nan must be from 0 to 1"),
        ({"tok": 0.0, "hid": 1.0}, "own: lmbda=1.0 has no effect without L_tok: set tok, or lmbda=0"),
        ({"tok": 0.0, "hid": 1.0, "lmbda": 0.0, "beta": 1.0}, "own: beta=1.0 has no effect without L_tok"),
        ({"sup": 0.5}, "own: lmbda=1.0 puts .* set seq=sup=0 and give them a stage of their own, or lmbda=0"),
        ({"seq": 0.5}, "own: lmbda=1.0 puts .* set seq=sup=0"),
        ({"sampling_temperature": -1.0}, "own: sampling_temperature=-1.0 must not be negative"),
        ({"sampling_temperature": 0.5, "lmbda": 0.0}, "own: sampling_temperature=0.5 has no effect .* set lmbda"),
    ],
)
def test_stages_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)


def test_a_stage_says_what_it_does():
    assert stage(lmbda=0.25, beta=0.5).objective() == "1 tok, beta 0.5, 25% of answers its own"
    assert "beta" not in GIVEN.objective() and "own" not in GIVEN.objective()
