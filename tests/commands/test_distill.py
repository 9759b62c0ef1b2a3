import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from datasets import DatasetDict
from distillation_fixtures import as_stored, save_pair

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.commands.distill import main
from linmu_hf.distillation.recipes import RECIPES, read_stages, recipe_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory, rows, processor, make_student, make_teacher):
    root = tmp_path_factory.mktemp("cli")
    save_pair(root, processor, make_student(), make_teacher())
    dataset = as_stored(rows)
    DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(root / "data")
    return root


def command(root, out, **changes):
    values = {
        "model": root / "student",
        "teacher": root / "teacher",
        "dataset": root / "data",
        "output_dir": out,
        "stage_overrides": "all.max_steps=1",
        "per_device_train_batch_size": 2,
        "max_completion_length": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    } | changes
    return [part for name, value in values.items() for part in (f"--{name}", *str(value).split())]


def test_command_runs_all_stages(folders, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(command(folders, tmp_path / "out", json=report)) == 0
    assert (tmp_path / "out" / "config.json").exists()
    stages = json.loads(report.read_text())["stages"]
    assert list(stages) == ["stage-1", "stage-2", "stage-3"]
    printed = capsys.readouterr().out
    assert "stage-1       1 steps at 0.0005: 0.5 hid + 0.5 tok\n" in printed
    assert "LoRA rank 8" in printed and "loss_tok" in printed
    assert "loss_hid" in stages["stage-1"] and "loss_seq" in stages["stage-3"]


def test_held_out_rows_and_the_best_weights(folders, tmp_path, capsys):
    """A split of the same dataset by its name; what is measured is in the report and on the card."""
    values = {"dataset_eval_split": "test", "load_best_model_at_end": True}
    values["stage_overrides"] = "stage-1.max_steps=2 stage-2.max_steps=1 stage-3.max_steps=0"
    report = tmp_path / "report.json"
    assert main(command(folders, tmp_path / "out", json=report, **values)) == 0, capsys.readouterr().err
    report = json.loads(report.read_text())
    assert report["held_out_rows"] == 3 and report["machine"] == "1 process on CPU"
    figures = report["stages"]["stage-1"]
    assert figures["eval_loss"] > 0 and figures["best_step"] == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Distilled from teacher, with 1 process on CPU" in card and "(error_map.png)" in card
    assert "| stage | loss | L_hid | L_tok | agreement | relative error | best step |" in card
    assert f"| stage-1 | {figures['eval_loss']:.4g} |" in card
    assert "eval_loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--eval_dataset" in capsys.readouterr().out


def test_rows_as_lines(folders, rows, tmp_path):
    """The form that the README documents: parts of unequal keys, pictures as paths."""
    rows[0]["images"][0].save(tmp_path / "a.png")
    lines = [{"messages": rows[0]["messages"], "images": ["a.png"] * len(rows[0]["images"])}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"dataset": tmp_path / "rows.jsonl", "stage_overrides": "all.max_steps=1 stage-2.max_steps=0"}
    assert main(command(folders, tmp_path / "out", **changes)) == 0
    assert not (tmp_path / "out" / "stage-2").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere/model"}, "/nowhere/model is not a folder"),
        ({"teacher": "/nowhere/teacher"}, "/nowhere/teacher"),
        ({"dataset": "/nowhere/data"}, "/nowhere/data"),
        ({"dataset_train_split": "dev"}, "has no split 'dev'"),
        ({"dataset_eval_split": "dev"}, "has no split 'dev'"),
        ({"eval_dataset": "/nowhere/rows"}, "/nowhere/rows"),
        ({"stage_overrides": "stage-9.max_steps=1"}, "has no stage 'stage-9', but stage-1, stage-2, stage-3"),
        ({"json": "/nowhere/report.json"}, "its folder does not exist"),
        ({"max_steps": 1}, "max_steps=1 is not supported: every stage has its own: set stage_overrides"),
        ({"teacher_model_init_kwargs": '{"device_map":"auto"}'}, "device_map='auto' is not supported"),
        ({"teacher_model_init_kwargs": '{"attn_implementation":"none"}'}, "none"),
        ({"teacher_model_init_kwargs": '{"dtype":"int8"}'}, "int8"),
        ({"torch_compile": True}, "torch_compile=True is not supported"),
        ({"json": "/"}, "--json / is a folder: name a file"),
    ],
)
def test_one_line_for_each_error(folders, tmp_path, capsys, changes, message):
    assert main(command(folders, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("linmu-distill: error: ") and message in error
    assert not (tmp_path / "out" / "distillation.json").exists()


def test_another_teacher_leaves_nothing_in_the_way(folders, teacher_config, processor, tmp_path, capsys):
    other = copy.deepcopy(teacher_config)
    other.text_config.num_hidden_layers = 2
    LinMUForConditionalGeneration(LinMUConfig.from_teacher(other, keep_attention="all")).save_pretrained(
        tmp_path / "other"
    )
    processor.save_pretrained(tmp_path / "other")
    assert main(command(folders, tmp_path / "out", teacher=tmp_path / "other")) == 2
    assert "num_hidden_layers is 3 in the student and 2 in the teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_must_not_be_a_file(folders, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(command(folders, tmp_path / "out")) == 2
    assert "out is a file: name a folder" in capsys.readouterr().err


def test_teacher_must_be_named(folders, tmp_path, capsys):
    arguments = command(folders, tmp_path / "out")
    place = arguments.index("--teacher")
    assert main(arguments[:place] + arguments[place + 2 :]) == 2
    assert "no teacher: give --teacher" in capsys.readouterr().err


@pytest.mark.parametrize("kwargs", ['{"attn_implementation":"eager"}', '{"torch_dtype":"float32"}'])
def test_the_teacher_is_loaded_as_asked(folders, tmp_path, kwargs, capsys, monkeypatch):
    import linmu_hf.distillation.runner as runner

    seen = []
    monkeypatch.setattr(
        runner, "distill", lambda config, student, teacher, *args, **kwargs: seen.append(teacher) or []
    )
    assert main(command(folders, tmp_path / "out", teacher_model_init_kwargs=kwargs)) == 0, capsys.readouterr().err
    teacher = seen[0].as_model()
    assert teacher.dtype == torch.float32
    expected = "eager" if "eager" in kwargs else "sdpa_by_sequence"
    assert seen[0].attention["0"].config._attn_implementation == expected


def test_a_missing_extra_is_one_line():
    script = "import sys; sys.modules['peft'] = None\n"
    script += "from linmu_hf.commands.distill import main; sys.exit(main(['--model', 'm', '--dataset', 'd']))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "peft" in ended.stderr.splitlines()[-1] and "linmu-hf[train]" in ended.stderr.splitlines()[-1]


def test_help_shows_only_what_is_taken(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--stage_overrides" in shown and "--recipe" in shown and "--weight_decay" in shown
    assert not re.search(r"--(max_steps|do_predict|neftune_noise_alpha|eval_accumulation_steps)\b", shown)


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_stages_can_be_given_back(capsys, tmp_path, recipe):
    changes = ["--stage_overrides", "stage-2.learning_rate=1e-4", "stage-2.learning_rates={swin: 0.5}"]
    assert main(["--print_stages", "--recipe", recipe, *changes]) == 0
    (tmp_path / "stages.yaml").write_text(capsys.readouterr().out)
    stages = read_stages(recipe_file(recipe), changes[1:])
    assert read_stages(tmp_path / "stages.yaml") == stages
    assert next(stage for stage in stages if stage.name == "stage-2").learning_rate == 1e-4
    assert main(["--print_stages", "--stages", str(tmp_path / "stages.yaml"), "--recipe", recipe]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_unknown_flags_are_refused(folders, tmp_path, capsys):
    assert main([*command(folders, tmp_path / "out"), "--stepz", "3"]) == 2
    assert "--stepz" in capsys.readouterr().err
