"""
A model of lmms-eval, for students and teachers alike: both read the same prompts, pictures and frames.

    lmms-eval --model linmu --model_args pretrained=FOLDER --tasks textvqa_val --batch_size 8 --log_samples
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from ...data import answer_text, encode_prompts
from ...data.rows import row_size
from ..loading import check_device, load_model
from ..retention import decode_answer
from .rows import KEEP


LONGEST_ANSWER = 4096  # tokens, where a task names no limit
PARAGRAPH = "\n\n"  # lmms-eval's own end of an answer, where a task names none: chat models end by a token
CLIP = {"start_time": "video_start", "end_time": "video_end"}  # of a part of a video: lmms-eval's names and ours
VIDEO_SETTINGS = ("fps", "num_frames", "min_frames", "max_frames")


class FirstToken(StoppingCriteria):
    """A criterion that stops nothing, and records when the first token was there."""

    def __init__(self):
        self.at: float | None = None

    def __call__(self, input_ids, scores, **kwargs):
        if self.at is None:
            _wait(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class LinMU(lmms):
    """
    Any model that [`load_model`] loads.

    Args:
        pretrained (`str`): Folder or Hub id.
        batch_size (`int`, *optional*, defaults to 1): Questions answered together.
        device (`str`, *optional*): By default a GPU if there is one, each process its own.
        dtype (`str`, *optional*, defaults to `"auto"`): As in [`load_model`].
        max_batch_size: Given by lmms-eval, which means it for batches of a size that it finds: not here.
        fps, num_frames, min_frames, max_frames (*optional*): In place of the video processor's own.

    Raises:
        `ValueError`: An argument is unknown or cannot be used.
    """

    is_simple = False

    def __init__(self, pretrained, batch_size=1, device=None, dtype="auto", max_batch_size=None, **settings):
        super().__init__()
        unknown = sorted(set(settings) - set(VIDEO_SETTINGS))
        if unknown:
            raise ValueError(f"model_args {unknown} are unknown: give pretrained, dtype, {', '.join(VIDEO_SETTINGS)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a number of questions: 1 or more")
        if max_batch_size is not None:
            raise ValueError(f"max_batch_size={max_batch_size} has no effect: give batch_size")
        self.accelerator = Accelerator(cpu=check_device(device).type == "cpu")
        self.device, self.batch_size = self.accelerator.device, int(batch_size)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, self.processor = load_model(pretrained, device=str(self.device), dtype=dtype)
        for name, value in settings.items():
            setattr(self.processor.video_processor, name, value)

    def generate_until(self, requests) -> list[GenerationResult]:
        """Answers each request, in order; those that are decoded alike share batches, the largest first."""
        rows, references = zip(*(self._read(*request.args) for request in requests)) if requests else ((), ())
        ways = [repr(sorted(request.args[2].items())) for request in requests]
        order = sorted(range(len(rows)), key=lambda i: (ways[i], *(-size for size in row_size(rows[i]))))
        results: dict[int, GenerationResult] = {}
        spent, tokens, first = 0.0, 0, []
        progress = tqdm(total=len(rows), desc="answering", unit="row", disable=self.rank != 0)
        while order:
            way = ways[order[0]]
            chosen = [i for i in order[: self.batch_size] if ways[i] == way]
            order = order[len(chosen) :]
            texts, counts, seconds, until_first = self._answer(
                [rows[i] for i in chosen],
                [requests[i].args[3] for i in chosen],
                requests[chosen[0]].args[2],
                [references[i] for i in chosen],
            )
            for i, text, count in zip(chosen, texts, counts):
                results[i] = GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            spent, tokens = spent + seconds, tokens + sum(counts)
            first.append(until_first)
            progress.update(len(chosen))
        progress.close()
        if results:
            log_metrics(spent, tokens, tokens / spent, {"ttft": sum(first) / len(first)})
        return [results[i] for i in range(len(rows))]

    def clean(self):
        """Frees nothing: the same model goes on with the next task."""

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        """
        Answers requests of several rounds, each a conversation of its own: the task makes the next one out of the
        answers before. What a request gives are the answers of its rounds, as the task wants them.
        """
        return [self._answer_rounds(*request.args) for request in tqdm(requests, "answering", disable=self.rank != 0)]

    def _answer_rounds(self, context, doc_to_messages: Callable, how, doc_id, task: str, split: str) -> list[str]:
        document = self.task_dict[task][split][doc_id]
        said: list[str] = []
        messages, known = doc_to_messages(document), None
        for number in itertools.count(1):
            said = [*said, *self._answer([as_row(messages)], [doc_id], how, [""])[0]]
            messages, ended, said, known = doc_to_messages(
                document, round_idx=number, previous_output=said, previous_round_info=known
            )
            if ended:
                break
        return said

    def _read(
        self, context: str, doc_to_messages: Callable, how: Mapping, doc_id: Any, task: str, split: str
    ) -> tuple[dict[str, Any], str]:
        """The row of a request, and the reference whose special tokens an answer keeps."""
        document = self.task_dict[task][split][doc_id]
        return as_row(doc_to_messages(document)), answer_text(document) if how.get(KEEP) else ""

    @torch.inference_mode()
    def _answer(
        self, rows, numbers, how: Mapping[str, Any], references: Sequence[str]
    ) -> tuple[list[str], list[int], float, float]:
        """Texts and tokens of the answers, the seconds for all, and those until their first tokens."""
        tokenizer, first = self.processor.tokenizer, FirstToken()
        inputs = encode_prompts(self.processor, rows, numbers).to(self.device)
        _wait(self.device)
        start = time.perf_counter()
        ids = self.model.generate(
            **inputs, **decoding(how), pad_token_id=tokenizer.pad_token_id, stopping_criteria=[first]
        )
        _wait(self.device)
        seconds = time.perf_counter() - start
        said = ids[:, inputs["input_ids"].shape[1] :]
        texts = [decode_answer(tokenizer, one, reference) for one, reference in zip(said.tolist(), references)]
        counts = (said != tokenizer.pad_token_id).sum(1).tolist()
        return [cut(text, how.get("until")) for text in texts], counts, seconds, (first.at or start) - start

    def loglikelihood(self, requests):
        """Raises a `NotImplementedError`: lmms-eval asks models that read messages for answers alone."""
        raise NotImplementedError("linmu answers in words: leave tasks of log-likelihoods out of --tasks")


def as_row(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns messages of lmms-eval as a row of `linmu_hf.data`, whose answer is not known."""
    read = [
        {**message, "content": [{CLIP.get(key, key): value for key, value in part.items()} for part in content]}
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]
    return {"messages": [*read, {"role": "assistant", "content": "?"}]}


def decoding(how: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `generate` for a task's `generation_kwargs`: greedy unless it has a temperature."""
    sampled = bool(how.get("temperature")) and how.get("do_sample") is not False
    names = ("temperature", "top_p", "top_k") if sampled else ()
    return {
        "do_sample": sampled,
        "num_beams": how.get("num_beams") or 1,
        "max_new_tokens": how.get("max_new_tokens") or LONGEST_ANSWER,
        **{name: how[name] for name in names if how.get(name) is not None},
    }


def cut(text: str, until: str | list[str] | None) -> str:
    """Returns the text before the first of the ends that a task names."""
    for end in [until] if isinstance(until, str) else until or []:
        if end and end != PARAGRAPH:
            text = text.split(end)[0]
    return text.strip()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
