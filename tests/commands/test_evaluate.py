import json
import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from forked import run_forked
from PIL import Image

from linmu_hf.commands import evaluate as cli
from linmu_hf.evaluation import answers
from linmu_hf.evaluation.retention import compare, format_table
from linmu_hf.testbed.data import TASKS


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_table_and_json_agree(teacher_folder, student_folder, dataset_folder, tmp_path, capsys):
    file = tmp_path / "results" / "retention.json"
    run("--model", student_folder, "--model", teacher_folder, "--teacher", teacher_folder, "--dataset", dataset_folder,
        "--limit", 1, "--max_new_tokens", 2, "--json", file)  # fmt: skip
    table = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert list(results["models"]) == ["teacher", "student"]
    assert table.split()[:3] == ["task", "teacher", "student"]
    assert results["rows"] == len(results["models"]["student"]["accuracy"]["tasks"]) == len(TASKS)
    assert "retention" in results["models"]["student"]
    assert results["versions"]["transformers"]


def test_models_of_one_name_are_told_apart():
    assert cli.name_models(["a/init", "b/init", "b/stage-1/"]) == {
        "a/init": "a/init",
        "b/init": "b/init",
        "stage-1": "b/stage-1/",
    }


def test_no_model_takes_the_teachers_name():
    given = {"teacher": "Qwen/teacher"}
    assert cli.name_models(["runs/teacher", "runs/init"], given) == {
        "runs/teacher": "runs/teacher",
        "init": "runs/init",
    }
    assert cli.name_models(["teacher"], given) == {"./teacher": "teacher"}


def test_a_student_in_a_folder_called_teacher(teacher_folder, student_folder, dataset_folder, tmp_path, capsys):
    """Both are evaluated, and references that do not fit are reported, whatever the folders are called."""
    folder = shutil.copytree(student_folder, tmp_path / "teacher")
    file = tmp_path / "retention.json"
    assert run("--model", f"{folder}/", "--teacher", teacher_folder, "--dataset", dataset_folder, "--limit", 1,
               "--max_new_tokens", 1, "--json", file) == 0  # fmt: skip
    models = json.loads(file.read_text())["models"]
    assert {name: entry["path"] for name, entry in models.items()} == {
        "teacher": str(teacher_folder), str(folder): str(folder)
    }  # fmt: skip
    assert "retention" in models[str(folder)] and models["teacher"]["max_new_tokens"] == 1
    assert models["teacher"]["references_too_long"] == len(TASKS)
    assert f"teacher: {len(TASKS)} references do not fit --max_new_tokens 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [(ClassLabel(names=["cell", "row"]), [1, 0, 1], ["row", "cell", "row"]),
     (Value("int64"), [0, 7, 0], ["0", "7", "0"]),
     (Value("bool"), [True, False, None], ["True", "False", "all"])],
)  # fmt: skip
def test_any_column_names_the_tasks(feature, values, names):
    dataset = Dataset.from_dict({"task": values}, features=Features({"task": feature}))
    tasks = cli.name_tasks(dataset)
    assert tasks == names
    assert cli.first_of_every_task(tasks, 1) == [0, 1] + [2] * (len(set(names)) == 3)
    right = np.array([True, False, True])
    assert set(names) <= set(format_table(compare({"student": right}, tasks)).split())


def test_results_are_written_before_the_table(teacher_folder, dataset_folder, tmp_path, monkeypatch):
    def fail(reports):
        raise TypeError

    monkeypatch.setattr(cli, "format_table", fail)
    file = tmp_path / "retention.json"
    with pytest.raises(TypeError):
        run(
            "--model", teacher_folder, "--dataset", dataset_folder, "--limit", 1, "--max_new_tokens", 1, "--json", file
        )
    assert json.loads(file.read_text())["models"]


def message(capsys, *arguments):
    assert run(*arguments) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("linmu-eval: error: ")
    return text


def test_errors_are_one_line(teacher_folder, text_only_folder, dataset_folder, tmp_path, capsys):
    data = ("--dataset", dataset_folder)
    assert "is not a folder" in message(capsys, "--model", tmp_path / "none", *data)
    assert "has no config.json" in message(capsys, "--model", tmp_path, *data)
    assert "'qwen2' model, which takes no images" in message(capsys, "--model", text_only_folder, *data)
    model = ("--model", teacher_folder)
    assert "no split 'dev': it has ['train', 'test']" in message(capsys, *model, *data, "--split", "dev")
    assert "there is no folder" in message(capsys, *model, "--dataset", tmp_path / "none")
    assert "--limit 0 must be at least 1" in message(capsys, *model, *data, "--limit", 0)
    assert "is a folder: name a file" in message(capsys, *model, *data, "--json", tmp_path)
    assert "--device gpu is unknown: give cpu or cuda" in message(capsys, *model, *data, "--device", "gpu")

    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "row 1 column 1?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
    ]
    Dataset.from_list([{"messages": turns, "task": "cell"}]).save_to_disk(tmp_path / "no-image")
    assert "asks for 1 images" in message(capsys, *model, "--dataset", tmp_path / "no-image")


def test_rows_that_cannot_be_used_are_left_out(teacher_folder, tmp_path, capsys):
    """Lines as the README documents them, of which one has no picture and one a damaged one."""
    for name in ("a", "b", "c"):
        Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-40])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "row 1 column 1?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
    ]
    lines = [{"messages": turns, "images": images} for images in (["a.png"], [], ["b.png"], ["c.png"])]
    file, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("--model", teacher_folder, "--max-new-tokens", 1)
    run(*arguments, "--dataset", file, "--json", report)
    assert capsys.readouterr().err.count("left out: row ") == 2
    results = json.loads(report.read_text())
    assert results["rows"] == results["models"]["teacher"]["accuracy"]["tasks"]["all"]["rows"] == 2
    assert "asks for 1 images" in results["unusable_rows"]["1"] and "b.png" in results["unusable_rows"]["2"]
    for bad in (lines[1], lines[2]):
        file.write_text(json.dumps(bad) + "\n")
        assert "row 0 ('row 1 column 1?')" in message(capsys, *arguments, "--dataset", file)


def test_weights_of_another_shape(student_folder, dataset_folder, tmp_path, capsys):
    folder = shutil.copytree(student_folder, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["state_size"] //= 2
    (folder / "config.json").write_text(json.dumps(config))
    assert "the weights do not fit" in message(capsys, "--model", folder, "--dataset", dataset_folder)


# ---- Answers that are kept


@pytest.fixture
def command(teacher_folder, student_folder, dataset_folder, tmp_path):
    """Runs the command with these flags and returns its results without times."""

    def work(name, *flags):
        given = ("--model", student_folder, "--teacher", teacher_folder, "--dataset", dataset_folder,
                 "--max_new_tokens", 2, "--batch_size", 4, "--json", tmp_path / f"{name}.json")  # fmt: skip
        return [str(word) for word in (*given, *flags)]

    return work


def results(file):
    report = json.loads(file.read_text())
    for model in report["models"].values():
        del model["seconds"]
    return report


def test_a_killed_run_goes_on(command, tmp_path, monkeypatch):
    """It answers only what is missing, whatever the killed one left of its last line, to the same table."""
    assert run(*command("whole")) == 0
    output, batches = ("--output", tmp_path / "out"), []
    add = answers.AnswerStore.add

    def die(store, keys, texts, cut):
        add(store, keys, texts, cut)
        batches.append(len(keys))
        if len(batches) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(answers.AnswerStore, "add", die)
    assert run(*command("killed", *output)) == 130 and not (tmp_path / "killed.json").exists()
    (file,) = (tmp_path / "out" / "teacher").glob("answers-*.jsonl")
    with open(file, "a") as stream:
        stream.write('["half a li')
    before = sum(batches)
    monkeypatch.setattr(answers.AnswerStore, "add", lambda *given: batches.append(len(given[1])) or add(*given))
    assert run(*command("killed", *output)) == 0
    assert sum(batches) == 2 * results(tmp_path / "whole.json")["rows"] and 0 < before < sum(batches)
    assert results(tmp_path / "killed.json") == results(tmp_path / "whole.json")
    lines = file.read_bytes()
    assert run(*command("killed", *output)) == 0 and file.read_bytes() == lines  # nothing is missing


def test_answers_of_another_make_are_refused(command, tmp_path, capsys):
    assert run(*command("one", "--output", tmp_path / "out")) == 0
    words = command("one", "--output", tmp_path / "out")
    words[words.index("--max_new_tokens") + 1] = "3"
    assert run(*words) == 2
    assert "holds answers made with another max_new_tokens: remove it" in capsys.readouterr().err


def test_two_processes_give_the_table_of_one(command, tmp_path):
    assert run(*command("one")) == 0
    words = command("two", "--output", tmp_path / "out", "--device", "cpu")
    done = run_forked(cli.main, words, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("retention") == 1  # one of them prints
    assert len(list((tmp_path / "out" / "student").glob("answers-*.jsonl"))) == 2
    assert results(tmp_path / "two.json") == results(tmp_path / "one.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "paper", "--dataset", "x"], "give --dataset, --tasks, or --tasks rows"),
        (["--tasks", "rows"], "--tasks rows needs --dataset"),
        ([], "give --dataset, --tasks, or"),
        (["--dataset", "x", "--include_path", "y"], "--include_path y has no effect here"),
        (["--tasks", "paper", "--max_new_tokens", "3"], "--max_new_tokens 3 has no effect here"),
        (["--dataset", "x", "--device", "meta"], "--device meta is not there, or holds no numbers: give cpu or cuda"),
    ],
)
def test_what_does_not_fit_together_is_refused(student_folder, capsys, flags, message):
    assert run("--model", student_folder, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_student_that_is_its_own_teacher(student_folder, capsys):
    assert run("--model", student_folder, "--teacher", f"{student_folder}/", "--dataset", "x") == 2
    assert "is the teacher itself: name a student, or leave --teacher out" in capsys.readouterr().err
