"""Pictures with their questions as token sequences.

All questions of a picture share its visual tokens in one sequence: [head | question 1, answer 1 | question 2, answer 2
| ...], where the head is the prompt's beginning with the picture in it. Each question sees the head and itself, never
another question or answer, and its positions start right behind the head, so that the result equals one sequence per
question. Families whose picture sees the question (PaliGemma) get one row a question instead.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit.errors import UsageError
from trainers.records import Picture

LLAVA_TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
IMAGE = "<image>"
IGNORE = -100
TEXT, PADDING = -1, -2  # slots that hold no visual token


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


class Prompter:
    """Turns questions into token ids with one tokenizer and template.

    The template holds the image token and `{question}`; it is tokenised whole and split at the image token, so that
    real checkpoints see the very tokens they were trained with. image: the image token as text. special: let the
    tokenizer add its own special tokens to the template. gap: text between prompt and answer. end: the token that ends
    an answer, where it isn't the tokenizer's end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        image_token_id: int,
        *,
        image: str = IMAGE,
        special: bool = True,
        gap: str = " ",
        end: str | None = None,
    ) -> None:
        if (
            image not in template
            or "{question}" not in template
            or template.index(image) > template.index("{question}")
        ):
            raise UsageError(f"model template: got {template!r}; accepted: text with {image} before {{question}}")
        self.tokenizer = tokenizer
        self.template = template
        self.image_token_id = image_token_id
        self._image, self._special, self._gap = image, special, gap
        known = end is not None and end in tokenizer.get_vocab()
        eos = tokenizer.convert_tokens_to_ids(end) if known else tokenizer.eos_token_id
        if eos is None:
            raise UsageError("model: its tokenizer has no end-of-sequence token")
        self.eos_id = int(eos)
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else self.eos_id
        self._cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.prefix = self._split("?")[0]

    def _split(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before the image token and after it."""
        ids = list(self.tokenizer(self.asked(question), add_special_tokens=self._special)["input_ids"])
        if ids and ids[-1] == self.eos_id:
            ids = ids[:-1]
        if ids.count(self.image_token_id) != 1:
            raise UsageError(
                f"model: its tokenizer does not know {self._image} as one token (id {self.image_token_id})"
            )
        at = ids.index(self.image_token_id)
        return ids[:at], ids[at + 1 :]

    def asked(self, question: str) -> str:
        """The text of a whole prompt."""
        safe = question.replace(self._image, f"< {self._image[1:]}")  # a question can't smuggle in a second picture
        return self.template.replace("{question}", safe)

    def texts(self, questions: Iterable[str], answers: Iterable[str]) -> list[str]:
        """Every text that the tokenizer is given for these questions and answers."""
        return [*map(self.asked, questions), *(self._gap + answer for answer in answers)]

    def before(self, image: str) -> list[int]:
        """Ids of the template's beginning with `image`, the text of a whole picture, at its end."""
        text = self.template.partition(self._image)[0] + image
        ids = list(self.tokenizer(text, add_special_tokens=self._special)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id and self._special else ids

    def question_ids(self, question: str) -> list[int]:
        """Token ids behind the picture, up to where the answer starts."""
        return self._split(question)[1]

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """(question ids, answer ids with the end-of-sequence token)."""
        key = (question, answer)
        if key not in self._cache:
            answer_ids = list(self.tokenizer(self._gap + answer, add_special_tokens=False)["input_ids"])
            self._cache[key] = (self.question_ids(question), [*answer_ids, self.eos_id])
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
            question, answer = self.encode(item.text, item.answer)
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
