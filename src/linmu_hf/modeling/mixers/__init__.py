"""What the rest of the package knows of the mixers."""

import re


# Small changes of a decay, a step size or a gate move every later output.
STEERING = r"\.mixer\..*\b(A_log|dt_bias|dt_proj|gate_proj|fusion_proj)\b"
_NO_DECAY = r"(norm\d?\.|\.bias$|\.D$|conv_weight$|_features$)"


def decays(name: str) -> bool:
    """Whether a parameter is one for weight decay: a matrix of the model, and no small map that steers it."""
    return re.search(f"{STEERING}|{_NO_DECAY}", name) is None
