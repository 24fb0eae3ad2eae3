"""Reads what files hold that may be damaged or strange: JSON, texts and numbers of the types and ranges expected."""

import json
from typing import Any

from etils import epath

LARGEST = 1e100  # a number beyond it is damage; float32 ends at 3e38
_DEEPEST = 20  # nesting of JSON
_LONGEST_TEXT = 500  # characters of a text from a file, such as an error


def json_object(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
    """The file's content; None if it is no JSON object, of which a sentence is added to `notes`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # ValueError: not JSON, or not text
        content = None
    if not isinstance(content, dict) or _is_deep(content):
        notes.append(f"{path}: unreadable")
        return None
    return content


def _is_deep(content: Any) -> bool:
    """Whether it is nested deeper than `_DEEPEST`, which would be too deep for what follows."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for each in level if isinstance(each, (dict, list))
                 for inner in (each.values() if isinstance(each, dict) else each)]  # fmt: skip
    return bool(level)


def text_of(value: Any) -> str:
    """A text of bounded length without control characters and halves of characters."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 0 or more, of 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    """Whether it is a finite number, below 1e100; NaN and infinities were logged as null."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST
