"""Transformers' own test mixins, taken from the source distribution of the installed version.

The wheel carries no tests. The source distribution carries `tests/test_*.py` but none of the folders beside them, so
what those folders hold (the export and generation mixins among it) is absent: names imported from there are empty
classes here, which add no test.
"""

import importlib
import importlib.abc
import importlib.machinery
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import transformers
from transformers.models.auto import modeling_auto


# What every configuration takes; the file with Transformers' own choice of values is not in the source distribution.
COMMON_CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["LinMUModel"],
    "id2label": {0: "first", 1: "second"},
    "label2id": {"first": 0, "second": 1},
    "problem_type": "regression",
}


PACKAGE = "transformers_tests"
CACHE = Path(__file__).parent.parent / ".cache"


def fetch() -> Path:
    """
    The folder with the tests of the installed Transformers; the first call downloads it with pip.

    Raises:
        `SystemExit`: pip found no source distribution of this version.
    """
    name = f"transformers-{transformers.__version__}"
    tests = CACHE / name / "tests"
    if not tests.is_dir():
        partial = CACHE / f"{name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        source = f"transformers=={transformers.__version__}"
        if subprocess.run([*pip, "--no-binary", ":all:", "--dest", partial, source]).returncode:
            raise SystemExit(f"pip found no source distribution of {source}; install a released version to run these")
        with tarfile.open(next(partial.glob("*.tar.gz"))) as archive:
            archive.extractall(partial, filter="data")
        (partial / name / "tests" / "__init__.py").touch()  # one of the mixins imports it
        (partial / name).rename(CACHE / name)
        for left in partial.iterdir():
            left.unlink()
        partial.rmdir()
    return tests


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last: modules of the tests that the source distribution leaves out."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(f"{PACKAGE}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _AbsentModule(spec.name)

    def exec_module(self, module):
        absent.append(module.__name__.removeprefix(f"{PACKAGE}."))
        module.config_common_kwargs = COMMON_CONFIG_VALUES


absent: list[str] = []  # modules that were asked for and are not in the source distribution


def install():
    """Makes the tests importable as `transformers_tests` and our classes known to the mappings they consult."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(fetch())]
    sys.modules[PACKAGE] = package
    sys.meta_path.append(_Absent())
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["linmu"] = "LinMUForConditionalGeneration"
    modeling_auto.MODEL_MAPPING_NAMES.update(linmu="LinMUModel", linmu_text="LinMUTextModel")


def draw_words_only(first: int):
    """Random ids of the mixins are text from `first` on, not placeholders of images that are not there."""
    common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    draw = common.ids_tensor
    common.ids_tensor = lambda shape, vocab_size, **kwargs: draw(shape, vocab_size - first, **kwargs) + first


if __name__ == "__main__":
    print(fetch())
