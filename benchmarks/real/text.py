"""
The text: documentation that ships with Python packages, split into training and held-out files, as tokens.

A row begins in one of three ways, because a model that is fitted to one kind of beginning is wrong after the others:
`middle` (raw text from anywhere in a file), `beginning` (raw text from the first character of a file) and `chat`
(the chat template around a question, text as the answer).
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from linmu_hf.files import whole_folder

from .download import download


SPLITS = ("train", "held_out")
BEGINNINGS = ("middle", "beginning", "chat")
SMALLEST_FILE = 2_000  # characters
HELD_OUT = 12  # one file in so many
QUESTIONS = ("Go on.", "What does the manual say?", "Please continue the text.", "Explain this to me in detail.")


@dataclass(frozen=True)
class Source:
    """A package whose source archive holds documentation: files under `folder` with these `suffixes`."""

    package: str
    version: str
    licence: str
    folder: str
    suffixes: tuple[str, ...] = (".txt", ".rst", ".md")


SOURCES = (
    Source("Django", "5.2.8", "BSD-3-Clause", "docs"),
    Source("pytest", "9.2.0", "MIT", "doc/en"),
    Source("salt", "3008.5", "Apache-2.0", "doc"),
    Source("docutils", "0.23", "public domain, parts BSD-2-Clause", "docs"),
    Source("Sphinx", "9.0.4", "BSD-2-Clause", "doc"),
    Source("Scrapy", "2.19.0", "BSD-3-Clause", "docs"),
    Source("roundup", "2.6.0", "MIT", "doc"),
)


def read_documents(archive: Path, source: Source) -> Iterator[tuple[str, str]]:
    """Yields name and text of every file of prose in a source archive, in the order of their names."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            path = member.name.partition("/")[2]
            if not member.isfile() or not path.startswith(f"{source.folder}/") or not path.endswith(source.suffixes):
                continue
            text = tar.extractfile(member).read().decode("utf-8", errors="replace").strip()  # type: ignore[union-attr]
            if len(text) >= SMALLEST_FILE and is_prose(text):
                yield f"{source.package}/{path}", text


def is_prose(text: str) -> bool:
    """Returns whether most of a text is English words: tables, lists of names and other languages are not."""
    words = re.findall(r"(?<![\w.])[a-z]{2,}(?![\w.])", text)
    common = sum(word in {"the", "of", "to", "and", "in", "is", "for", "that", "this", "with"} for word in words)
    return common >= 0.01 * len(text.split()) and sum(map(len, words)) >= 0.4 * len(text)


def split_of(name: str) -> str:
    """Returns the split of a file, which depends on its name alone."""
    return "held_out" if hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0 else "train"


def build_text(folder: Path, downloads: Path, tokenizer) -> Path:
    """Writes the tokens of both splits to `folder` unless they are there, and returns it."""
    if folder.is_dir():
        return folder
    documents: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for source in SOURCES:
        archive = download(source.package, source.version, downloads, source=True)
        for name, text in read_documents(archive, source):
            documents[split_of(name)].append((name, text))
    with whole_folder(folder) as target:
        facts = {"sources": [asdict(source) for source in SOURCES]}
        for split, texts in documents.items():
            torch.save(encode_documents(texts, tokenizer, split), target / f"{split}.pt")
            facts[split] = {"files": len(texts), "characters": sum(len(text) for _, text in texts)}  # type: ignore
        (target / "text.json").write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def encode_documents(documents: list[tuple[str, str]], tokenizer, name: str = "text") -> dict:
    """Returns all documents as one line of tokens, where each of them starts, and their names."""
    tokens, starts = [], []
    for _, text in tqdm(documents, desc=f"encoding {name}"):
        starts.append(sum(map(len, tokens[-1:])) + (starts[-1] if starts else 0))
        tokens.append(torch.tensor(tokenizer(text + "\n\n")["input_ids"], dtype=torch.int32))
    return {"tokens": torch.cat(tokens), "starts": starts, "names": [name for name, _ in documents]}


class TextRows:
    """
    Rows of tokens, each decided by its number alone.

    Args:
        folder (`Path`): from [`build_text`].
        split (`str`): `"train"` or `"held_out"`.
        tokenizer: the teacher's.
        length (`int`): tokens of a row.
        seed (`int`, *optional*, defaults to 0): another one gives other rows.
    """

    def __init__(self, folder: Path, split: str, tokenizer, length: int, seed: int = 0):
        content = torch.load(Path(folder) / f"{split}.pt")
        self.tokens, self.starts, self.length, self.seed = content["tokens"], content["starts"], length, seed
        self.prefixes = [chat_prefix(tokenizer, question) for question in QUESTIONS]
        if len(self.tokens) <= length:
            raise ValueError(f"{len(self.tokens)} tokens of {split} text do not fill a row of length={length}")

    def __getitem__(self, index: int) -> Tensor:
        """Returns row `index`, [length]; the kinds of beginnings take turns."""
        kind = self.kind(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        room = len(self.tokens) - self.length
        start = int(torch.randint(room, (1,), generator=generator))
        if kind == "beginning":
            # the document that holds this token, so that long ones are taken more often; the last that fits
            start = max(first for first in self.starts if first <= start)
        row = self.tokens[start : start + self.length].long()
        if kind == "chat":
            prefix = self.prefixes[int(torch.randint(len(self.prefixes), (1,), generator=generator))]
            row = torch.cat([prefix, row])[: self.length]
        return row

    def kind(self, index: int) -> str:
        return BEGINNINGS[index % len(BEGINNINGS)]

    def batch(self, first: int, count: int) -> Tensor:
        """Returns `count` rows from number `first` on, [count, length]."""
        return torch.stack([self[index] for index in range(first, first + count)])


def chat_prefix(tokenizer, question: str) -> Tensor:
    """Returns the tokens of the chat template up to the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
