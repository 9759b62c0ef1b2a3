"""Three-stage distillation of a teacher into its LinMU student (Sec. 3.2)."""

try:
    from .collator import DistillCollator, EncodedDataset
    from .config import DistillConfig
    from .runner import distill
    from .stages import PAPER_STAGES, Stage
    from .targets.fill import decode_pseudo_targets
    from .targets.store import PseudoTargets
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
    "PseudoTargets",
    "Stage",
    "decode_pseudo_targets",
    "distill",
]
