"""Three-stage distillation of a teacher into its LinMU student (Sec. 3.2)."""

try:
    from .collator import DistillCollator, EncodedDataset
    from .config import DistillConfig
    from .pseudo_targets import decode_pseudo_targets
    from .runner import distill
    from .stages import PAPER_STAGES, Stage
    from .trainer import DistillTrainer
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "peft"):
        raise
    raise ImportError(f'distillation needs {error.name}: pip install "linmu-hf[train]"') from error


__all__ = [
    "PAPER_STAGES",
    "DistillCollator",
    "DistillConfig",
    "DistillTrainer",
    "EncodedDataset",
    "Stage",
    "decode_pseudo_targets",
    "distill",
]
