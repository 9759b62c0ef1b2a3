"""The configurations for `accelerate launch` are read by accelerate and mean what they say."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import prepare_multi_gpu_env

import linmu_hf.distillation.engines.wrapping as engines
from linmu_hf.distillation import DistillConfig


CONFIGS = Path(__file__).parents[3] / "examples" / "accelerate_configs"


@pytest.mark.parametrize(("name", "sharded"), [("ddp", False), ("fsdp2", True)])
def test_accelerate_reads_the_configurations(name, sharded, monkeypatch, tmp_path):
    from accelerate.commands.launch import _validate_launch_command

    file = str(CONFIGS / f"{name}.yaml")
    assert load_config_from_file(file).num_processes == 8
    given = launch_command_parser().parse_args(["--config_file", file, "--module", "linmu_hf.commands.distill"])
    arguments, _, _ = _validate_launch_command(given)
    assert arguments.use_fsdp == sharded
    environment = prepare_multi_gpu_env(arguments)
    monkeypatch.setattr(os, "environ", environment)
    plain = SimpleNamespace(fsdp=None, deepspeed_plugin=None)
    assert engines.is_sharded(plain) == sharded
    if sharded:
        assert environment["FSDP_VERSION"] == "2"
    # accelerate's mixed precision is `--bf16`, by which weights are loaded and runs compared
    assert DistillConfig(output_dir=str(tmp_path), use_cpu=True).bf16


def test_other_mixed_precision_of_accelerate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision=fp8, which is not supported: take bf16"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True)
