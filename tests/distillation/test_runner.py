import json
import shutil

import pytest
import torch
from killing import Killed, kill_at
from transformers import AutoModelForImageTextToText, AutoProcessor

from linmu_hf import files
from linmu_hf.distillation import DistillConfig, distill, read_stages, recipe_file
from linmu_hf.distillation import folders as folders_module
from linmu_hf.distillation import runner as runner_module
from linmu_hf.distillation.folders import check_output
from linmu_hf.distillation.stages import Stage
from linmu_hf.distillation.targets.fill import decode_pseudo_targets
from linmu_hf.distillation.trainer import DistillTrainer
from linmu_hf.files import locked
from linmu_hf.testbed.processor import build_processor


STAGES = ["stage-1-align", "stage-1", "stage-2", "stage-3"]
ALIGN = {"name": "stage-1-align", "trains": ["flex"], "learning_rate": 1e-3, "hid": 0.5, "hidden_input": "teacher"}
CHANGES = [
    "stage-1.learning_rate=3e-3",
    "stage-2.learning_rate=3e-3",
    "stage-3.learning_rate=1e-3",
    "stage-3.lora_r=2",
]


def steps(*counts):
    """The paper's stages, teacher-fed steps before them, with so many steps."""
    stages = [{**ALIGN, "max_steps": 1}, *read_stages(recipe_file("paper"), CHANGES)]
    overrides = [f"{name}.max_steps={count}" for name, count in zip(STAGES, counts)]
    return read_stages(stages, overrides)


ARGUMENTS = {
    "stages": steps(3, 5, 3, 5),
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "save_steps": 2,
    "logging_steps": 2,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def run(rows, processor, make_student, make_teacher):
    """Distils a fresh student into a folder and returns it."""

    def run(folder, rows=rows, **changes):
        student = make_student()
        config = DistillConfig(output_dir=str(folder), use_cpu=True, **ARGUMENTS | changes)
        distill(config, student, make_teacher(), rows, processor)
        return student

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """An uninterrupted run: its folder and its student in memory."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, run(folder)


def assert_same_weights(one, other):
    one, other = (model.state_dict() for model in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def test_every_stage_leaves_a_loadable_folder(finished, processor, make_student):
    folder, student = finished
    previous = make_student()
    for name in STAGES:
        model = load(folder / name)
        AutoProcessor.from_pretrained(folder / name)
        changed = {n for n, v in model.state_dict().items() if not torch.equal(v, previous.state_dict()[n])}
        kinds = {
            "local_swin" if ".local_swin." in n else "flex" if ".mixer." in n else "ffn" if ".mlp." in n else n
            for n in changed
        }
        assert kinds == {"stage-2": {"flex", "local_swin"}, "stage-3": {"flex", "local_swin", "ffn"}}.get(
            name, {"flex"}
        )
        previous = model
    assert_same_weights(load(folder), student)
    assert_same_weights(load(folder / "stage-3"), student)
    assert not [path for path in folder.iterdir() if path.suffix in (".running", ".partial")]
    assert json.loads((folder / "config.json").read_text()) == json.loads((folder / "stage-3/config.json").read_text())


def test_folders_keep_the_students_configuration(finished, make_student, tmp_path):
    folder, student = finished
    make_student().save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert before == after
    assert not hasattr(student, "peft_config") and not student.training


def test_log_and_curves(finished):
    folder, _ = finished
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in log)) == STAGES
    terms = {name: set() for name in STAGES}
    for row in log:
        terms[row["stage"]] |= {key for key in row if key.startswith("loss_")}
    assert terms == {
        "stage-1-align": {"loss_hid"},
        "stage-1": {"loss_hid", "loss_tok"},
        "stage-2": {"loss_hid", "loss_tok"},
        "stage-3": {"loss_tok", "loss_seq", "loss_sup"},
    }
    for picture in ("loss_curves.png", "error_map.png"):
        assert (folder / picture).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("owner", "name", "call", "done"),
    [
        (DistillTrainer, "compute_loss", 3, 0),  # aligning
        (DistillTrainer, "compute_loss", 3 + 4, 1),  # stage 1
        (DistillTrainer, "compute_loss", 3 + 5 + 3, 2),  # stage 2
        (DistillTrainer, "compute_loss", 3 + 5 + 3 + 4, 3),  # stage 3, with adapters
        (DistillTrainer, "compute_loss", 3 + 5 + 3 + 1, 3),  # before its first checkpoint
        (DistillTrainer, "_save_rng_state", 4, 1),  # half a checkpoint in stage 1, one whole before it
        (files.os, "replace", 2, 0),  # with stage-1-align written but not in place
        (folders_module, "plot_training_log", 4, 3),  # with stage 3 written but for its curves
        (runner_module, "publish", 1, 4),  # with all stages done
    ],
)
def test_a_killed_run_continues_with_the_same_result(finished, run, tmp_path, monkeypatch, owner, name, call, done):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run(out)
    assert [stage for stage in STAGES if (out / stage).exists()] == STAGES[:done]
    with pytest.raises((OSError, ValueError)):
        load(out)
    trained = []
    with monkeypatch.context() as patch:
        compute_loss = DistillTrainer.compute_loss
        patch.setattr(DistillTrainer, "compute_loss", lambda *a, **k: trained.append(1) or compute_loss(*a, **k))
        student = run(out)
    assert len(trained) <= sum((3, 5, 3, 5)[done:])
    assert_same_weights(student, finished[1])
    assert_same_weights(load(out), finished[1])
    logs = [[json.loads(line) for line in (f / "training_log.jsonl").open()] for f in (out, finished[0])]
    steps = [[(row["stage"], row["step"]) for row in log if "loss" in row] for log in logs]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(DistillTrainer, "_save_checkpoint"), (runner_module, "write_stage")],
)
def test_a_run_goes_on_after_a_disk_was_full(finished, run, tmp_path, monkeypatch, owner, name):
    """Files that may not grow simulate it: neither a checkpoint can be written nor the first stage's model."""
    resource, out = pytest.importorskip("resource"), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = getattr(owner, name)

    def full(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            return original(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match=f"{out} cannot be written"):
            run(out)
    assert not [stage for stage in STAGES if (out / stage).exists()]
    assert_same_weights(run(out), finished[1])
    assert_same_weights(load(out), finished[1])


def test_a_finished_run_is_not_run_again(finished, run, monkeypatch):
    folder, student = finished
    monkeypatch.setattr(DistillTrainer, "train", None)
    assert_same_weights(run(folder), student)


def test_other_settings_are_refused_and_overwritten_on_demand(finished, run, tmp_path):
    out = tmp_path / "out"
    short = {"stages": steps(0, 2, 0, 0)}
    run(out, **short)
    with pytest.raises(ValueError, match=r"temperature was 1.0, now 2.0; stages\.stage-1\.max_steps was 2, now 3\."):
        run(out, **short | {"stages": steps(0, 3, 0, 0), "temperature": 2.0})
    run(out, **short | {"logging_steps": 1})  # what does not change the result may differ
    run(out, **short | {"stages": steps(0, 0, 2, 0), "overwrite_output_dir": True})
    assert not (out / "stage-1").exists() and (out / "stage-2").exists()


def test_other_rows_are_refused(run, rows, tmp_path):
    run(tmp_path / "out", **SHORT)
    turned = [{**row, "images": [image.rotate(180) for image in row["images"]]} for row in rows]
    for other in (rows[:5], turned):
        with pytest.raises(ValueError, match="dataset was"):
            run(tmp_path / "out", rows=other, **SHORT)


SHORT = {"stages": steps(0, 1, 0, 0)}


def test_overwriting_deletes_only_what_a_run_wrote(run, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    run(out, **SHORT)
    outside.mkdir()
    mine = [outside / "training_log.jsonl", out / "data" / "rows", out / "adapter.safetensors", out / "notes.md"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    settings = json.loads((out / "distillation.json").read_text())
    settings["stages"] |= {name: {} for name in ("../outside", str(outside), "data", ".")}
    (out / "distillation.json").write_text(json.dumps(settings))
    run(out, **SHORT | {"stages": steps(0, 0, 1, 0), "overwrite_output_dir": True})
    assert not (out / "stage-1").exists() and (out / "stage-2").is_dir()
    assert [file.read_text() for file in mine] == ["mine"] * 4


@pytest.mark.parametrize("name", ["", "stage-1", "stage-1/model.safetensors", "stage-2.running", "pseudo_targets"])
def test_overwriting_does_not_delete_what_is_read(run, tmp_path, name):
    out = tmp_path / "out"
    run(out, **SHORT)
    config = DistillConfig(output_dir=str(out), overwrite_output_dir=True, use_cpu=True)
    with pytest.raises(ValueError, match=r"would delete .*, which is read: choose another output_dir"):
        check_output(config, None, out / name)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ValueError, match="which is read"):
        check_output(config, tmp_path / "link" / name)
    check_output(config, tmp_path / "other", out / "data", "org/model")
    config.overwrite_output_dir = False
    check_output(config, out / name)


@pytest.mark.parametrize("text", ["", "[]", '{"stages": 3}', "{}"])
def test_settings_that_no_run_wrote_are_refused_in_one_line(run, tmp_path, text):
    (tmp_path / "distillation.json").write_text(text)
    with pytest.raises(ValueError, match=r"distillation\.json is none that a distillation wrote: delete it"):
        run(tmp_path, **SHORT)


def test_a_second_run_into_the_same_folder_is_refused(run, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="name another folder"):
        run(tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()


def test_folders_inside_a_stage_are_published(rows, processor, make_student, make_teacher, tmp_path):
    """Named chat templates are saved in a folder of their own, and `finish_folder` may add others."""

    def finish(folder, stages, rows):
        (folder / "more" / "deep").mkdir(parents=True)
        (folder / "more" / "deep" / "file").write_text("there")

    config = DistillConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **ARGUMENTS | SHORT)
    distill(config, make_student(), make_teacher(), rows, processor, finish_folder=finish)
    assert (tmp_path / "out" / "more" / "deep" / "file").read_text() == "there"


def test_named_chat_templates(rows, make_student, make_teacher, tmp_path):
    processor = build_processor()
    processor.chat_template = {"default": processor.chat_template, "short": "{{ messages }}"}
    config = DistillConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **ARGUMENTS | SHORT)
    distill(config, make_student(), make_teacher(), rows, processor)
    assert set(AutoProcessor.from_pretrained(tmp_path / "out").chat_template) == {"default", "short"}


def test_foreign_models_are_not_touched(run, make_student, tmp_path):
    make_student().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model that no distillation put there"):
        run(tmp_path, overwrite_output_dir=True)


def test_bad_rows_stop_before_training(run, rows, tmp_path):
    bad = {**rows[4], "images": []}
    for broken, message in (
        ([*rows[:4], bad], "row 4 .*asks for 1 images"),
        ([rows[0], {**rows[1], "messages": rows[1]["messages"][:1]}], "row 1.* no assistant turn"),
        ([{"text": "hello"}], "row 0.* no `messages`"),
        ([], "the dataset has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", rows=broken)
    assert not (tmp_path / "out").exists()


def test_half_precision_needs_mixed_precision(rows, processor, make_student, make_teacher, tmp_path):
    config = DistillConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **ARGUMENTS)
    with pytest.raises(ValueError, match=r"student is in torch\.bfloat16: load it in float32"):
        distill(config, make_student().bfloat16(), make_teacher(), rows, processor)


def test_bf16_trains_fp32_masters(rows, processor, make_student, make_teacher, tmp_path):
    values = ARGUMENTS | {"stages": steps(1, 2, 0, 1), "stage_overrides": ["stage-3.seq=0"]}
    config = DistillConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=True, **values)
    seen = set()
    student, step = make_student().bfloat16(), DistillTrainer.training_step

    def spy(self, model, *args, **kwargs):
        seen.update(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
        return step(self, model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", spy)
        distill(config, student, make_teacher().bfloat16(), rows, processor)
    assert seen == {torch.float32}
    assert student.lm_head.weight.dtype == torch.bfloat16
    assert student.model.language_model.layers[0].mixer.flex_ma.o_proj.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def answers(rows, processor, make_teacher, tmp_path_factory):
    """A store with the teacher's answers to all rows."""
    folder = tmp_path_factory.mktemp("answers") / "store"
    decode_pseudo_targets(make_teacher(), processor, rows, folder, max_new_tokens=4, batch_size=4)
    return folder


def test_answers_made_before_take_the_place_of_decoding(finished, answers, run, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "decode_pseudo_targets", None)
    assert_same_weights(run(tmp_path / "out", pseudo_targets=str(answers)), finished[1])
    assert not (tmp_path / "out" / "pseudo_targets").exists()


def test_a_run_goes_on_with_the_same_answers_alone(answers, run, tmp_path):
    store = shutil.copytree(answers, tmp_path / "store")
    given = {"stages": steps(0, 0, 0, 1), "pseudo_targets": str(store)}
    run(tmp_path / "out", **given)
    file = store / "shard-00000" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))  # in another order, as several processes write them
    run(tmp_path / "out", **given)
    line = json.loads(lines[0])
    line["answers"][0]["ids"][0] += 1
    file.write_text(json.dumps(line) + "\n" + "".join(lines[1:]))
    with pytest.raises(ValueError, match="other settings: pseudo_targets"):
        run(tmp_path / "out", **given)


def test_answers_that_do_not_fit_stop_before_training(answers, run, rows, tmp_path):
    def refused(message, rows=rows, **changes):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            run(tmp_path / "out", rows, **{"pseudo_targets": str(answers)} | changes)
        assert message in str(error.value) and not (tmp_path / "out").exists()

    refused("max_new_tokens is 4 there and 5 here: set max_completion_length to 4", max_completion_length=5)
    turned = [{**row, "images": [image.rotate(180) for image in row["images"]]} for row in rows[:2]]
    refused("has no answers to 2 rows, row 8 first: run linmu-pseudo-targets", [*rows[2:], *turned])
    refused("no stage learns from the teacher's answers", stage_overrides=["stage-3.seq=0"])
    refused("no folder of teacher answers", pseudo_targets=str(tmp_path))
    with_column = [{**row, "pseudo_messages": row["messages"]} for row in rows]
    refused("the dataset has a column pseudo_messages; leave one of them out", with_column)


def test_overwriting_deletes_the_answers_of_the_run_before(run, tmp_path):
    arguments = {"stages": steps(0, 0, 0, 1)}
    run(tmp_path / "out", **arguments)
    old = tmp_path / "out" / "pseudo_targets" / "shard-00001"
    old.mkdir()
    run(tmp_path / "out", **arguments, overwrite_output_dir=True)
    assert not old.exists() and (old.parent / "shard-00000").is_dir()


def test_stored_log_probabilities_end_where_the_teacher_ends(rows, processor, make_student, make_teacher, tmp_path):
    """All of the vocabulary stored; and with the same store a temperature is refused."""
    store, vocabulary = tmp_path / "store", len(processor.tokenizer)
    decode_pseudo_targets(make_teacher(), processor, rows, store, max_new_tokens=4, top_k=vocabulary)
    values = {"use_cpu": True, "disable_tqdm": True, "max_completion_length": 4, "per_device_train_batch_size": 4}
    stages = [Stage("tok", trains=("flex",), max_steps=3, learning_rate=1e-3, tok=1.0)]
    students = []
    for name, given in (("with", {"pseudo_targets": str(store)}), ("without", {})):
        students.append(make_student())
        config = DistillConfig(output_dir=str(tmp_path / name), adam_epsilon=1e-3, **values | given)
        distill(config, students[-1], make_teacher(), rows, processor, stages=stages)
    assert_same_weights(*students)
    config = DistillConfig(output_dir=str(tmp_path / "warm"), pseudo_targets=str(store), temperature=2.0, **values)
    with pytest.raises(ValueError, match=r"temperature=2.0 needs all logits, and .* holds the \d+ likeliest"):
        distill(config, make_student(), make_teacher(), rows, processor, stages=stages)
