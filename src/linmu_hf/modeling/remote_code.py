"""
The remote-code file: a folder loads with `trust_remote_code=True` without importing linmu_hf first.

The file imports the classes from the installed package, so there is one copy of the code. Transformers' own way of
saving custom code copies module files instead, and follows only imports between files of one folder: of a package it
would write a part that does not load.
"""

import os
from pathlib import Path
from typing import Any, ClassVar


REMOTE_CODE_FILE = "linmu_remote_code.py"
REMOTE_CODE = '''\
"""The classes of this model, from the package linmu-hf (pip install linmu-hf)."""

try:
    from linmu_hf import *  # noqa: F403
except ModuleNotFoundError as error:
    if error.name != "linmu_hf":
        raise
    raise ImportError(
        "This is a LinMU model; its code is in a package that is not installed. Run `pip install linmu-hf`"
    ) from None
'''


def add_remote_code(part: Any, folder: str | os.PathLike) -> None:
    """Writes the remote-code file into `folder` and names its classes in `part.auto_map`, before `part` is saved."""
    name_remote_classes(part)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / REMOTE_CODE_FILE).write_text(REMOTE_CODE, encoding="utf-8")


def name_remote_classes(part: Any) -> None:
    """Names the classes of the remote-code file in `part.auto_map`."""
    module = REMOTE_CODE_FILE.removesuffix(".py")
    earlier = getattr(part, "auto_map", None) or {}
    others = {auto: name for auto, name in earlier.items() if module not in str(name)}  # a subclass registered them
    part.auto_map = {auto: f"{module}.{name}" for auto, name in part.remote_classes.items()} | others


class InstalledCode:
    """A mixin for what Transformers saves: it copies no module files of this package into saved folders."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Does nothing for the classes of linmu_hf, which every saved folder names already."""
        if cls.__module__.split(".")[0] != __name__.split(".")[0]:
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]


class RemoteCode(InstalledCode):
    """A mixin for configurations and processors: every saved folder gets the remote-code file."""

    remote_classes: ClassVar[dict[str, str]]  # Auto class -> class of linmu_hf

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str] | None:
        """Saves as Transformers does, with `auto_map` in the saved file and the remote-code file beside it."""
        add_remote_code(self, save_directory)
        files = super().save_pretrained(save_directory)  # type: ignore[misc]
        if push_to_hub:
            # Uploads a folder of its own: the parent would upload only what it wrote itself.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)  # type: ignore[attr-defined]
        return files
