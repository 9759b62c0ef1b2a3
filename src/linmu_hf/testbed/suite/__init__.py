"""Rendered scenes that stand for the paper's benchmarks: words, charts, icons, pages, videos, long conversations."""

from importlib.util import find_spec


_MISSING = [name for name in ("matplotlib", "qtawesome", "pymupdf_fonts", "font_roboto") if find_spec(name) is None]
if _MISSING:
    raise ImportError(f'the suite needs {", ".join(_MISSING)}: pip install "linmu-hf[suite]"')
