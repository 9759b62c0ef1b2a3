"""Packages from the package index, kept as they come."""

import shutil
import subprocess
import sys
from pathlib import Path

from linmu_hf.files import whole_folder


def download(package: str, version: str, folder: Path, *, source: bool = False) -> Path:
    """
    Returns the file of a package in `folder`, downloaded by pip the first time.

    Args:
        package, version (`str`): as pip knows them.
        folder (`Path`): where downloads are kept, a folder for each package.
        source (`bool`, *optional*, defaults to `False`): the source archive instead of the wheel.
    """
    place = folder / f"{package}-{version}"
    if not place.is_dir():
        print(f"downloading {package} {version}", flush=True)
        with whole_folder(place) as target:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            kind = ["--no-binary", package] if source else ["--only-binary", ":all:"]
            result = subprocess.run(
                [*command, *kind, "--dest", str(target), f"{package}=={version}"], capture_output=True, text=True
            )
            if result.returncode:
                shutil.rmtree(target)
                raise RuntimeError(f"pip cannot download {package}=={version}: {result.stderr.strip()[-500:]}")
    (file,) = place.iterdir()
    return file
