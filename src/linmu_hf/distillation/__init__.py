"""Three-stage distillation of a teacher into its LinMU student (Sec. 3.2)."""

try:
    from .config import DistillConfig
    from .recipes import format_stages, read_stages, recipe_file
    from .rows.collator import DistillCollator, EncodedDataset
    from .runner import distill
    from .stages import Stage
    from .targets.fill import decode_pseudo_targets
    from .targets.store import PseudoTargets
    from .trainer import DistillTrainer
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("accelerate", "peft"):
        raise
    raise ImportError(f'distillation needs {package}: pip install "linmu-hf[train]"') from error


__all__ = [
    "DistillCollator",
    "DistillConfig",
    "DistillTrainer",
    "EncodedDataset",
    "PseudoTargets",
    "Stage",
    "decode_pseudo_targets",
    "distill",
    "format_stages",
    "read_stages",
    "recipe_file",
]
