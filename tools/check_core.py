"""
What the core install must do without any extra: imports, loads, answers about an image, saves, loads again, and offers
its commands. To be run by the Python of an environment that holds `pip install .` and nothing else of ours; exits with
an error that names what is wrong. `tools/matrix.py` runs it for every minor of Transformers.
"""

import importlib.metadata as metadata
import re
import sys
import sysconfig
import tempfile
from pathlib import Path


# Commands that say at once what to install.
TRAIN, TESTBED = (f'pip install "linmu-hf[{extra}]"' for extra in ("train", "testbed"))
NEEDS_EXTRA = {"linmu-distill": TRAIN, "linmu-pseudo-targets": TRAIN, "linmu-ablate": TESTBED}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def core_distributions() -> set[str]:
    """The package, what it requires without extras, what that requires, and so on."""
    from packaging.requirements import Requirement

    found, waiting = set(), ["linmu-hf"]
    while waiting:
        name = normalise(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        parsed = map(Requirement, requirements)
        waiting += [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def foreign_modules() -> dict[str, list[str]]:
    """Imported modules that no core dependency brings, and the distributions they come from."""
    core, owners = core_distributions(), metadata.packages_distributions()
    roots = {name.split(".")[0] for name in sys.modules}
    return {
        root: owners[root]
        for root in sorted(roots)
        if root in owners and not core & {normalise(owner) for owner in owners[root]}
    }


def image_inputs(model, torch):
    """A prompt with one image of 4 x 6 patches, as the processor would return it."""
    config = model.config
    image = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    ids = torch.tensor([[5, 6, *image, 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(24, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }


def load_generate_save(folder: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from linmu_hf import LinMUConfig, LinMUForConditionalGeneration

    config = LinMUConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "layer_types": ["m_mate", "full_attention", "m_mate"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 8, "fullatt_block_indexes": [0],
            "out_hidden_size": 32,
        },
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    torch.manual_seed(0)
    LinMUForConditionalGeneration(config).save_pretrained(folder / "written")
    model = AutoModelForImageTextToText.from_pretrained(folder / "written")
    inputs = image_inputs(model, torch)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(**inputs, **options)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 8), f"generate returned {tuple(answer.shape)}"
    model.save_pretrained(folder / "again")
    again = AutoModelForImageTextToText.from_pretrained(folder / "again")
    assert type(again) is LinMUForConditionalGeneration, f"the folder loads as {type(again)}"
    assert torch.equal(again.generate(**inputs, **options), answer), "saved and loaded, the model answers differently"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), f"{name} changed on the way through the folder"


def check_commands() -> None:
    commands = metadata.entry_points(group="console_scripts")
    own = [command for command in commands if command.dist and normalise(command.dist.name) == "linmu-hf"]
    assert own, "no console scripts are installed"
    for command in own:
        script = Path(sysconfig.get_path("scripts")) / command.name
        assert script.exists(), f"{script} is missing"
        try:
            assert callable(command.load()), f"{command.name} does not load"
        except ImportError as error:
            remedy = NEEDS_EXTRA.get(command.name)
            assert remedy and remedy in str(error), f"{command.name} does not load: {error}"


def main() -> None:
    import linmu_hf

    installed = Path(sysconfig.get_path("purelib"))
    assert installed in Path(linmu_hf.__file__).parents, f"linmu_hf comes from {linmu_hf.__file__}, not {installed}"
    with tempfile.TemporaryDirectory() as folder:
        load_generate_save(Path(folder))
    check_commands()
    foreign = foreign_modules()
    assert not foreign, f"imported from outside the core dependencies: {foreign}"
    print(f"core install: loads, generates, saves; {len(sys.modules)} modules, all of core dependencies")


if __name__ == "__main__":
    main()
