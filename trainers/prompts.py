"""Pictures with their questions as token sequences.

All questions of a picture share its visual tokens in one sequence: [head | question 1, answer 1 | question 2, answer 2
| ...], where the head is the prompt's beginning with the picture in it. Each question sees the head and itself, never
another question or answer, and its positions start right behind the head, so that the result equals one sequence per
question. Families whose picture sees the question (PaliGemma) get one row a question instead. A question that shows
several pictures has all of them in its head, in their order; one that follows others has these before it, as said.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit.errors import UsageError
from trainers.chat_templates import Rendered, rendered_templates
from trainers.records import Picture, Question

IMAGE = "<image>"
IGNORE = -100
History = tuple[tuple[str, str], ...]  # earlier turns: (question, answer)
OWN = "put the checkpoint's own chat_template.jinja into the folder"
TURNS_AT_ONCE = 16  # that a chat template is rendered for together
TEXT, PADDING = -1, -2  # slots that hold no visual token
MOST_TEMPLATE = 1 << 13  # characters around a question: the longest system messages have two thousand


@dataclass(frozen=True)
class Head:
    """What stands before the questions of B rows: text and visual tokens, right-padded to H.

    ids: (B, H) int64, text ids (anything where no text stands). slot: (B, H) int64, index into the row's visual tokens,
    TEXT or PADDING. positions: (A, B, H) int64, A = 1, or 3 for rotary positions of time, height and width. start: (B,)
    int64, the position of the first token behind the head.
    """

    ids: Tensor
    slot: Tensor
    positions: Tensor
    start: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Head":
        """Rows, without columns that are padding in all of them."""
        slot = self.slot[rows]
        used = int((slot != PADDING).sum(dim=1).max()) if slot.numel() else 0
        return Head(self.ids[rows][:, :used], slot[:, :used], self.positions[:, rows][:, :, :used], self.start[rows])

    def to(self, device: torch.device | str) -> "Head":
        """The same rows on a device."""
        return Head(self.ids.to(device), self.slot.to(device), self.positions.to(device), self.start.to(device))


@dataclass(frozen=True)
class HeadRow:
    """The head of one picture, unpadded: see `Head`. ids, slot: (H,); positions: (A, H)."""

    ids: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    start: int


def stack_heads(rows: Sequence[HeadRow]) -> Head:
    """Rows of any length as one right-padded `Head` on the CPU."""
    axes = rows[0].positions.shape[0] if rows else 1
    width = max((len(row.slot) for row in rows), default=0)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    slot = np.full((len(rows), width), PADDING, dtype=np.int64)
    positions = np.zeros((axes, len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        used = len(row.slot)
        ids[index, :used], slot[index, :used], positions[:, index, :used] = row.ids, row.slot, row.positions
    start = torch.tensor([row.start for row in rows], dtype=torch.int64)
    return Head(torch.from_numpy(ids), torch.from_numpy(slot), torch.from_numpy(positions), start)


@dataclass(frozen=True)
class Packed:
    """B rows (pictures) of L text tokens behind the head; right-padded.

    input_ids, segment, offset: (B, L) int64. segment: 0, 1, … = question, -1 = padding. offset: position behind the
    head's last token. targets: (B, L), the token that position l must predict, IGNORE elsewhere. weights: (B, L)
    float32, 1 / (questions * answer tokens of that question) where there is a target, so that a row's weighted sum is
    the mean over its questions of the mean over that question's own answer tokens. head: what stands before; None means
    the template's beginning and then all visual tokens, as in LLaVA.
    """

    input_ids: Tensor
    segment: Tensor
    offset: Tensor
    targets: Tensor
    weights: Tensor
    head: Head | None = field(default=None)

    def __getitem__(self, rows: Tensor | slice) -> "Packed":
        """Rows, with columns that are padding in all of them cut off (padding never changes a row's result)."""
        segment = self.segment[rows]
        used = int((segment >= 0).any(dim=0).sum()) if segment.numel() else 0
        return Packed(
            self.input_ids[rows][:, :used],
            segment[:, :used],
            self.offset[rows][:, :used],
            self.targets[rows][:, :used],
            self.weights[rows][:, :used],
            None if self.head is None else self.head[rows],
        )

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "Packed":
        """The same rows on a device."""
        return Packed(
            self.input_ids.to(device),
            self.segment.to(device),
            self.offset.to(device),
            self.targets.to(device),
            self.weights.to(device),
            None if self.head is None else self.head.to(device),
        )


class Template:
    """The prompt around pictures and questions, as text with marks for what changes.

    `render(pictures, turns)` holds the image token `pictures` times before the first question, `turns` earlier
    questions and answers as {asked0}, {said0}, {asked1} …, and {question} at the end.
    """

    def __init__(self, text: str, image: str = IMAGE, *, gap: str = " ", end: str = "") -> None:
        """A fixed text for one picture and one question; earlier turns repeat it without the picture."""
        if image not in text or text.count("{question}") != 1 or text.index(image) > text.index("{question}"):
            raise UsageError(f"model template: got {text!r:.80}; accepted: text with {image} before one {{question}}")
        if len(text) > MOST_TEMPLATE:
            raise UsageError(f"model template: {len(text)} characters; accepted: at most {MOST_TEMPLATE}")
        self.text, self.image, self._gap, self._end = text, image, gap, end

    @property
    def gap(self) -> str:
        """Text between the prompt and the answer."""
        return self._gap

    @property
    def closing(self) -> str:
        """Text behind an answer; empty where the end-of-sequence token alone ends it."""
        return ""

    def render(self, pictures: int = 1, turns: int = 0) -> str:
        """The prompt of so many pictures and earlier turns."""
        line = f"{self.image}\n" if f"{self.image}\n" in self.text else self.image
        first = self.text.replace(line, line * pictures)
        later = self.text.replace(line, "")
        parts = [first, *[later] * turns]
        for turn in range(turns):
            said = f"{self._gap}{{said{turn}}}{self._end}"
            parts[turn] = parts[turn].replace("{question}", f"{{asked{turn}}}") + said
        return "".join(parts)


class ChatTemplate(Template):
    """The checkpoint's own chat template, thinking off. Raises UsageError where it shows no picture.

    as_text: a template of a text-only model will do, with the image token in the text (as LLaVA was trained). A
    template is a program of somebody else: it runs in a child with limits (trainers.model_files).
    """

    def __init__(self, tokenizer: Any, image: str, *, chat_template: Any = None, as_text: bool = False) -> None:
        self._source = _source(tokenizer, chat_template)
        self._special, self.image = tokenizer.special_tokens_map, image
        self._listed = True
        self._known: dict[tuple[int, int], str | UsageError] = {}
        try:
            self.text = self.render()
        except UsageError:
            if not as_text:
                raise
            self._listed, self._known = False, {}  # a template of a text-only model: it wants content as one text
            self.text = self.render()

    @property
    def gap(self) -> str:
        said = self.render(1, 1).partition("{said0}")[0].replace("{asked0}", "{question}")
        return said.removeprefix(self.text) if said.startswith(self.text) else ""

    @property
    def closing(self) -> str:
        return self.render(1, 1).partition("{said0}")[2]

    def render(self, pictures: int = 1, turns: int = 0) -> str:
        if (pictures, turns) not in self._known:
            self._render(pictures, turns)
        found = self._known[pictures, turns]
        if isinstance(found, UsageError):
            raise found
        return found

    def _messages(self, pictures: int, turns: int) -> list[dict[str, Any]]:
        asked = [f"{{asked{turn}}}" for turn in range(turns)] + ["{question}"]
        messages: list[dict[str, Any]] = []
        for turn, text in enumerate(asked):
            messages.append({"role": "user", "content": self._content(text, pictures if turn == 0 else 0)})
            if turn < turns:
                messages.append({"role": "assistant", "content": self._content(f"{{said{turn}}}", 0)})
        return messages

    def _content(self, text: str, pictures: int) -> Any:
        if self._listed:
            return [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
        return f"{self.image}\n" * pictures + text

    def _render(self, pictures: int, turns: int) -> None:
        """Render this many turns and those near it: a child takes seconds to start, a conversation no time."""
        first = turns // TURNS_AT_ONCE * TURNS_AT_ONCE
        wanted = range(2) if turns < 2 else range(first, first + TURNS_AT_ONCE)
        asked = [self._messages(pictures, item) for item in wanted]
        for item, found in zip(wanted, rendered_templates(self._source, self._special, asked), strict=True):
            self._known[pictures, item] = self._checked(found, pictures)

    def _checked(self, found: Rendered, pictures: int) -> str | UsageError:
        if found.error is not None:
            return UsageError(f"model: its chat template fails on a picture and a question ({found.error}); {OWN}")
        if found.text.count(self.image) != pictures or found.text.count("{question}") != 1:
            return UsageError(
                f"model: its chat template does not show a picture as one {self.image} and then the question; {OWN}"
            )
        if len(found.text) > MOST_TEMPLATE * (1 + found.text.count("{asked")):
            return UsageError(f"model: its chat template writes {len(found.text)} characters around a question; {OWN}")
        return found.text


def _source(tokenizer: Any, given: Any) -> str:
    """The text of the template that holds for a plain conversation: `given`, else the tokenizer's."""
    named = getattr(tokenizer, "chat_template", None) if given is None else given
    text = named.get("default") if isinstance(named, dict) else named
    if not isinstance(text, str):
        raise UsageError(f"model: its chat template is no text, or there are several and none is the default; {OWN}")
    return text


def _ending(tokenizer: Any, closing: str) -> int | None:
    """The special token that begins `closing`, else the end-of-sequence token."""
    ids = list(tokenizer(closing.strip(), add_special_tokens=False)["input_ids"]) if closing.strip() else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    if ids and ids[0] in special and ids[0] != tokenizer.bos_token_id:
        return int(ids[0])
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


class Prompter:
    """Turns questions into token ids with one tokenizer and template.

    The rendered prompt is tokenised whole and split at the image tokens, so that real checkpoints see the very tokens
    they were trained with. special: let the tokenizer add its own special tokens to the template. gap: text between
    prompt and answer of a fixed template. An answer ends with the special token that the template puts behind it, else
    with the tokenizer's end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | Template,
        image_token_id: int,
        *,
        image: str = IMAGE,
        special: bool = True,
        gap: str = " ",
    ) -> None:
        ending = str(tokenizer.eos_token or "")
        self._form = Template(template, image, gap=gap, end=ending) if isinstance(template, str) else template
        eos = _ending(tokenizer, self._form.closing)
        if eos is None:
            raise UsageError("model: its tokenizer has no end-of-sequence token")
        self.tokenizer = tokenizer
        self.template = self._form.text
        self.image_token_id = image_token_id
        self._image, self.special, self._gap = self._form.image, special, self._form.gap
        self.eos_id = int(eos)
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else self.eos_id
        self._cache: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}
        self.prefix = self._split("?")[0]

    def _split(self, question: str, history: History = (), pictures: int = 1) -> list[list[int]]:
        """Ids before the first picture, between pictures, and after the last one."""
        ids = self._ids(self._text(question, history, pictures))
        if ids.count(self.image_token_id) != pictures:
            raise UsageError(
                f"model: its tokenizer does not know {self._image} as one token (id {self.image_token_id})"
            )
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token == self.image_token_id:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return pieces

    def _text(self, question: str, history: History, pictures: int) -> str:
        """The whole prompt."""
        marks = {"{question}": question}
        for turn, (asked, said) in enumerate(history):
            marks |= {f"{{asked{turn}}}": asked, f"{{said{turn}}}": said}
        parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", self._form.render(pictures, len(history)))
        # A question can't smuggle in a further picture.
        safe = {mark: value.replace(self._image, f"< {self._image[1:]}") for mark, value in marks.items()}
        return "".join(safe.get(part, part) for part in parts)

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=self.special)["input_ids"])
        # Some tokenizers close every text; an answer follows here.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id and self.special else ids

    def prompt(self, question: str) -> str:
        """The whole prompt of one picture and one question, as text."""
        return self._text(question, (), 1)

    def texts(self, asked: Iterable[tuple[str | Question, int]], *, answers: bool) -> list[str]:
        """Every text that the tokenizer is given for these questions, each with its number of pictures.

        answers: with the questions' own answers behind them.
        """
        found = []
        for item, pictures in asked:
            question = Question(item, "") if isinstance(item, str) else item
            found.append(self._text(question.text, question.history, pictures))
            if answers:
                found += [f"{found[-1]}{self._gap}{question.answer}", self._gap + question.answer]
        return found

    def before(self, image: str) -> list[int]:
        """Ids of the template's beginning with `image`, the text of a whole picture, at its end."""
        return self._ids(self.template.partition(self._image)[0] + image)

    def between(self, pictures: int) -> list[list[int]]:
        """Ids between each two of so many pictures."""
        return self._split("?", pictures=pictures)[1:-1]

    def question_ids(self, question: str | Question, pictures: int = 1) -> list[int]:
        """Token ids behind the last picture, up to where the answer starts."""
        text, history = (question, ()) if isinstance(question, str) else (question.text, question.history)
        return self._split(text, history, pictures)[-1]

    def encode(
        self, question: str, answer: str, history: History = (), pictures: int = 1
    ) -> tuple[list[int], list[int]]:
        """(question ids, answer ids with the end-of-sequence token)."""
        key = (question, answer, history, pictures)
        if key not in self._cache:
            asked = self._split(question, history, pictures)[-1]
            whole = self._ids(f"{self._text(question, history, pictures)}{self._gap}{answer}")
            at = len(whole) - 1 - whole[::-1].index(self.image_token_id) + 1
            if whole[at : at + len(asked)] == asked:  # the answer as it is tokenised behind its prompt
                answer_ids = whole[at + len(asked) :]
            else:  # its first sign would melt into the prompt's last token
                answer_ids = list(self.tokenizer(self._gap + answer, add_special_tokens=False)["input_ids"])
            self._cache[key] = (asked, [*answer_ids, self.eos_id])
        return self._cache[key]

    def pack(self, pictures: Sequence[Picture]) -> Packed:
        """Pack all questions of each picture; see `Packed`."""
        rows = [self._row(picture) for picture in pictures]
        length = max((len(row["input_ids"]) for row in rows), default=0)
        fill = {"input_ids": self.pad_id, "segment": -1, "offset": 0, "targets": IGNORE, "weights": 0.0}

        def column(name: str) -> Tensor:
            dtype = torch.float32 if name == "weights" else torch.int64
            out = torch.full((len(rows), length), fill[name], dtype=dtype)
            for index, row in enumerate(rows):
                out[index, : len(row[name])] = torch.tensor(row[name], dtype=dtype)
            return out

        ids, segment, offset, targets, weights = map(column, ("input_ids", "segment", "offset", "targets", "weights"))
        return Packed(ids, segment, offset, targets, weights)

    def _row(self, picture: Picture) -> dict[str, list[Any]]:
        row: dict[str, list[Any]] = {name: [] for name in ("input_ids", "segment", "offset", "targets", "weights")}
        for segment, item in enumerate(picture.questions):
            question, answer = self.encode(item.text, item.answer, item.history, len(picture.images))
            ids = question + answer[:-1]
            targets = [IGNORE] * (len(question) - 1) + answer
            weight = 1.0 / (len(picture.questions) * len(answer))
            row["input_ids"] += ids
            row["segment"] += [segment] * len(ids)
            row["offset"] += list(range(len(ids)))
            row["targets"] += targets
            row["weights"] += [weight if target != IGNORE else 0.0 for target in targets]
        return row


def attention_mask(segment: Tensor, head: int, padded: Tensor | None = None) -> Tensor:
    """Boolean (B, 1, head + L, head + L) mask, True = may attend, for `head` shared tokens before L packed ones.

    Causal; everyone sees the head; a question sees itself only; padding sees itself (a row of nothing would be NaN).
    padded: (B, head), True where the head is padding.
    """
    rows, length = segment.shape
    shared = segment.new_full((rows, head), -2)
    if padded is not None:
        shared = shared.masked_fill(padded, -1)
    full = torch.cat([shared, segment], dim=1)
    total = head + length
    causal = torch.ones(total, total, dtype=torch.bool, device=segment.device).tril()
    same = (full[:, :, None] == full[:, None, :]) & (full[:, :, None] != -1)
    sees_head = (full[:, None, :] == -2) & (full[:, :, None] != -1)
    itself = torch.eye(total, dtype=torch.bool, device=segment.device)
    return ((causal & (same | sees_head)) | itself).unsqueeze(1)
