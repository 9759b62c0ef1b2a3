"""
Makes the torchvision wheel of PyPI importable next to a CPU build of torch.

torchvision from PyPI is built against the CUDA torch, so beside `torch+cpu` its C++ operators do not load and
`import torchvision` ends in `operator torchvision::nms does not exist`. The image and video processors need none of
these operators, only an import that succeeds; image files are read by Pillow. `python tools/torchvision_cpu_shim.py`
copies this file and a `.pth` line into the running environment's site-packages; from then on the missing schemas are
declared right before torchvision is imported. Beside a matching torch the C++ operators load and nothing changes.
"""

import io
import sys
import sysconfig
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path


_libraries = []  # torch.library drops its definitions once the Library object is collected


def decode_image(source, mode="RGB", apply_exif_orientation=False):
    """torchvision's function of this name by Pillow, for a path or the bytes of a file as a tensor: `[3, h, w]`."""
    import numpy
    import torch
    from PIL import Image

    file = io.BytesIO(source.numpy().tobytes()) if isinstance(source, torch.Tensor) else source
    return torch.from_numpy(numpy.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).contiguous()


def declare_missing_operators(package_folder: Path) -> bool:
    import torch

    for extension in package_folder.glob("_C*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return True


class TorchvisionLoader(SourceFileLoader):
    def exec_module(self, module):
        missing = declare_missing_operators(Path(self.path).parent)
        super().exec_module(module)
        if missing:
            module.io.decode_image = decode_image


class TorchvisionFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = TorchvisionLoader(spec.loader.name, spec.loader.path)
        return spec


def install():
    site_packages = Path(sysconfig.get_paths()["purelib"])
    (site_packages / "torchvision_cpu_shim.py").write_text(Path(__file__).read_text())
    (site_packages / "torchvision_cpu_shim.pth").write_text("import torchvision_cpu_shim\n")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, TorchvisionFinder)
