"""Rows of the suite: training conversations, and one question per row for the three test splits.

split    sources     sizes and lengths
train    train       those of training, several questions each
seen     train       those of training: what the teacher was trained on, in new scenes
test     held out    those of training
beyond   held out    larger pictures, more images, longer videos and conversations
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from .drawing import Scene
from .sources import Sources, sources
from .tasks import KIND_OF_TASK, KINDS, TASKS


Turns = list[tuple[str, str]]

EVALUATION_SPLITS = ("seen", "test", "beyond")
QUESTIONS = {"words": 4, "bars": 5, "table": 6, "icons": 6, "page": 4, "several": 4, "clip": 5, "memory": 4}
ASKED_ONCE = ("same",)  # one pair is alike: the others would teach to say no
ACCEPTED = "yes"  # to the facts that a conversation begins with


def source_split(split: str) -> str:
    """Returns `"train"` or `"test"`, the sources of a split."""
    if split not in ("train", *EVALUATION_SPLITS):
        raise ValueError(f"split={split!r} must be one of train, {', '.join(EVALUATION_SPLITS)}")
    return "train" if split in ("train", "seen") else "test"


def start(scene: Scene) -> Turns:
    """Returns the turns before the first question."""
    return [(scene.opening, ACCEPTED), *scene.facts["talk"]] if scene.kind == "memory" else []


def with_opening(scene: Scene, turns: Sequence[tuple[str, str]]) -> Turns:
    """Returns a whole conversation, the scene's opening before its first question."""
    if scene.kind == "memory":
        return [*start(scene), *turns]
    (question, answer), *rest = turns
    return [(scene.opening + question, answer), *rest]


def converse(rng: np.random.Generator, scene: Scene, questions: int | None = None) -> Turns:
    """Draws a training conversation: different questions of the tasks that suit the scene, fewer if it has too few."""
    drawn = draw_questions(rng, scene, questions)
    return with_opening(scene, [(question, answer) for question, answer, _ in drawn])


def draw_questions(
    rng: np.random.Generator, scene: Scene, n: int | None = None, shares: Mapping[str, float] | None = None
) -> list[tuple[str, str, str]]:
    """Draws at most `n` different questions, each with its answer and task; `shares` says how often which task."""
    kind = KINDS[scene.kind]
    wanted, tasks = n or QUESTIONS[scene.kind], kind.tasks_of(scene)
    weights = np.array([1.0 if shares is None else shares[task] for task in tasks])
    drawn: dict[str, tuple[str, str, str]] = {}
    for _ in range(6 * wanted):
        task = tasks[int(rng.choice(len(tasks), p=weights / weights.sum()))]
        question, answer = kind.ask(rng, scene, task)
        # "red or blue?" after "blue or red?" could be answered without looking
        same = " ".join(sorted(question.strip("?").split())) if " or " in question else question
        drawn[same] = (question, answer, task)
        if task in ASKED_ONCE:
            weights[tasks.index(task)] = 0.0
        if len(drawn) == wanted or not weights.any():
            break
    return list(drawn.values())


def training_scene(
    rng: np.random.Generator, kind: str, level: int | None = None, chosen: Sources | None = None, **layout
) -> Scene:
    """Composes a scene of training sources; `layout` fixes what is drawn otherwise."""
    of = KINDS[kind]
    layout = layout or of.layout(rng, level or of.levels)
    return of.compose(rng, chosen or sources("train"), **layout)


def training_scenes(seed: int, n: int) -> Iterator[tuple[Scene, Turns]]:
    """Composes `n` training scenes, the kinds in turn; scene `i` depends on `(seed, i)` alone."""
    kinds = list(KINDS)
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        scene = training_scene(rng, kinds[i % len(kinds)])
        yield scene, converse(rng, scene)


def evaluation_scenes(task: str, n: int, split: str = "test", seed: int = 0) -> Iterator[tuple[Scene, Turns]]:
    """Composes `n` scenes with one question of `task` each; scene `i` depends on all arguments but `n`."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}")
    of, chosen = KINDS[KIND_OF_TASK[task]], sources(source_split(split))
    for i in range(n):
        rng = np.random.default_rng((10**6 + seed, list(TASKS).index(task), EVALUATION_SPLITS.index(split), i))
        scene = of.compose(rng, chosen, **of.layout_for(rng, task, split == "beyond"))
        yield scene, with_opening(scene, [of.ask(rng, scene, task)])


def to_row(scene: Scene, turns: Turns, task: str, name: str) -> dict:
    """Returns a scene and its conversation as a row in TRL's conversational vision format, with `task` and `id`."""
    images = [Image.fromarray(image) for image in scene.images]
    video = None if scene.video is None else [Image.fromarray(frame) for frame in scene.video]
    messages = []
    for i, (question, answer) in enumerate(turns):
        media = [{"type": "image"}] * len(images) + [{"type": "video"}] * (video is not None)
        messages.append({"role": "user", "content": [*(media if i == 0 else []), {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {
        "messages": messages,
        "images": images,
        "videos": [] if video is None else [video],
        "task": task,
        "id": name,
    }


def training_rows(seed: int, n: int) -> Iterator[dict]:
    """Composes `n` training rows of several questions each; `task` names the kind of scene."""
    for i, (scene, turns) in enumerate(training_scenes(seed, n)):
        yield to_row(scene, turns, scene.kind, f"train-{seed}-{i}")


def evaluation_rows(task: str, n: int, split: str = "test", seed: int = 0) -> Iterator[dict]:
    """Composes `n` rows with exactly one question of `task` each."""
    for i, (scene, turns) in enumerate(evaluation_scenes(task, n, split, seed)):
        yield to_row(scene, turns, task, f"{split}-{seed}-{task}-{i}")
