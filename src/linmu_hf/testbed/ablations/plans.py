"""Which students a plan compares. A plan is a function from the recipe's stages to the rows of its table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...distillation.stages import FLEX, LORA, SWIN, Stage
from ...modeling.configuration_linmu import PRESETS, LinMUTextConfig


# The testbed's grids are small: windows of 4x4 tokens and two moments make Local-Swin local there.
WINDOWS = {"window_size": [2, 2, 2], "image_window_size": [1, 4, 4], "timescale_range": [4.0, 1024.0]}

INIT = "init"  # measured before the first stage
FLEX_WITHOUT_FUSION = r"\.mixer\.(?!local_swin\.|[qkvo]_proj\.|(text_)?fusion_proj\.)"
FLEX_FORWARD = r"\.mixer\.(?!local_swin\.|[qkvo]_proj\.|flex_ma\.(reverse_scan|gate_proj)\.)"
LARGER_THAN_ANY = 1 << 12  # side of a window that holds whole pictures and videos


@dataclass(frozen=True)
class Start:
    """
    The state of a student before its first step.

    Args:
        preset (`str`), options (`dict`): as in `linmu_hf.conversion.convert`.
        calibrate (`bool`): whether the output maps and lambda are fitted in closed form.
        branch (`str`): `"flex"` or `"swin"` fixes lambda at 1 or 0, so that the other branch has no effect;
            `"forward"` fixes the gate of Eq. 3 at 1, so that the reverse scan has none.
    """

    preset: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    calibrate: bool = False
    branch: Literal["both", "flex", "swin", "forward"] = "both"


@dataclass(frozen=True)
class Row:
    """
    One row of a table.

    Args:
        label (`str`): what it says in the table.
        stages (`tuple[Stage, ...]`): what the student goes through.
        start (`Start`): how it starts.
        after (`str`, *optional*): the stage after which it is measured, or `"init"`; by default the last stage.
        paper (`tuple[float, ...]`): what the paper reports, in percent, for each of its benchmarks.
    """

    label: str
    stages: tuple[Stage, ...]
    start: Start = field(default_factory=Start)
    after: str | None = None
    paper: tuple[float, ...] = ()

    @property
    def measured(self) -> str:
        return self.stages[-1].name if self.after is None else self.after


Plan = Callable[..., list[Row]]


def scale_steps(stages: Sequence[Stage], factor: float) -> tuple[Stage, ...]:
    """Returns the stages with `factor` times the steps, at least one each."""
    return tuple(replace(stage, max_steps=max(1, round(factor * stage.max_steps))) for stage in stages)


def weigh(stages: Sequence[Stage], loss: str, factor: float) -> tuple[Stage, ...]:
    """
    Returns the stages with one loss weight times `factor`. A teacher-fed stage has no loss but `hid`: without it, its
    steps go to the next stage, so that the number of steps stays.
    """
    changed, waiting = [], 0
    for stage in stages:
        weight = factor * getattr(stage, loss)
        if stage.hidden_input == "teacher" and loss == "hid" and weight == 0:
            waiting += stage.max_steps
            continue
        changed.append(replace(stage, **{loss: weight, "max_steps": stage.max_steps + waiting}))
        waiting = 0
    if waiting or not changed:
        raise ValueError(f"the plan loss_terms takes L_{loss} away, which leaves the last stage nothing to learn from")
    return tuple(changed)


def loss_terms(stages: tuple[Stage, ...]) -> list[Row]:
    """
    Returns Table 3's rows. Stages that learn from true answers also learn from the teacher's, with the same weight.
    """
    base = tuple(replace(stage, seq=stage.seq or stage.sup) for stage in stages)
    for loss in ("hid", "seq", "sup"):
        if not any(getattr(stage, loss) for stage in base):
            raise ValueError(f"the plan loss_terms changes L_{loss}, which no stage of this recipe has")
    return [
        Row("all terms", base, paper=(60.1, 58.8, 69.4, 70.1)),
        Row("without L_sup", weigh(base, "sup", 0), paper=(58.7, 58.6, 69.1, 69.8)),
        Row("without L_seq", weigh(base, "seq", 0), paper=(59.2, 57.1, 68.5, 68.2)),
        Row("without L_hid", weigh(base, "hid", 0), paper=(58.1, 56.6, 67.9, 68.6)),
        Row("2 L_sup", weigh(base, "sup", 2), paper=(60.8, 56.9, 68.2, 69.3)),
        Row("2 L_seq", weigh(base, "seq", 2), paper=(59.4, 58.2, 68.8, 69.5)),
        Row("2 L_hid", weigh(base, "hid", 2), paper=(59.9, 58.9, 69.1, 69.4)),
    ]


def stages_one_by_one(stages: tuple[Stage, ...]) -> list[Row]:
    """
    Returns Table 2's rows. `all in one stage` trains everything on all losses, for as many steps as all stages
    together.
    """
    reported = {"stage-1": (48.7, 38.5, 58.3, 52.9), "stage-2": (56.7, 52.7, 65.2, 63.4)}
    reported["stage-3"] = (60.1, 58.8, 69.4, 70.1)
    fed = [stage for stage in stages if stage.hidden_input == "student"]
    if not fed:
        raise ValueError("the plan stages needs a stage with hidden_input: student")
    most: dict[str, Any] = {
        name: max(getattr(stage, name) for stage in fed)
        for name in ("learning_rate", "hid", "tok", "seq", "sup", "lora_r")
    }
    trains = tuple(dict.fromkeys(pattern for stage in fed for pattern in stage.trains))
    alpha = next((stage.lora_alpha for stage in fed if stage.lora_r == most["lora_r"]), None)
    one = Stage("all-in-one", trains, sum(stage.max_steps for stage in stages), lora_alpha=alpha, **most)
    return [
        Row("all stages", stages, paper=reported["stage-3"]),
        *(Row(f"up to {s.name}", stages, after=s.name, paper=reported.get(s.name, ())) for s in stages[-2::-1]),
        Row("initialisation", stages, after=INIT, paper=(39.3, 29.4, 48.7, 43.2)),
        Row("all in one stage", (one,), paper=(57.3, 54.2, 66.8, 67.0)),
    ]


def branches(stages: tuple[Stage, ...]) -> list[Row]:
    """Returns Table 4's rows. A branch is off by value: lambda is fixed, and what is left is what trains."""
    without_swin = {FLEX: FLEX_WITHOUT_FUSION, SWIN: None}
    flex_alone = Start(options={"text_window": 0, "sink_tokens": 0}, branch="flex")
    return [
        Row("both branches", stages, paper=(58.8, 69.4, 70.1)),
        Row("Flex-MA alone", _train(stages, without_swin), flex_alone, paper=(51.3, 62.9, 62.7)),
        Row("Local-Swin alone", _train(stages, {FLEX: SWIN}), Start(branch="swin"), paper=(30.2, 45.4, 36.1)),
    ]


def _train(stages: tuple[Stage, ...], changed: dict[str, str | None]) -> tuple[Stage, ...]:
    """Returns the stages with other patterns of what trains, `None` for none."""
    unknown = {pattern for stage in stages for pattern in (*stage.trains, *stage.learning_rates)} - {FLEX, SWIN, LORA}
    if unknown:
        raise ValueError(f"a branch is closed where flex, swin and lora train, not {sorted(unknown)}")
    result = []
    for stage in stages:
        trains = dict.fromkeys(changed.get(pattern, pattern) for pattern in stage.trains)
        rates = {changed.get(key, key): rate for key, rate in stage.learning_rates.items()}
        if any(trains):
            result.append(
                replace(
                    stage,
                    trains=tuple(filter(None, trains)),
                    learning_rates={key: rate for key, rate in rates.items() if key in trains and key is not None},
                )
            )
    return tuple(result)


def initialisation(stages: tuple[Stage, ...]) -> list[Row]:
    """Returns a row for each way a student can start, each distilled in the same way."""
    return [
        Row("default", stages),
        Row("default, calibrated", stages, Start(calibrate=True)),
        Row("timescales of Mamba2", stages, Start(options={"timescale_init": "mamba2"})),
        Row("preset paper", stages, Start(preset="paper")),
    ]


def referees(stages: tuple[Stage, ...], options: Mapping[str, Any] | None = None) -> list[Row]:
    """
    Returns the rows that referees of the paper asked for: windows, one direction, scan orders, branches, text windows
    and sinks.

    Args:
        stages (`tuple[Stage, ...]`): what every student goes through.
        options (`Mapping[str, Any]`, *optional*): the M-MATE fields of all students; rows change these.

    Raises:
        `ValueError`: The options leave a row nothing to change.
    """
    defaults = LinMUTextConfig()
    names = ("window_size", "image_window_size", "scan_orders", "text_window", "sink_tokens")
    base = {name: getattr(defaults, name) for name in names} | PRESETS["default"] | dict(options or {})
    small = {"text_window": base["text_window"] // 64}
    changes: dict[str, dict[str, Any]] = {
        "windows of half the size": _windows(base, 0.5),
        "windows of twice the size": _windows(base, 2),
        "windows of the whole picture or video": _windows(base, LARGER_THAN_ANY),
        "scan order thw": {"scan_orders": ["thw"]},
        "scan orders thw, hwt": {"scan_orders": ["thw", "hwt"]},
        "no text window, no sinks": {"text_window": 0, "sink_tokens": 0},
        f"text window of {small['text_window']}": {**small, "sink_tokens": base["sink_tokens"]},
        f"text window of {small['text_window']}, no sinks": {**small, "sink_tokens": 0},
    }
    for label, change in changes.items():
        if change.items() <= base.items() or not base["text_window"] >= 64:
            raise ValueError(
                f"the plan referees has nothing to change for its row {label!r}: give --mixer_options with windows of "
                "at least 2, several scan_orders and a text_window of at least 64"
            )
    forward = _train(stages, {FLEX: FLEX_FORWARD})
    one_order = Start(options={"scan_orders": ["thw"]}, branch="forward")
    as_it_is, *alone = branches(stages)
    rows = [Row(label, stages, Start(options=change)) for label, change in changes.items()]
    return [
        replace(as_it_is, label="as it is"),
        *rows[:3],
        Row("one-directional Flex-MA", forward, Start(branch="forward")),
        Row("the same, scan order thw", forward, one_order),
        *rows[3:5],
        *alone,
        *rows[5:],
    ]


def _windows(base: Mapping[str, Any], factor: float) -> dict[str, list[int]]:
    """Returns windows with sides of `factor` times the length; that of an image stays one frame deep."""
    video, image = ([max(1, round(factor * side)) for side in base[f"{kind}window_size"]] for kind in ("", "image_"))
    return {"window_size": video, "image_window_size": [base["image_window_size"][0], *image[1:]]}


BLOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "scan_rope=False": {"scan_rope": False},
    "bc_feature_map=None": {"bc_feature_map": None},
    "timescale_init=mamba2": {"timescale_init": "mamba2"},
    "output_norm=layer_norm": {"output_norm": "layer_norm"},
    "gate=channel": {"gate": "channel"},
    "conv_kernel=1": {"conv_kernel": 1},
    "reverse_scope=sequence": {"reverse_scope": "sequence"},
    "scan_orders=thw": {"scan_orders": ["thw"]},
    "window_wrap=True": {"window_wrap": True},
    "state_size=64": {"state_size": 64},
    "state_size=128": {"state_size": 128},
    "state_size=512": {"state_size": 512},
}
ALIGN = Stage("align", (FLEX, SWIN), 120, 2e-3, hid=1.0, hidden_input="teacher")


def block(stages: tuple[Stage, ...]) -> list[Row]:
    """
    Returns rows that change one choice inside the block each, after 120 teacher-fed steps in any recipe:
    docs/decisions.md.
    """
    rows = [Row(label, (ALIGN,), Start(options=options)) for label, options in BLOCK_OPTIONS.items()]
    return [*rows, Row("preset=paper", (ALIGN,), Start(preset="paper"))]


PLANS: dict[str, Plan] = {
    "loss_terms": loss_terms,
    "stages": stages_one_by_one,
    "branches": branches,
    "initialisation": initialisation,
    "referees": referees,
    "block": block,
}
TITLES = {
    "loss_terms": "Loss terms (Table 3)",
    "stages": "Stages (Table 2)",
    "branches": "Branches (Table 4)",
    "initialisation": "Initialisation",
    "referees": "What referees asked for",
    "block": "Inside the block",
}
INTRODUCTIONS = {
    "referees": """\
One thing changed at a time, in a student that is trained anew. `whole scene` is the accuracy on the tasks whose answer
may be anywhere in the clip, `when` ("when is 7?") and `first` ("7 or 3 first?"): the question names no place, so all
frames have to be read, and the second one compares what is in two of them. `cell`, `below` and `large` name row and
column of the one cell that they are about. The testbed has no question that counts. Windows of the whole picture
or video make Local-Swin full attention within it. `Flex-MA alone` has the global scan and no window, not of text
either; `Local-Swin alone` has nothing global. One-directional is by value: the gate of Eq. 3 is fixed at the forward
scan, and the reverse scan and the gate do not train.""",
}
