"""The formats in which questions about pictures come, each turned into the same samples.

    flat            image, question, answer
    answers         image, question, answers (texts, or VQAv2's {answer, ...}): training takes the most frequent one
    choices         image, question, choices, answer as the choice's number (ScienceQA): the letter is learned
    conversations   image, conversations [{from: human, value: "<image>\n..."}, {from: gpt, value}] (LLaVA)
    messages        messages [{role, content}] with images, image, or pictures inside content (TRL, Hugging Face)
    texts           images, texts [{user, assistant}] (The Cauldron)

A format is recognised by its columns and said. A table that is nearly one is refused with what is missing and the
command that converts it. Prompts are lmms-eval's: choices and lists of answers get its post-prompt, so that training
and `dpaudit benchmark` ask alike; `data.post-prompt` sets another.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpaudit.errors import UsageError
from trainers.data import rows
from trainers.data.files import Table
from trainers.data.rows import Row, Source

SHORT = "\nAnswer the question using a single word or phrase."  # lmms-eval: textvqa, vqav2, gqa, docvqa, pope
LETTER = "\nAnswer with the option's letter from the given choices directly."  # lmms-eval: scienceqa_img
MARKER = "<image>"
IMAGE_COLUMNS = ("image", "images", "img_name")  # the last as in SLAKE, whose pictures lie in imgs/
KEYS = ("image_id", "imageId")  # of rows whose pictures lie in a table of their own
MAX_PICTURES = 16  # of one sample
MAX_TURNS = 200
MAX_CHOICES = 26
_USER = ("human", "user", "Human", "USER", "User")
_MODEL = ("gpt", "assistant", "model", "chatgpt", "bard", "Assistant", "ASSISTANT", "GPT")
# Every column that some format reads; a hub set may have others, gigabytes of them.
COLUMNS = (
    "image", "images", "img_name", "question", "answer", "answers", "kind", "choices", "hint", "query", "label",
    "conversations", "conversation", "messages", "prompt", "completion", "texts",
)  # fmt: skip
# What people call the columns of flat rows.
OTHER_NAMES = {
    "image": ("img", "picture", "image_path", "img_path", "file_name", "filename", "image_file", "img_name", "pic"),
    "question": ("query", "prompt", "instruction", "problem", "text", "input", "user", "ques"),
    "answer": ("label", "response", "output", "solution", "target", "ground_truth", "gt_answer", "assistant",
               "multiple_choice_answer", "completion", "short_answer"),
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question and its answer. accepted: all answers that count as right, where there are several. shown: how many of
    the sample's pictures stand before the answer."""

    text: str
    answer: str
    accepted: tuple[str, ...] = ()
    kind: str = "question"
    shown: int = 1


@dataclass(frozen=True)
class Sample:
    """One row: references to its pictures (a path, bytes, or a struct of both), and its turns in order."""

    pictures: tuple[Any, ...]
    turns: tuple[Turn, ...]


def many(count: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclass
class Counts:
    """What was left out or moved while reading; for notes to the owner of the data."""

    without_picture: int = 0
    system: int = 0
    moved: int = 0

    def notes(self, label: str) -> Iterator[str]:
        """One line for each that is not zero."""
        if self.without_picture:
            yield f"{label}: {many(self.without_picture, 'row')} without a picture left out"
        if self.system:
            yield f"{label}: the system message of {many(self.system, 'row')} left out (the model's own stays)"
        if self.moved:
            yield f"{label}: {many(self.moved, 'text')} with a picture inside or behind; it is shown before the text"


@dataclass(frozen=True)
class Format:
    """A recognised format. wanted: the columns that are read; renamed: what some of them are called here. folder: where
    pictures lie beside the file, unless told otherwise."""

    name: str
    wanted: tuple[str, ...]
    read: Callable[[Source, int, Row, "Format"], Sample | None]
    post_prompt: str = ""
    folder: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def samples(self, table: Table, more: Sequence[str] = ()) -> Iterator[tuple[Source, int, Row, Sample]]:
        """Samples with their file, row number and the columns `more`; rows without a picture are counted, not given."""
        for source, number, row in table.rows([*self.wanted, *(name for name in more if name not in self.wanted)]):
            known = {self.renamed.get(name, name): value for name, value in row.items()} if self.renamed else row
            sample = self.read(source, number, known, self)
            if sample is None or not sample.pictures:
                self.counts.without_picture += 1
            else:
                yield source, number, row, sample


def recognise(table: Table, post_prompt: str | None = None, *, joined: bool = False) -> Format:
    """The format of a table. Raises UsageError that says what is missing, and how to convert what is nearly one.

    joined: its pictures lie in a table of their own, and its rows name them by `image_id`.
    """
    columns = table.columns()
    image = next((name for name in (KEYS if joined else IMAGE_COLUMNS) if name in columns), None)
    if joined and image is None:
        raise UsageError(f"{table.label}: no column 'image_id'; columns: {', '.join(columns[:20])}")
    found = _dialogues(table, columns, image) or _tables(table, columns, image)
    if found is None:
        raise UsageError(_missing(table, columns, joined))
    return found if post_prompt is None else replace(found, post_prompt=post_prompt)


def _dialogues(table: Table, columns: Sequence[str], image: str | None) -> Format | None:
    shown = (image,) if image in KEYS else IMAGE_COLUMNS[:2]
    for name in ("conversations", "conversation"):
        if name in columns:
            return Format("conversations", (*filter(None, shown), name), _conversation)
    if "messages" in columns:
        return Format("messages", (*filter(None, shown), "messages"), _messages)
    if "prompt" in columns and "completion" in columns and _is_turns(table.first().get("prompt")):
        return Format("messages", (*filter(None, shown), "prompt", "completion"), _messages)
    if "texts" in columns and image:
        return Format("texts", (image, "texts"), _texts)
    return None


def _tables(table: Table, columns: Sequence[str], image: str | None) -> Format | None:
    """Formats of one question a row."""
    renamed: dict[str, str] = {}
    if "question" not in columns and "query" in columns and ("label" in columns or "answer" in columns):
        renamed = {"query": "question"} | ({"label": "answer"} if "answer" not in columns else {})  # ChartQA
    known = {renamed.get(name, name): name for name in columns}
    if image is None or "question" not in known:
        return None

    def wanted(*names: str) -> tuple[str, ...]:
        return tuple(known[name] for name in (image, *names) if name in known)

    folder = "imgs" if image == "img_name" else None
    if "choices" in known and "answer" in known:
        return Format("choices", wanted("question", "choices", "answer", "hint", "kind"), _choice, LETTER, folder)
    if "answers" in known:
        return Format("answers", wanted("question", "answers", "answer", "kind"), _answers, SHORT, folder, renamed)
    if "answer" not in known:
        return None
    several = isinstance(table.first().get(known["answer"]), list)
    name, behind = ("answers", SHORT) if several else ("flat", "")
    return Format(name, wanted("question", "answer", "kind"), _flat, behind, folder, renamed)


def _missing(table: Table, columns: Sequence[str], joined: bool) -> str:
    """What a table lacks to be flat rows, and the command that renames what seems to be meant."""
    renamed: dict[str, str | None] = {}
    for wanted, others in OTHER_NAMES.items():
        if wanted not in columns and not (wanted == "image" and (joined or "images" in columns)):
            renamed[wanted] = next((name for name in others if name in columns and name not in renamed.values()), None)
    lacking = list(renamed)
    word = "column" if len(lacking) == 1 else "columns"
    text = f"{table.label}: no {word} {', '.join(map(repr, lacking))}; columns: {', '.join(columns[:20])}"
    if "image_id" in columns and "image" in lacking:
        return f"{text}; rows name pictures by image_id: give their table with data.train-images and data.test-images"
    accepted = (
        "accepted: image, question, answer; or LLaVA's conversations, chat messages, answers, choices (docs/data.md)"
    )
    if not lacking or any(value is None for value in renamed.values()):
        return f"{text}; {accepted}"
    pairs = {str(old): new for new, old in renamed.items()}
    path = table.parts[0].path
    stem = path.name.partition(".")[0]
    if path.suffix.lower() == ".parquet" or path.suffix.lower() == ".arrow":
        code = f"p.read_parquet('{table.label}').rename(columns={pairs}).to_parquet('{stem}-flat.parquet')"
    else:
        lines = path.suffix.lower() == ".jsonl"
        code = (
            f"p.read_json('{table.label}', lines={lines}, dtype=False).rename(columns={pairs})"
            f".to_json('{stem}-flat.jsonl', orient='records', lines=True)"
        )
    return f'{text}; to convert it: python -c "import pandas as p; {code}"'


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# -- pictures of a row -----------------------------------------------------------------------------------------------


def _references(source: Source, number: int, row: Row) -> tuple[Any, ...]:
    """The pictures of the columns `image` and `images`; none for a row without."""
    key = next((name for name in KEYS if name in row), None)
    if key is not None:
        return (rows.key(source, number, row, key),)
    name = next((name for name in IMAGE_COLUMNS if row.get(name) not in (None, "", [])), None)
    if name is None:
        return ()
    value = row[name]
    found = tuple(value) if isinstance(value, list) else (value,)
    if len(found) > MAX_PICTURES:
        raise source.fault(number, name, f"{len(found)} pictures; at most {MAX_PICTURES} are accepted")
    if any(item is None for item in found):
        raise source.fault(number, name, "one of its pictures is nothing")
    return found


# -- flat rows -------------------------------------------------------------------------------------------------------


def _kind(source: Source, number: int, row: Row) -> str:
    return rows.text(source, number, row, "kind") if row.get("kind") is not None else "question"


def _shown(source: Source, number: int, row: Row) -> tuple[Any, ...]:
    """The pictures of a row that has to have one."""
    pictures = _references(source, number, row)
    if not pictures:
        raise source.fault(number, next((name for name in IMAGE_COLUMNS if name in row), "image"), "missing")
    return pictures


def _flat(source: Source, number: int, row: Row, how: Format) -> Sample | None:
    pictures = _shown(source, number, row)
    text = rows.text(source, number, row, "question")
    kind = _kind(source, number, row)
    accepted: tuple[str, ...] = ()
    if isinstance(row.get("answer"), list):
        answer, accepted = _accepted(source, number, "answer", row["answer"])
    else:
        answer = rows.text(source, number, row, "answer")
    return Sample(pictures, (Turn(text + how.post_prompt, answer, accepted, kind, len(pictures)),))


def _answers(source: Source, number: int, row: Row, how: Format) -> Sample | None:
    pictures = _shown(source, number, row)
    answer, accepted = _accepted(source, number, "answers", row.get("answers"))
    if isinstance(row.get("answer"), str) and row["answer"].strip():
        answer = rows.text(source, number, row, "answer")
    text = rows.text(source, number, row, "question") + how.post_prompt
    return Sample(pictures, (Turn(text, answer, accepted, _kind(source, number, row), len(pictures)),))


def _accepted(source: Source, number: int, name: str, value: Any) -> tuple[str, tuple[str, ...]]:
    """(the most frequent, all): of equals the first. An annotator's answer may be empty; not all of them."""
    if isinstance(value, dict) and isinstance(value.get("answer"), list):  # a struct of lists, as datasets stores them
        value = value["answer"]
    if not isinstance(value, list) or not value:
        found = "nothing" if value is None else type(value).__name__
        raise source.fault(number, name, f"must be a list of answers, got {found if value != [] else 'an empty one'}")
    texts: list[str] = []
    for item in value:
        text = item.get("answer") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise source.fault(number, name, f"must hold texts, got {type(text).__name__}")
        texts.append(text)
    said = [rows.checked(source, number, name, text, "answer") for text in texts if text.strip()]
    if not said:
        raise source.fault(number, name, "all of its answers are empty")
    return Counter(said).most_common(1)[0][0], tuple(said)


def _choice(source: Source, number: int, row: Row, how: Format) -> Sample | None:
    pictures = _references(source, number, row)
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise source.fault(number, "choices", f"must be a list of 1 to {MAX_CHOICES} texts")
    texts = [rows.checked(source, number, "choices", item, "answer") for item in choices]
    if isinstance(answer, str) and len(answer) == 1 and "A" <= answer <= "Z":
        answer = ord(answer) - ord("A")
    if isinstance(answer, str) and answer in texts:
        answer = texts.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise source.fault(number, "answer", "must be the number (from 0), the letter or the text of a choice")
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    hint = row.get("hint")
    context = f"Context: {rows.text(source, number, row, 'hint')}\n" if isinstance(hint, str) and hint.strip() else ""
    text = f"{context}{rows.text(source, number, row, 'question')}\n{listed}{how.post_prompt}"
    return Sample(pictures, (Turn(text, letters[answer], (), _kind(source, number, row), len(pictures)),))


# -- conversations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """One message. markers: pictures that it shows."""

    model: bool
    text: str
    markers: int


def _conversation(source: Source, number: int, row: Row, how: Format) -> Sample | None:
    name = "conversations" if "conversations" in row else "conversation"
    return _dialogue(source, number, name, row, row.get(name), how)


def _messages(source: Source, number: int, row: Row, how: Format) -> Sample | None:
    if "messages" in row:
        return _dialogue(source, number, "messages", row, row["messages"], how)
    asked, answered = row.get("prompt"), row.get("completion")
    if not (isinstance(asked, list) and isinstance(answered, list)):
        raise source.fault(number, "completion", "prompt and completion must both be lists of messages")
    return _dialogue(source, number, "messages", row, [*asked, *answered], how)


def _texts(source: Source, number: int, row: Row, how: Format) -> Sample | None:
    value = row.get("texts")
    if not _is_turns(value):
        raise source.fault(number, "texts", "must be a list of {user, assistant}")
    assert isinstance(value, list)
    said = []
    for item in value:
        said += [{"role": "user", "content": item.get("user")}, {"role": "assistant", "content": item.get("assistant")}]
    return _dialogue(source, number, "texts", row, said, how)


def _dialogue(source: Source, number: int, name: str, row: Row, value: Any, how: Format) -> Sample | None:
    """Messages that alternate between a person and the model, with their pictures."""
    if not _is_turns(value):
        raise source.fault(number, name, "must be a list of messages, each an object")
    if len(value) > 2 * MAX_TURNS:
        raise source.fault(number, name, f"{len(value)} messages; at most {2 * MAX_TURNS} are accepted")
    inside: list[Any] = []
    said: list[_Said] = []
    for place, message in enumerate(value, 1):
        role = message.get("from", message.get("role"))
        content = message.get("value", message.get("content"))
        where = f"{name}[{place}]"
        if role == "system" and place == 1:
            how.counts.system += 1
            continue
        if role not in (*_USER, *_MODEL):
            raise source.fault(number, where, "its role must be human and gpt, or user and assistant")
        said.append(_message(source, number, where, role in _MODEL, content, inside, how))
    pictures = tuple(inside) or _references(source, number, row)
    if inside and len(inside) != sum(item.markers for item in said):
        pictures = _references(source, number, row)  # content says where, the column `images` holds them
    if not pictures:
        return None
    return Sample(pictures, _turns(source, number, name, said, len(pictures), how))


def _message(
    source: Source, number: int, where: str, model: bool, content: Any, inside: list[Any], how: Format
) -> _Said:
    markers = 0
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                texts.append(str(part.get("text") or ""))
            elif kind in ("image", "image_url"):
                markers += 1
                places = (part.get(name) for name in ("image", "path", "url", "image_url"))
                reference = next((item for item in places if item not in (None, "")), None)
                if reference is not None:
                    inside.append(reference)
                if any(text.strip() for text in texts):
                    how.counts.moved += 1
            else:
                raise source.fault(number, where, "its parts must be {type: text, text} or {type: image}")
        content = "\n".join(text for text in texts if text)
    if not isinstance(content, str):
        raise source.fault(number, where, f"must be text or a list of parts, got {type(content).__name__}")
    markers += content.count(MARKER)
    if model and markers:
        raise source.fault(number, where, "an answer shows no picture")
    bare = content.replace(MARKER, "").strip()
    before = content.rpartition(MARKER)[0].replace(MARKER, "")
    how.counts.moved += bool(before.strip())
    return _Said(model, rows.checked(source, number, where, bare, "answer" if model else "question"), markers)


def _turns(
    source: Source, number: int, name: str, said: Sequence[_Said], pictures: int, how: Format
) -> tuple[Turn, ...]:
    if not said or len(said) % 2 or any(item.model != bool(place % 2) for place, item in enumerate(said)):
        raise source.fault(number, name, "must alternate: a question, its answer, the next question, its answer")
    marked = sum(item.markers for item in said)
    if marked not in (0, pictures):
        raise source.fault(
            number, name, f"{marked} times {MARKER} for {pictures} pictures; each needs one, or none any"
        )
    shown = 0 if marked else pictures
    out = []
    for asked, answered in zip(said[::2], said[1::2], strict=True):
        shown += asked.markers if marked else 0
        if not shown:
            raise source.fault(number, name, "a question before the first picture; show it in the first one")
        out.append(Turn(asked.text + how.post_prompt, answered.text, (), "question", shown))
    return tuple(out)
