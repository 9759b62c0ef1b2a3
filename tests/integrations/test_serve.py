"""`transformers serve` loads a folder by its remote code and answers like `generate`."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.utils.import_utils import is_serve_available

import linmu_hf
from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.testbed.data import evaluation_rows


STUDENT = str(Path(linmu_hf.__file__).parent / "testbed" / "student")

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server process in which nobody imported linmu_hf."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("serve")
    arguments = ["serve", STUDENT, "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    start = "from transformers.cli.transformers import main; main()"
    environment = os.environ | {"PYTHONPATH": str(Path(linmu_hf.__file__).parents[1]), "HF_HOME": str(folder)}
    address = f"http://127.0.0.1:{port}"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address, content, stream=False):
    """The assistant's text, joined from the events if streamed."""
    body = {"model": STUDENT, "messages": [{"role": "user", "content": content}], "stream": stream, "max_tokens": 8}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text = urllib.request.urlopen(request, timeout=300).read().decode()
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


def expected(content, **images):
    """The answer of `generate` in this process."""
    processor = AutoProcessor.from_pretrained(STUDENT)
    model = AutoModelForMultimodalLM.from_pretrained(STUDENT, dtype="auto")
    assert type(model) is LinMUForConditionalGeneration
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], return_tensors="pt", **images)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
def test_image_and_text(server, stream):
    (row,) = evaluation_rows("cell", 1)
    question, answer = (message["content"][-1]["text"] for message in row["messages"])
    png = io.BytesIO()
    row["images"][0].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    got = ask(server, content, stream)
    assert got == expected([{"type": "image"}, content[1]], images=row["images"]) == answer
    assert ask(server, question, stream) == expected([content[1]])
