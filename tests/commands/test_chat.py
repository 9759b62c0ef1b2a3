from fractions import Fraction

import numpy as np
import pytest
import torch
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


def test_special_tokens_of_an_answer_stay(teacher, processor, capsys, monkeypatch):
    """Boxes are part of an answer, on the screen and in the conversation; its end is not."""
    said = "<|box_start|>(12,30)<|box_end|>"
    ids = torch.tensor([*processor.tokenizer(said)["input_ids"], processor.tokenizer.eos_token_id])

    def generate(input_ids, streamer, **options):
        streamer.put(input_ids)
        for one in ids:
            streamer.put(one[None])
        streamer.end()
        return torch.cat([input_ids, ids[None]], 1)

    monkeypatch.setattr(teacher, "generate", generate)
    conversation = chat.Conversation(teacher, processor, max_new_tokens=4)
    assert conversation.ask("where?", stream=True) == said
    assert capsys.readouterr().out.strip() == said
    assert conversation.row["messages"][-1]["content"][0]["text"] == said


def test_a_video_has_its_own_rate(student_folder, tmp_path, monkeypatch):
    """A film of one picture in four seconds: two of them are eight seconds apart, in its file and on the way there."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "slow.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(1, 4))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(8):
            picture = np.full((32, 48, 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    batches, encode = [], chat.encode_prompts
    monkeypatch.setattr(chat, "encode_prompts", lambda *given: batches.append(encode(*given)) or batches[-1])
    lines = iter([f"/video {tmp_path / 'slow.mp4'}", "when?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    for words in (["--video", tmp_path / "slow.mp4", "when?"], []):
        run("--model", student_folder, "--max_new_tokens", 1, *words)
        assert batches.pop()["second_per_grid_ts"].tolist() == [8.0]


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


def test_without_a_standard_input(teacher_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert chat.main(["--model", str(teacher_folder)]) == 0


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
