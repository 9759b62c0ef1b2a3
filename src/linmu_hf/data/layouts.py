"""Which columns of a row hold its conversation: published layouts, named or recognised by their columns."""

from collections.abc import Mapping
from typing import Any


# Layout -> its columns, the answer last; a row is read by the first layout whose columns it fills.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),  # TRL, ms-swift, LLaMA-Factory
    "sharegpt": ("conversations",),  # LLaVA-OneVision-Data, LLaVA-Video-178K, LLaVA-Instruct
    "conversation": ("conversation",),  # ms-swift: pairs of human and assistant
    "prompt-completion": ("prompt", "completion"),  # TRL
    "query-response": ("query", "response"),  # ms-swift, with `history` and `system`
    "alpaca": ("instruction", "output"),  # with `input`, `history` and `system`
    "activitynet-qa": ("video_name", "question", "answer"),
}
COLUMNS = tuple(dict.fromkeys(column for columns in LAYOUTS.values() for column in columns))
IN_PARTS = ("messages", "conversations", "conversation", "prompt", "completion")  # columns whose parts may be media
OPTIONAL = ("system", "history", "input", "data_source")  # columns that go with some of them
WORKING_ROW = (
    '{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, '
    '{"role": "assistant", "content": "..."}], "images": ["a.jpg"]}'
)


def check_layout(layout: str | None) -> None:
    """Raises a `ValueError` if there is no such layout."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known: choose one of {', '.join(LAYOUTS)}")


def other_columns(layout: str) -> list[str]:
    """Names the columns by which other layouts than this one would be recognised."""
    return [column for column in COLUMNS if column not in LAYOUTS[layout]]


def find_messages(row: Mapping[str, Any]) -> Any:
    """
    Returns the conversation of a row in whatever form its layout has: a list of messages, or JSON of one.

    Raises:
        `ValueError`: The row is of no known layout; shows its columns and a row that would work.
    """
    for layout, columns in LAYOUTS.items():
        if all(row.get(column) is not None for column in columns) and len(str(row[columns[-1]])):
            found = _READERS[layout](row)
            if found:
                return found
    raise ValueError(f"it has no `messages`; its columns are {sorted(row)}: give messages, as in {WORKING_ROW}")


def _read_prompt_completion(row: Mapping[str, Any]) -> list[Any]:
    turns: list[Any] = []
    for role, column in (("user", "prompt"), ("assistant", "completion")):
        value = row[column]
        turns += [{"role": role, "content": value}] if isinstance(value, (str, int, float)) else list(value)
    return turns


def _read_query_response(row: Mapping[str, Any]) -> list[Any]:
    return _pairs([*_history(row), (row["query"], row["response"])])


def _read_alpaca(row: Mapping[str, Any]) -> list[Any]:
    texts = [row["instruction"], row.get("input")]
    for text in texts:
        if text is not None and not isinstance(text, (str, int, float)):
            raise ValueError(f"its `instruction` and `input` are texts, and one is {text!r:.60}: give {WORKING_ROW}")
    question = "\n".join(str(text) for text in texts if _is_filled(text))
    return _pairs([*_history(row), (question, row["output"])])


def _read_conversation(row: Mapping[str, Any]) -> Any:
    turns = row["conversation"]
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "human" in turns[0]:
        return _pairs([(turn["human"], turn["assistant"]) for turn in turns])
    return turns


def _read_activitynet_qa(row: Mapping[str, Any]) -> list[Any]:
    video: dict[str, Any] = {"type": "video"}
    if row.get("video") is None and row.get("videos") is None:  # it was found nowhere, which its name will say
        video["video"] = row["video_name"]
    question = [video, {"type": "text", "text": str(row["question"])}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": str(row["answer"])}]


def _history(row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    history = row.get("history") or []
    if not isinstance(history, (list, tuple)) or not all(
        isinstance(p, (list, tuple)) and len(p) == 2 for p in history
    ):
        raise ValueError(f'its `history` is {history!r:.60}: give pairs of texts, as in [["question", "answer"]]')
    return [(question, answer) for question, answer in history]


def _pairs(pairs: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair)
        if _is_filled(text)
    ]


def _is_filled(text: Any) -> bool:
    return bool(text) or text == 0  # an answer may be the number


_READERS = {
    "messages": lambda row: row["messages"],
    "sharegpt": lambda row: row["conversations"],
    "conversation": _read_conversation,
    "prompt-completion": _read_prompt_completion,
    "query-response": _read_query_response,
    "alpaca": _read_alpaca,
    "activitynet-qa": _read_activitynet_qa,
}
