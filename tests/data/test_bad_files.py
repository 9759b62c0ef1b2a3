"""Files that are empty, broken or of another encoding are named in one line; missing pictures hide no others."""

import json

import pytest
from synthetic import image

from linmu_hf.data import bad_rows, load_rows, read_row
from linmu_hf.data import json_stream as json_stream_module


pytestmark = pytest.mark.core_training


ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]}
TEXT, LIST = json.dumps(ROW), json.dumps([ROW])


def picture_row(path):
    return {"image": path, "conversations": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "7"}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Holds a picture, and is not where the command is run."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    image(8, 8).save(tmp_path / "data" / "b.png")
    image(8, 8).save(tmp_path / "elsewhere" / "here.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "data"


@pytest.mark.parametrize("first", ["gone.png", "here.png", "/gone.png", "A" * 1000, None])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_picture_decides_for_no_other(folder, first, streaming):
    rows = [picture_row(first), *[picture_row("b.png")] * 3, picture_row(None)]
    (folder / "train.json").write_text(json.dumps(rows))
    loaded = list(load_rows(str(folder / "train.json"), streaming=streaming))
    assert [row["image"] for row in loaded] == [first, *[str(folder / "b.png")] * 3, None]


def test_a_picture_that_has_come_since_is_found(folder):
    (folder / "train.json").write_text(json.dumps([picture_row("b.png"), picture_row("late.png")]))
    assert load_rows(str(folder / "train.json"))["image"][1] == "late.png"
    image(8, 8).save(folder / "late.png")
    assert load_rows(str(folder / "train.json"))["image"][1] == str(folder / "late.png")


def test_a_video_that_is_found_late(folder):
    rows = [{"video_name": name, "question": "what?", "answer": "8"} for name in [*["none"] * 1100, "one"]]
    (folder / "one.mp4").touch()
    (folder / "train.json").write_text(json.dumps(rows))
    loaded = load_rows(str(folder / "train.json"))
    assert read_row(loaded[1100])["videos"] == [str(folder / "one.mp4")] and read_row(loaded[0])["videos"] == ["none"]


READ = {
    "BOM": ("\ufeff" + TEXT, 1),
    "BOM and list": ("\ufeff" + LIST, 1),
    "pretty": (json.dumps(ROW, indent=4), 1),
    "pretty ones": (json.dumps(ROW, indent=4) * 2, 2),
    "one line": (TEXT + TEXT, 2),
    "list and space": (LIST + "\n \n", 1),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_read(folder, monkeypatch, name, streaming):
    text, number = READ[name]
    monkeypatch.setattr(json_stream_module, "CHUNK", 3)
    (folder / "train.json").write_text(text)
    rows = list(load_rows(str(folder / "train.json"), streaming=streaming))
    assert [read_row(row)["messages"] for row in rows] == [read_row(ROW)["messages"]] * number


REFUSED = {
    "empty": (b"", "has no rows"),
    "blank": (b"\n \n", "has no rows"),
    "no entry": (b"[]", "has no rows"),
    "two lists": ((LIST + LIST).encode(), "row 1: .*after the end of the list"),
    "garbage": ((LIST + "x").encode(), "row 1: 'x' comes after the end of the list"),
    "two commas": (f"[{TEXT},,{TEXT}]".encode(), "row 1: Expecting value"),
    "no comma": (f"[{TEXT} {TEXT}]".encode(), "row 1: .* a comma or `]` belongs"),
    "a comma too many": (f"[{TEXT},]".encode(), "row 1: there is a comma after the last row"),
    "no end": (f"[{TEXT}".encode(), "row 1: '' comes"),
    "null": (b"null", "row 0: it is None and no object"),
    "bad second row": ((TEXT + "\n{no\n" + TEXT).encode(), "row 1: Expecting property name .* at 'no"),
    "Latin": (TEXT.replace("hi", "\u00e9").encode("latin-1"), "row 0 or after: .*: save the file as UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_refused(folder, name, streaming):
    content, expected = REFUSED[name]
    (folder / "train.json").write_bytes(content)
    # Without streaming `datasets` reads what comes after the first row.
    expected = expected if streaming or "row 1" not in expected else "cannot be read"
    with pytest.raises(ValueError, match=rf"train\.json.* {expected}") as refused:
        list(load_rows(str(folder / "train.json"), streaming=streaming))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_folders_are_named(folder, streaming):
    (folder / "train.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data has no rows"):
        load_rows(str(folder), streaming=streaming)
    (folder / "train.jsonl").write_bytes(f"{TEXT}\n{TEXT}\n".replace("hi", "hi\u00e9").encode("latin-1"))
    if streaming:
        with pytest.raises(ValueError, match=r"train\.jsonl cannot be read .*save the file as UTF-8"):
            load_rows(str(folder), streaming=True)
    else:
        (_, first), (_, second) = bad_rows(load_rows(str(folder)))
        assert str(first).startswith("row 0") and str(second).startswith("row 1 cannot be read: 'utf-8'")
    (folder / "bad.parquet").write_bytes(b"PAR")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read: Parquet file size is 3"):
        load_rows(str(folder / "bad.parquet"), streaming=streaming)


def test_paths_of_no_name(folder, monkeypatch):
    for path in ("", " "):
        with pytest.raises(ValueError, match="the dataset's path is empty: give a folder"):
            load_rows(path)
    (folder / "train.jsonl").write_text(TEXT)
    monkeypatch.chdir(folder)
    assert len(load_rows(".")) == 1
