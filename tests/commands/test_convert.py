import json

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from synthetic import ask, image, make_processor, make_teacher, say

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.commands.convert import build_parser, main
from linmu_hf.conversion.calibration.walk import Walk
from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.modeling.configuration_linmu import MIXER_FIELDS


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def teacher(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "teacher"
    make_teacher(folder, processor=processor)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rows = [
        {"messages": [ask(f"which digit {i}?", images=1), say("7")], "images": [image(24, 40, i)]} for i in range(6)
    ]
    parts = List({"type": Value("string"), "text": Value("string")})
    features = Features(
        {"messages": List({"role": Value("string"), "content": parts}), "images": List(ImageFeature())}
    )
    folder = tmp_path_factory.mktemp("cli") / "data"
    DatasetDict({"train": Dataset.from_list(rows, features=features)}).save_to_disk(folder)
    return folder


def test_flags_reach_the_config(teacher, tmp_path, capsys):
    flags = "--keep_attention 0,2 --dtype bfloat16 --scan_rope false --bc_feature_map none --gate channel"
    flags += " --window_size 8,2,2 --scan_orders thw --conv_kernel 2 --timescale_range 2,64.5 --json"
    output = tmp_path / "out"
    report = tmp_path / "report.json"
    assert main(["--teacher", str(teacher), "--output_dir", str(output), *flags.split(), str(report)]) == 0
    text = LinMUConfig.from_pretrained(output).text_config
    assert text.layer_types == ["full_attention", "m_mate", "full_attention", "m_mate"]
    assert (text.scan_rope, text.bc_feature_map, text.window_size) == (False, None, [8, 2, 2])
    assert (text.scan_orders, text.conv_kernel, text.timescale_range) == (["thw"], 2, [2.0, 64.5])
    written = json.loads(report.read_text())
    assert written["layers_replaced"] == [1, 3] and written["dtype"] == "bfloat16"
    assert "2 of 4 replaced by M-MATE" in capsys.readouterr().out


def test_every_option_has_a_flag():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {f"--{name}" for name in MIXER_FIELDS} <= flags


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (("--scan_rope", "yes"), "'yes' must be bool, such as true"),
        (("--window_size", "big"), "'big' must be list[int] | tuple[int, ...], such as 16,4,4"),
    ],
)
def test_values_of_another_kind_are_refused_with_an_example(flag, message, capsys):
    with pytest.raises(SystemExit):
        main(["--teacher", "here", "--output_dir", "there", *flag])
    assert message in capsys.readouterr().err


def test_dry_run(teacher, tmp_path):
    assert main(["--teacher", str(teacher), "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    assert not any(tmp_path.iterdir())


def test_calibrate(teacher, dataset, tmp_path):
    output, report = tmp_path / "out", tmp_path / "report.json"
    flags = ["--teacher", str(teacher), "--output_dir", str(output), "--json", str(report)]
    flags += ["--calibrate", str(dataset), "--calibrate_samples", "6", "--calibrate_steps", "5"]
    assert main([*flags, "--dry_run"]) == 0 and not output.exists()
    assert main(flags) == 0
    calibration = json.loads(report.read_text())["calibration"]
    assert calibration["path_after"] < calibration["path_before"] and "scan" in calibration["kept"]
    LinMUForConditionalGeneration.from_pretrained(output)


@pytest.mark.parametrize(
    "flag", [("--calibrate_samples", "6"), ("--calibrate_split", "test"), ("--calibrate_steps", "5")], ids=" ".join
)
def test_flags_without_a_dataset_to_calibrate_on(teacher, tmp_path, capsys, flag):
    assert main(["--teacher", str(teacher), "--output_dir", str(tmp_path / "out"), *flag]) == 2
    assert f"{' '.join(flag)} is for --calibrate DATASET" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep_attention", "all", "--text_window", "9"], "--text_window has no effect with --keep_attention all"),
        (["--revision", "main"], "--revision main has no effect on the folder"),
        (["--calibrate", "/nowhere", "--dry_run"], "there is no folder /nowhere"),
        (
            ["--calibrate", "/nowhere", "--calibrate_samples", "1", "--dry_run"],
            "--calibrate_samples 1 must be at least",
        ),
    ],
)
def test_options_without_effect_and_what_a_dry_run_finds(teacher, tmp_path, capsys, flags, message):
    assert main(["--teacher", str(teacher), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_fewer_steps_than_none(teacher, dataset, tmp_path, capsys):
    flags = ["--calibrate", str(dataset), "--calibrate_steps", "-1"]
    assert main(["--teacher", str(teacher), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert "--calibrate_steps -1 must be 0 or more" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_an_interrupted_calibration_is_taken_up_again(teacher, dataset, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = ["--teacher", str(teacher), "--output_dir", str(output)]
    flags += ["--calibrate", str(dataset), "--calibrate_samples", "2"]

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "states", interrupt)
        assert main(flags) == 130
    assert "interrupted; the same command takes it up again" in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(OSError, match="valid JSON"):
        LinMUForConditionalGeneration.from_pretrained(tmp_path / "out.incomplete")
    assert main(flags) == 0
    assert "calibrating" in capsys.readouterr().err
    LinMUForConditionalGeneration.from_pretrained(output)


def test_calibrate_on_lines(teacher, tmp_path):
    """The form that the README documents: parts of unequal keys, pictures as paths."""
    lines = [{"messages": [ask(f"which {i}?", images=1), say("7")], "images": [f"{i}.png"]} for i in range(4)]
    for i in range(4):
        image(24, 40, i).save(tmp_path / f"{i}.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--teacher", str(teacher), "--output", str(tmp_path / "out"), "--calibrate", str(tmp_path / "rows.jsonl")]
    assert main(flags) == 0


def test_bad_calibration_data_stops_before_work(teacher, dataset, tmp_path, capsys):
    flags = ["--teacher", str(teacher), "--output_dir", str(tmp_path / "out")]
    rows = [{"messages": [ask("which digit?", images=1), say("7")]}] * 2
    Dataset.from_list(rows).save_to_disk(tmp_path / "bad")
    for data, message in {
        str(tmp_path / "bad"): "row 0 ('which digit?') asks for 1 images in its messages but has 0",
        str(tmp_path / "nowhere"): "there is no folder",
    }.items():
        assert main([*flags, "--calibrate", data]) == 2
        assert message in capsys.readouterr().err
    assert main([*flags, "--calibrate", str(dataset), "--calibrate_split", "dev"]) == 2
    assert "has no split 'dev': it has ['train']" in capsys.readouterr().err
    for report, message in {tmp_path / "no" / "report.json": "does not exist", tmp_path: "is a folder"}.items():
        assert main([*flags, "--json", str(report)]) == 2
        assert message in capsys.readouterr().err
    assert main([*flags, "--calibrate", str(dataset), "--keep_attention", "all"]) == 2
    assert "keep_attention='all' leaves no layer to calibrate" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_teacher_may_be_linmu(teacher, tmp_path):
    assert main(["--teacher", str(teacher), "--output_dir", str(tmp_path / "out")]) == 0
    model = load_teacher(tmp_path / "out")
    assert set(model.config.text_config.layer_types) == {"m_mate"}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
