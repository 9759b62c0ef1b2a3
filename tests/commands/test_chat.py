import numpy as np
import pytest
from PIL import Image

from linmu_hf.commands import chat


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (48, 48), (60 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def run(*arguments):
    return chat.main([str(argument) for argument in arguments])


def test_image_and_video_in_one_question(student_folder, picture, frames, capsys):
    run("--model", student_folder, "--image", picture, "--video", frames, "--max_new_tokens", 3, "what is it?")
    assert capsys.readouterr().out.endswith("\n")


def test_stream_prints_the_answer(teacher, processor, picture, capsys):
    conversation = chat.Conversation(teacher, processor, max_new_tokens=4)
    answer = conversation.ask("row 1 column 1?", images=[chat.open_image(str(picture))], stream=True)
    assert capsys.readouterr().out.strip() == answer


def test_conversation_remembers(teacher, processor, picture):
    image = chat.open_image(str(picture))
    conversation = chat.Conversation(teacher, processor, max_new_tokens=4)
    conversation.ask("row 1 column 1?", images=[image])
    conversation.ask("row 2 column 1?")
    conversation.ask("row 3 column 1?", images=[image])
    assert [message["role"] for message in conversation.row["messages"]] == ["user", "assistant"] * 3
    assert len(conversation.row["images"]) == 2


def test_media_are_read_as_in_rows(student_folder, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    Image.new("RGB", (64, 32)).save(tmp_path / "phone.jpg", exif=exif)
    asked = []
    monkeypatch.setattr(chat.Conversation, "ask", lambda self, question, images, videos, stream: asked.append(images))
    run("--model", student_folder, "--image", tmp_path / "phone.jpg", "?")
    assert asked[0][0].size == (32, 64)


def test_conversation_from_standard_input(teacher_folder, picture, monkeypatch, capsys):
    lines = iter(["row 1 column 1?", "/image nowhere.png", f"/image {picture}", "/help", "/new", "how many red?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run("--model", teacher_folder, "--image", picture, "--max_new_tokens", 2)
    printed = capsys.readouterr().out
    assert "nowhere.png does not exist" in printed
    assert printed.count(chat.HELP) == 2


def test_errors_are_one_line(teacher_folder, picture, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(chat, "SHIPPED_STUDENT", tmp_path / "missing")
    cases = {
        "none.png does not exist": ("--model", teacher_folder, "--image", tmp_path / "none.png", "?"),
        "text.png is not an image": ("--model", teacher_folder, "--image", tmp_path / "text.png", "?"),
        "text.mp4 is not a video": ("--model", teacher_folder, "--video", tmp_path / "text.mp4", "?"),
        "empty is empty": ("--model", teacher_folder, "--video", tmp_path / "empty", "?"),
        "is not a folder": ("--model", tmp_path / "none", "--image", picture, "?"),
        "--device gpu is unknown: give cpu or cuda": ("--model", teacher_folder, "--device", "gpu", "?"),
        "name a model with --model": ("?",),
    }
    for expected, arguments in cases.items():
        assert run(*arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("linmu-chat: error: ") and expected in error
