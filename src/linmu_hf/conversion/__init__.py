"""From a teacher's checkpoint to a LinMU checkpoint."""

from .calibrate import CalibrationReport, calibrate
from .convert import ConversionReport, convert
from .teacher import load_processor, load_teacher
from .weight_map import map_teacher_key


__all__ = [
    "CalibrationReport",
    "ConversionReport",
    "calibrate",
    "convert",
    "load_processor",
    "load_teacher",
    "map_teacher_key",
]
