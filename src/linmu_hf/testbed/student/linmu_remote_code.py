"""The classes of this model, from the package linmu-hf (pip install linmu-hf)."""

try:
    from linmu_hf import *  # noqa: F403
except ModuleNotFoundError as error:
    if error.name != "linmu_hf":
        raise
    raise ImportError(
        "This is a LinMU model; its code is in a package that is not installed. Run `pip install linmu-hf`"
    ) from None
