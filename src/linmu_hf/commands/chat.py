"""`linmu-chat`: ask a model about images and videos, once or in a conversation."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ..data import encode_prompts
from ..data.image import open_image
from ..data.video import read_video
from ..evaluation.loading import check_device, load_model, load_processor
from .common import DTYPES, Parser, check_positive, run_command


SHIPPED_STUDENT = Path(__file__).parents[1] / "testbed" / "student"
HELP = "/image FILE and /video FILE attach to the next question, /new starts over, /quit or an empty line leaves"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="linmu-chat", description=__doc__.split(": ", 1)[1])
    parser.add_argument("question", nargs="?", help="without one, a conversation starts")
    parser.add_argument(
        "--model", default=str(SHIPPED_STUDENT), help="folder or Hub id; by default the testbed's student"
    )
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, or a folder of frames")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", help="by default a GPU if there is one")
    return parser.parse_args(argv)


class Conversation:
    """
    A conversation with a model about images and videos.

    Args:
        model (`PreTrainedModel`):
            Any image-text-to-text model.
        processor (`ProcessorMixin`):
            Its processor.
        max_new_tokens (`int`, *optional*, defaults to 256):
            Longest answer.
    """

    def __init__(self, model, processor, max_new_tokens: int = 256):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.row: dict[str, list[Any]] = {"messages": [], "images": [], "videos": []}

    @torch.inference_mode()
    def ask(self, question: str, images=(), videos=(), stream: bool = False) -> str:
        """Asks, with new images and videos before the question; `stream` prints the answer as it comes."""
        content = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
        row = {
            "messages": [
                *self.row["messages"],
                {"role": "user", "content": [*content, {"type": "text", "text": question}]},
            ],
            "images": [*self.row["images"], *images],
            "videos": [*self.row["videos"], *videos],
        }
        unanswered = {**row, "messages": [*row["messages"], {"role": "assistant", "content": ""}]}
        inputs = encode_prompts(self.processor, [unanswered]).to(self.model.device)
        unsaid = self._unsaid()
        streamer = AnswerStreamer(self.processor.tokenizer, unsaid) if stream else None
        ids = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            streamer=streamer,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        said = [i for i in ids[0, inputs["input_ids"].shape[1] :].tolist() if i not in unsaid]
        answer = self.processor.tokenizer.decode(said).strip()
        row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        self.row = row
        return answer

    def _unsaid(self) -> set[int]:
        """Tokens that are no part of an answer: ends and places of pictures. Other special tokens mark boxes in it."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {
            *ends,
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
            processor.image_token_id,
            processor.video_token_id,
        }


class AnswerStreamer(TextStreamer):
    """A streamer that prints an answer as it comes, without the tokens that are not part of it."""

    def __init__(self, tokenizer, unsaid: set[int]):
        super().__init__(tokenizer, skip_prompt=True)
        self.unsaid = unsaid

    def put(self, value):
        if self.next_tokens_are_prompt or int(value) not in self.unsaid:
            super().put(value)


def converse(conversation: Conversation, images: list[Any], videos: list[Any]) -> None:
    """Reads questions from standard input until an empty line."""
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, RuntimeError):  # the latter without a standard input
            return
        command, _, argument = line.partition(" ")
        if not line or command == "/quit":
            return
        try:
            if command == "/image":
                images = [*images, open_image(argument.strip())]
            elif command == "/video":
                videos = [*videos, read_video(argument.strip(), conversation.processor)]
            elif command == "/new":
                conversation, images, videos = _fresh(conversation), [], []
            elif command.startswith("/"):
                print(HELP)
            else:
                conversation.ask(line, images, videos, stream=True)
                images, videos = [], []
        except ValueError as error:
            print(error)


def _fresh(conversation: Conversation) -> Conversation:
    return Conversation(conversation.model, conversation.processor, conversation.max_new_tokens)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def run() -> None:
        check_positive(arguments, "max_new_tokens")
        check_device(arguments.device)
        if arguments.model == str(SHIPPED_STUDENT) and not SHIPPED_STUDENT.is_dir():
            raise ValueError("no student is shipped with this installation: name a model with --model")
        images = [open_image(file) for file in arguments.image]
        processor = load_processor(arguments.model)
        videos = [read_video(file, processor) for file in arguments.video]
        model, _ = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
        conversation = Conversation(model, processor, arguments.max_new_tokens)
        if arguments.question is None:
            converse(conversation, images, videos)
        else:
            conversation.ask(arguments.question, images, videos, stream=True)

    return run_command("linmu-chat", run)


if __name__ == "__main__":
    sys.exit(main())
