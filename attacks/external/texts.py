"""The texts of an owner: JSON Lines, Parquet or CSV, checked row by row before anything is computed from them.

A row has an `id` and `text`, or `messages` (a list of role and content), or `prompt` and `completion` (both text, or
both messages): of the last two what the model is to say counts. Rows with the same id are one unit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.external import contents
from dpaudit import untrusted_tables
from dpaudit.errors import UsageError, rejected
from trainers.data import rows
from trainers.data.rows import Row, Source
from trainers.text import ANSWERS, ROLES, Said, Text

COLUMNS = ("text", "messages", "prompt", "completion")
ACCEPTED = "a column text, a column messages, or columns prompt and completion"
MOST_MESSAGES = 1000


@dataclass(frozen=True)
class TextUnit:
    """What one person contributes: all rows of one id."""

    id: str
    texts: tuple[Text, ...]


def read_texts(path: Path) -> dict[str, TextUnit]:
    """Units by id, in the order of their first rows. Raises UsageError that names file, row and field."""
    if not path.is_file():
        raise UsageError(f"--records {path}: no such file")
    if path.suffix.lower() not in (".parquet", ".jsonl", ".csv"):
        raise rejected("--records", path.name, "a .jsonl, .parquet or .csv file")
    source = Source(path=path, label=f"--records {path.name}", root=path.parent.resolve())
    found: dict[str, list[Text]] = {}
    for number, row in _rows(source):
        name = str(rows.key(source, number, row, "id"))
        found.setdefault(name, []).append(_text(source, number, row))
    if not found:
        raise UsageError(f"{source.label}: no rows")
    return {name: TextUnit(name, tuple(texts)) for name, texts in found.items()}


def _rows(source: Source) -> Iterator[tuple[int, Row]]:
    if source.path.suffix.lower() != ".csv":
        yield from rows.read_rows(source, ["id"], COLUMNS)
        return
    try:
        frame = untrusted_tables.read_csv(source.path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{source.label}: can't be read as a table ({why:.160})") from None
    if "id" not in frame.columns:
        raise UsageError(f"{source.label}: no column 'id'; columns: {', '.join(map(str, frame.columns[:20]))}")
    for number, values in enumerate(frame.to_dict("records"), 1):
        yield number, {str(name): value for name, value in values.items()}


def _text(source: Source, number: int, row: Row) -> Text:
    given = [name for name in COLUMNS if row.get(name) is not None]
    if given == ["text"]:
        return Text(text=_said(source, number, "text", row["text"]))
    if given == ["messages"]:
        return _conversation(source, number, "messages", row["messages"])
    if given != ["prompt", "completion"]:
        what = f"has {' and '.join(given)}" if given else f"holds none of {', '.join(COLUMNS)}"
        raise UsageError(f"{source.label}, row {number}: {what}; accepted: {ACCEPTED}")
    asked, answered = row["prompt"], row["completion"]
    if isinstance(asked, str) and isinstance(answered, str):
        before = _said(source, number, "prompt", asked)
        return Text(text=before + _said(source, number, "completion", answered), given=len(before))
    if isinstance(asked, list) and isinstance(answered, list):
        return _conversation(source, number, "completion", [*asked, *answered])
    raise source.fault(number, "completion", "prompt and completion must both be text, or both lists of messages")


def _said(source: Source, number: int, field: str, value: Any) -> str:
    return rows.verbatim(source, number, field, value, "text")


def _conversation(source: Source, number: int, field: str, value: Any) -> Text:
    if not isinstance(value, list) or not value or len(value) > MOST_MESSAGES:
        found = f"{len(value)} messages" if isinstance(value, list) else type(value).__name__
        raise source.fault(number, field, f"must be a list of 1 to {MOST_MESSAGES} messages, got {found}")
    said = tuple(_message(source, number, f"{field}[{place}]", message) for place, message in enumerate(value, 1))
    if not any(message.role == ANSWERS for message in said):
        raise source.fault(number, field, f"no message of the {ANSWERS}: nothing that the model was taught to say")
    return Text(conversation=said)


def _message(source: Source, number: int, where: str, message: Any) -> Said:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise source.fault(number, where, f"must have a role, one of {', '.join(ROLES)}, and content")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content):
            raise source.fault(number, where, "its parts must be {type: text, text}; this model sees no pictures")
        content = "\n".join(str(part.get("text") or "") for part in parts)
    return Said(str(message["role"]), rows.checked(source, number, where, content, "text"))


def shared_texts(units: Mapping[str, TextUnit]) -> list[tuple[str, str]]:
    """Pairs of different ids that hold an equal row, but for white space around it."""
    owner: dict[tuple[Any, ...], str] = {}
    pairs = []
    for name, unit in units.items():
        for said in dict.fromkeys((text.text.strip(), text.conversation) for text in unit.texts):
            first = owner.setdefault(said, name)
            if first != name:
                pairs.append((first, name))
    return pairs


def features(units: Sequence[TextUnit]) -> npt.NDArray[np.float64]:
    """(n, columns) numbers for a classifier that sees the texts alone: counts of hashed pairs of bytes, lengths."""
    seen = []
    for unit in units:
        said = [message for text in unit.texts for message in text.conversation]
        answers = [text.text[text.given :] for text in unit.texts]
        answers += [message.content for message in said if message.role == ANSWERS]
        others = [text.text[: text.given] for text in unit.texts]
        others += [message.content for message in said if message.role != ANSWERS]
        seen.append({"rows": len(unit.texts), "given": "\n".join(others), "said": "\n".join(answers)})
    found = contents.features(seen)
    return np.zeros((len(units), 0)) if found is None else found
