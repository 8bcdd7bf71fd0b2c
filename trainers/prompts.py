"""Pictures with their questions as token sequences.

All questions of a picture share its visual tokens in one sequence: [prefix | picture | question 1, answer 1 |
question 2, answer 2 | ...]. Each question sees the prefix, the picture and itself, never another question or answer,
and its positions start right behind the picture, so that the result equals one sequence per question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpaudit.errors import UsageError
from trainers.records import Picture

LLAVA_TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
IMAGE = "<image>"
IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """B rows (pictures) of L text tokens behind the picture; right-padded.

    input_ids, segment, offset: (B, L) int64. segment: 0, 1, … = question, -1 = padding. offset: position behind the
    picture's last token. targets: (B, L), the token that position l must predict, IGNORE elsewhere. weights: (B, L)
    float32, 1 / (questions * answer tokens of that question) where there is a target, so that a row's weighted sum is
    the mean over its questions of the mean over that question's own answer tokens.
    """

    input_ids: Tensor
    segment: Tensor
    offset: Tensor
    targets: Tensor
    weights: Tensor

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
        )


class Prompter:
    """Turns questions into token ids with one tokenizer and template.

    The template holds `<image>` and `{question}`; it is tokenised whole and split at the image token, so that real
    checkpoints see the very tokens they were trained with.
    """

    def __init__(self, tokenizer: Any, template: str, image_token_id: int) -> None:
        if (
            IMAGE not in template
            or "{question}" not in template
            or template.index(IMAGE) > template.index("{question}")
        ):
            raise UsageError(f"model template: got {template!r}; accepted: text with {IMAGE} before {{question}}")
        self.tokenizer = tokenizer
        self.template = template
        self.image_token_id = image_token_id
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UsageError("model: its tokenizer has no end-of-sequence token")
        self.eos_id = int(eos)
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else self.eos_id
        self._cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.prefix = self._split("?")[0]

    def _split(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before the image token and after it."""
        safe = question.replace(IMAGE, "< image>")  # a question can't smuggle in a second picture
        ids = list(self.tokenizer(self.template.replace("{question}", safe))["input_ids"])
        if ids and ids[-1] == self.eos_id:
            ids = ids[:-1]
        if ids.count(self.image_token_id) != 1:
            raise UsageError(f"model: its tokenizer does not know {IMAGE} as one token (id {self.image_token_id})")
        at = ids.index(self.image_token_id)
        return ids[:at], ids[at + 1 :]

    def question_ids(self, question: str) -> list[int]:
        """Token ids behind the picture, up to where the answer starts."""
        return self._split(question)[1]

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """(question ids, answer ids with the end-of-sequence token)."""
        key = (question, answer)
        if key not in self._cache:
            answer_ids = list(self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"])
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

        return Packed(*(column(name) for name in ("input_ids", "segment", "offset", "targets", "weights")))

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


def attention_mask(segment: Tensor, head: int) -> Tensor:
    """Boolean (B, 1, head + L, head + L) mask, True = may attend, for `head` shared tokens before L packed ones.

    Causal; everyone sees the head; a question sees itself only; padding sees itself (a row of nothing would be NaN).
    """
    rows, length = segment.shape
    full = torch.cat([segment.new_full((rows, head), -2), segment], dim=1)
    total = head + length
    causal = torch.ones(total, total, dtype=torch.bool, device=segment.device).tril()
    same = (full[:, :, None] == full[:, None, :]) & (full[:, :, None] != -1)
    sees_head = (full[:, None, :] == -2) & (full[:, :, None] != -1)
    itself = torch.eye(total, dtype=torch.bool, device=segment.device)
    return ((causal & (same | sees_head)) | itself).unsqueeze(1)
