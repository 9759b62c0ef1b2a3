"""The suite's data: split by source, reproducible, its answers in what is drawn, its chance levels as stated."""

import math
from collections import Counter

import numpy as np
import pytest
from datasets import load_from_disk

from linmu_hf.data import check_dataset, encode_rows, load_rows
from linmu_hf.testbed.suite import charts, make_data, words
from linmu_hf.testbed.suite.data import (
    EVALUATION_SPLITS,
    converse,
    evaluation_rows,
    evaluation_scenes,
    source_split,
    to_row,
    training_rows,
    training_scene,
    training_scenes,
)
from linmu_hf.testbed.suite.encoding import encode, token_grid
from linmu_hf.testbed.suite.in_words import TOLD_TASKS, begun_answer, in_words
from linmu_hf.testbed.suite.processor import build_processor
from linmu_hf.testbed.suite.sources import (
    CHART_STYLES,
    COLOURS,
    DRAWINGS,
    FONTS,
    ICON_NAMES,
    ICON_SIZES,
    SPLITS,
    font_bytes,
    load_icons,
    sources,
)
from linmu_hf.testbed.suite.tasks import KIND_OF_TASK, KINDS, TASKS, chance
from linmu_hf.testbed.suite.vision_heads import HEADS, token_targets


SLOW_TO_DRAW = ("bars", "table")


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def text_in(scene, left, top, right, bottom, picture=0):
    """The characters whose middle is in a box, from left to right."""
    found = []
    for item in scene.items:
        x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
        if item.kind == "letter" and item.picture == picture and left <= x < right and top <= y < bottom:
            found.append((x, item.label))
    return "".join(label for _, label in sorted(found))


def icon_in(scene, left, top, right, bottom):
    (name,) = [
        item.label
        for item in scene.items
        if item.kind == "icon" and left <= item.box[0] < right and top <= item.box[1] < bottom
    ]
    return name


def cell_box(scene, row, column, rows, columns):
    height, width = scene.images[0].shape[:2]
    return column * width / columns, row * height / rows, (column + 1) * width / columns, (row + 1) * height / rows


def answer_from_items(scene, question):
    """The answer by what is drawn where; the scene's own facts only say how large its grid is, and what was told."""
    asked = question.removeprefix(scene.opening).removesuffix("?").split()
    if scene.kind == "words":
        if asked[0] == "what":
            return text_in(scene, 0, 0, 999, 999)
        rows = scene.images[0].shape[0] // words.HEIGHT
        row, column = words.ROWS[rows].index(asked[1]), words.COLUMNS[rows].index(asked[2])
        return text_in(scene, *cell_box(scene, row, column, rows, rows))
    if scene.kind == "bars":
        tall = {item.colour: item.box[3] - item.box[1] for item in scene.items}
        if asked[1] == "bar":
            height = scene.images[0].shape[0]
            return str(round(tall[asked[0]] / (0.9 * height / 10)))
        return max(asked[1], asked[3], key=tall.__getitem__)
    if scene.kind in ("table", "icons"):
        grid = scene.facts["cells" if scene.kind == "table" else "names"]
        if asked[-1] == "color":
            return next(item.colour for item in scene.items if item.label == asked[0])
        box = cell_box(scene, int(asked[2]) - 1, int(asked[4]) - 1, len(grid), len(grid[0]))
        return text_in(scene, *box) if scene.kind == "table" else icon_in(scene, *box)
    if scene.kind == "page":
        lines = [text_in(scene, 0, top, 999, top + 16) for top in range(0, scene.images[0].shape[0], 16)]
        (line,) = [line for line in lines if line.lower().startswith(f"{asked[0]}:")]
        return line.split(":")[1]
    shown = {item.picture: item.label for item in scene.items if item.kind == "icon"}
    if scene.kind == "several":
        if asked[0] == "which":
            return str(next(n for n, name in shown.items() if name == asked[-1]) + 1)
        return "yes" if shown[int(asked[1]) - 1] == shown[int(asked[3]) - 1] else "no"
    if scene.kind == "memory":
        told = scene.opening.replace(".", "").split()
        return shown[0] if asked[1] == "picture" else told[told.index(asked[1]) + 2]
    if asked[0] == "which":
        return next(item.label for item in scene.items if item.kind == "letter")
    if asked[0] == "said":
        said = scene.opening.replace(".", "").split()
        return said[said.index(asked[2]) + 1]
    if asked[0] == "how":
        return str(list(shown.values()).count(asked[2]))
    return min((moment, name) for moment, name in shown.items() if name in (asked[0], asked[2]))[1]


def few(kind, many=12):
    return 3 if kind in SLOW_TO_DRAW else many


@pytest.mark.parametrize("split", EVALUATION_SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_what_is_drawn(task, split):
    for scene, turns in evaluation_scenes(task, few(KIND_OF_TASK[task], 6), split):
        question, answer = turns[-1]
        assert answer == answer_from_items(scene, question), question


@pytest.mark.parametrize("kind", KINDS)
def test_training_answers_follow_from_what_is_drawn(kind):
    rng = np.random.default_rng(5)
    for _ in range(few(kind)):
        scene = training_scene(rng, kind)
        for question, answer in converse(rng, scene):
            if kind == "memory" and not question.startswith("the "):
                assert answer == question.split()[-1].strip(".") or answer == "yes"
            elif not (kind == "memory" and answer == "yes"):
                assert answer == answer_from_items(scene, question), question


def test_a_wrong_fact_is_noticed():
    scene, _ = next(evaluation_scenes("place", 1))
    place = next(iter(scene.facts["words"]))
    scene.facts["words"] = {place: "WRONG"}
    question, answer = KINDS["words"].ask(np.random.default_rng(0), scene, "place")
    assert answer == "WRONG" != answer_from_items(scene, question)


def test_sources_are_split():
    train, test = (sources(split) for split in SPLITS)
    for name in ("fonts", "words", "numbers", "drawings", "chart_styles"):
        one, other = (set(getattr(of, name)) for of in (train, test))
        assert one and other and not one & other, name
    assert train.icons == test.icons == ICON_NAMES
    assert set(train.fonts) | set(test.fonts) == set(FONTS) and set(train.drawings) | set(test.drawings) == set(
        DRAWINGS
    )
    assert not set(ICON_SIZES["train"]) & set(ICON_SIZES["test"])
    assert len(train.fonts) >= 12 and len(test.fonts) >= 4 and len(train.words) >= 100
    # nothing to be had from where a number comes from
    assert {n % 10 for n in train.numbers} == {n % 10 for n in test.numbers} == set(range(10))


def allowed(split):
    of = sources(split)
    names = {f"font:{name}" for name in of.fonts} | {f"word:{word}" for word in of.words}
    names |= {f"number:{n}" for n in of.numbers} | {f"drawing:{name}" for name in of.drawings}
    return names | {f"style:{name}" for name in CHART_STYLES[split]} | {f"size:{n}" for n in ICON_SIZES[split]}


@pytest.mark.parametrize("split", EVALUATION_SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_scenes_are_made_of_the_sources_of_their_split(task, split):
    for scene, _ in evaluation_scenes(task, few(KIND_OF_TASK[task], 6), split):
        assert scene.sources and scene.sources <= allowed(source_split(split))


def test_training_scenes_are_made_of_training_sources():
    for scene, _ in training_scenes(0, 16):
        assert scene.sources <= allowed("train")


@pytest.mark.parametrize("family", FONTS)
def test_fonts_are_what_their_packages_hold(family):
    for bold in (False, True):
        assert font_bytes(family, bold)[:4] in (b"\x00\x01\x00\x00", b"OTTO", b"true")


def test_every_icon_has_a_glyph_of_its_own_in_every_drawing():
    for drawing in DRAWINGS:
        font, characters = load_icons(drawing, 24)
        masks = {name: bytes(font.getmask(character)) for name, character in characters.items()}
        assert len(set(masks.values())) == len(ICON_NAMES), drawing
        assert all(any(mask) for mask in masks.values()), drawing


def answers_of(task, n, split="test"):
    """Questions and answers, eight different ones of a scene that is slow to draw."""
    kind, rng, asked = KINDS[KIND_OF_TASK[task]], np.random.default_rng(9), []
    each = 8 if task == "cell" else 3 if KIND_OF_TASK[task] in SLOW_TO_DRAW else 1
    while len(asked) < n:
        scene = kind.compose(rng, sources(split), **kind.layout_for(rng, task, False))
        drawn: dict[str, str] = {}
        while len(drawn) < each:
            drawn.update([kind.ask(rng, scene, task)])
        asked += drawn.items()
    return asked[:n]


@pytest.mark.parametrize("task", TASKS)
def test_guessing_gets_the_stated_chance(task):
    n = 200
    asked = answers_of(task, n)
    expected = chance(task)
    if task in ("larger", "order"):  # one of the two that the question names
        named = [question.split("?")[0].split() for question, _ in asked]
        first = np.mean([answer == names[names.index("or") - 1] for names, (_, answer) in zip(named, asked)])
        assert abs(first - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
        return
    if task == "memory":
        by_kind = {kind: Counter(a for q, a in asked if q == f"the {kind}?") for kind in ("code", "word", "picture")}
        guessed = sum(max(counts.values()) for counts in by_kind.values()) / n
    else:
        guessed = max(Counter(answer for _, answer in asked).values()) / n
    # the best answer in hindsight is a little better than the best one beforehand
    assert expected * 0.5 <= guessed < expected + 5 * math.sqrt(expected * (1 - expected) / n)


def test_chance_of_an_unknown_task():
    with pytest.raises(ValueError, match="'signs' must be one of"):
        chance("signs")
    with pytest.raises(ValueError, match="'valid' must be one of train, seen"):
        next(evaluation_rows("sign", 1, "valid"))


def pixels_of(rows):
    return [
        [np.asarray(f).tobytes() for f in (*row["images"], *(f for v in row["videos"] for f in v))] for row in rows
    ]


def test_rows_are_reproducible_and_depend_on_their_seed():
    once, again, other = (list(training_rows(seed, 8)) for seed in (3, 3, 4))
    assert [row["messages"] for row in once] == [row["messages"] for row in again]
    assert pixels_of(once) == pixels_of(again) != pixels_of(other)
    assert pixels_of(training_rows(3, 4)) == pixels_of(once)[:4]  # row i does not depend on how many are asked for
    for task in ("sign", "order"):
        assert pixels_of(evaluation_rows(task, 2)) == pixels_of(evaluation_rows(task, 2))
        assert pixels_of(evaluation_rows(task, 2)) != pixels_of(evaluation_rows(task, 2, "seen"))


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_equals_the_processors(kind, processor):
    of = KINDS[kind]
    layout = of.layout(np.random.default_rng(3), of.levels)
    samples = []
    for i in range(2):
        rng = np.random.default_rng(i)
        scene = training_scene(rng, kind, **layout)
        samples.append((scene, converse(rng, scene)))
    rows = [to_row(scene, turns, kind, "") for scene, turns in samples]
    check_dataset(rows, processor)
    fast, whole = encode(processor, samples), encode_rows(processor, rows)
    for name in set(whole) - {"attention_mask"}:
        assert np.array_equal(fast[name], whole[name]), name
    assert fast["input_ids"].shape[1] < 300


@pytest.mark.parametrize("task", TASKS)
def test_rows_beyond_training_are_larger_and_fit(task, processor):
    row, large = (next(evaluation_rows(task, 1, split)) for split in ("test", "beyond"))
    check_dataset([row, large], processor)
    one, other = (encode_rows(processor, [r])["input_ids"].shape[1] for r in (row, large))
    assert one < other < 1200
    if row["videos"]:
        assert 32 <= len(row["videos"][0]) <= 64 < len(large["videos"][0]) <= 512


def test_words_of_questions_are_tokens_and_words_of_signs_are_spelled(processor):
    for name in ICON_NAMES:
        assert len(processor.tokenizer.tokenize(name)) == 1 == len(processor.tokenizer.tokenize(f" {name}")), name
    for word in ("STOP", "ZEBRA", "42"):
        assert processor.tokenizer.tokenize(word) == list(word)


def test_tokens_know_what_they_show():
    scene, _ = next(evaluation_scenes("place", 1))
    targets = token_targets(scene)
    assert targets["letter"].shape == (*token_grid(scene), 4)
    assert (targets["letter"] > 0).sum() == sum(len(word) for word in scene.facts["words"].values())
    scene, _ = next(evaluation_scenes("order", 1))
    targets = token_targets(scene)
    shown = {moment for moment, _ in scene.facts["shown"]}
    for name in ("icon", "this icon"):
        assert set(np.flatnonzero(targets[name].reshape(len(targets[name]), -1).any(1))) == shown


def told(targets, name):
    """What a head has to say: `{(row, column): text}` of the first picture."""
    labels = HEADS[name].labels
    rows, columns = np.nonzero((targets[name][0] > 0).any(-1))
    spelled = {at: targets[name][0][at] for at in zip(rows.tolist(), columns.tolist())}
    return {at: "".join(labels[value - 1] for value in values if value) for at, values in spelled.items()}


def test_a_token_tells_what_begins_in_it():
    page = training_scene(np.random.default_rng(3), "page")
    targets = token_targets(page)
    written, fields = told(targets, "word"), told(targets, "field")
    assert {name: written[at] for at, name in fields.items()} == page.facts["fields"]
    assert sorted(set(written.values()) - set(page.facts["fields"].values())) == sorted(
        f"{name.capitalize()}:" for name in page.facts["fields"]
    )
    assert [row for row, _ in sorted(fields)] == list(range(len(fields)))  # a line is a row of tokens

    drawn = training_scene(np.random.default_rng(3), "icons")
    targets = token_targets(drawn)
    names = {
        (2 * row, 2 * column): name
        for row, line in enumerate(drawn.facts["names"])
        for column, name in enumerate(line)
    }
    assert told(targets, "this icon") == names  # a place is two tokens wide and high
    colours = told(targets, "this colour")
    assert all(
        colours[at] == drawn.facts["colors"][name] for at, name in names.items() if name in drawn.facts["colors"]
    )

    table = training_scene(np.random.default_rng(3), "table")
    cells = told(token_targets(table), "word")
    assert [cells[at] for at in sorted(cells)] == [str(cell) for line in table.facts["cells"] for cell in line]

    bars = training_scene(np.random.default_rng(3), "bars")
    targets = token_targets(bars)
    heights, colours = told(targets, "this bar"), told(targets, "this colour")
    assert {colours[at]: int(height) for at, height in heights.items()} == bars.facts["bars"]


def test_bars_are_as_high_as_they_say():
    scene = charts.compose_bars(np.random.default_rng(0), sources("train"), 3, (96, 64))
    assert sorted(round(item.box[3] - item.box[1]) for item in scene.items) == sorted(
        round(0.9 * 64 * value / 10) for value in scene.facts["bars"].values()
    )
    for item in scene.items:
        left, top, right, bottom = item.box
        column = scene.images[0][:, round((left + right) / 2)].astype(int)
        distance = np.abs(column - COLOURS[item.colour]).max(1)
        assert distance[round((top + bottom) / 2)] < 10 and distance[max(0, round(top) - 4)] > 40, item


def test_the_data_set_has_its_splits(tmp_path, processor):
    make_data.make_data(tmp_path / "data", train=8, test=2, tasks=("sign", "needle", "memory"))
    for split, n in (("train", 8), ("seen", 6), ("test", 6), ("beyond", 6)):
        rows = load_rows(str(tmp_path / "data"), split)
        assert len(rows) == n and len(set(rows["id"])) == n, split
        check_dataset(rows, processor)
    test = load_from_disk(str(tmp_path / "data"))["test"]
    assert test["task"][:] == ["sign", "sign", "needle", "needle", "memory", "memory"]
    assert test[0]["images"][0].tobytes() == next(evaluation_rows("sign", 1))["images"][0].tobytes()
    assert (tmp_path / "data" / make_data.EXAMPLES).is_file()


def test_an_interrupted_data_set_is_none(tmp_path, monkeypatch):
    def fail(seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_data, "draw_examples", fail)
    with pytest.raises(KeyboardInterrupt):
        make_data.make_data(tmp_path / "data", train=1, test=1, splits=("test",), tasks=("needle",))
    assert not (tmp_path / "data").exists()


def test_wrong_numbers_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        make_data.main(["--output", str(tmp_path / "data"), "--test", "0"])
    assert "--test 0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("task", TOLD_TASKS)
def test_what_is_told_holds_the_answer(task):
    for scene, turns in evaluation_scenes(task, 4):
        told, (question, answer) = in_words(scene, turns), turns[-1]
        assert [answer for _, answer in told] == [answer for _, answer in turns] and told[1:] == turns[1:]
        text = told[0][0]
        begun = begun_answer(scene, turns)
        if task in ("value", "cell", "field"):
            assert f"{begun} {answer}" in text.splitlines()
        elif task == "count":
            assert text.count(f": {question.split()[-1][:-1]}\n") == int(answer)
        elif task == "order":
            one, _, other, _ = question.removeprefix(scene.opening).split()
            assert min((one, other), key=lambda name: text.index(f": {name}\n")) == answer
        else:
            said = {
                "needle": f": number {answer}\n",
                "subtitle": f"{begun[5:-1]} {answer}.",
                "larger": f"{answer} bar: ",
            }
            assert said.get(task, f"{begun} {answer}.") in text


def test_what_must_be_seen_is_not_told():
    with pytest.raises(ValueError, match="'words' must be one of bars, table"):
        in_words(*next(evaluation_scenes("sign", 1)))
