"""dpaudit's models inside lmms-eval: the model class (`lmms-eval --model dpaudit --model_args run=RUN`).

Importing this module imports lmms-eval, which reseeds global generators and patches other libraries: only the
benchmark's worker process and lmms-eval's own command line do that.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from dpaudit.errors import UsageError, rejected
from dpaudit.runs import RunFolder
from trainers.data.formats import MAX_PICTURES
from trainers.data.rows import content_sha256
from trainers.prompts import History
from trainers.records import Pixels, Question
from trainers.vlm import VisionLanguageModel

REQUESTS_AT_ONCE = 4096  # pictures decoded at a time; answers do not depend on it
NEW_TOKENS = 12
HISTORY = "history"  # the column of earlier turns, as JSON (reports.heldout)


class DpauditModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A run (or the base model, without `run`) as an lmms-eval model: one picture and one question in, one answer out.

    Greedy generation, batched; the answer to a question does not depend on the batch it is in.
    """

    is_simple = True

    def __init__(
        self,
        run: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        model: VisionLanguageModel | None = None,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        from trainers.run import load_model

        self.batch_size = _batch_size(batch_size)
        if model is None:
            folder = RunFolder.open(Path(run)) if run is not None else None
            model = load_model(folder, device or "auto")
        self.model = model
        self.pictures: dict[tuple[str, int], str] = {}  # (task, question) -> hash of the pictures that were shown
        self.missing: set[tuple[str, int]] = set()  # questions longer than the context: no answer

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        answers: list[str] = []
        for at in range(0, len(requests), REQUESTS_AT_ONCE):
            answers += self._answers(requests[at : at + REQUESTS_AT_ONCE])
        return answers

    def _answers(self, requests: Sequence[Instance]) -> list[str]:
        pixels: list[tuple[Pixels, ...]] = []
        questions: list[Question] = []
        settings = []
        for request in requests:
            context, generation, doc_to_visual, doc_id, task, split = request.args
            row = self.task_dict[task][split][doc_id]
            pixels.append(_pictures(task, doc_id, doc_to_visual(row)))
            self.pictures[task, doc_id] = "".join(map(content_sha256, pixels[-1]))
            questions.append(Question(str(context), "", history=_history(row)))
            settings.append((self.new_tokens(generation), _stops(generation.get("until"))))
        answers = [""] * len(questions)
        for length in sorted({tokens for tokens, _ in settings}):
            chosen = [index for index, (tokens, _) in enumerate(settings) if tokens == length]
            texts = self.model.answer(
                [pixels[index] for index in chosen],
                [questions[index] for index in chosen],
                batch_size=self.batch_size,
                max_new_tokens=length,
            )
            self.missing |= {(requests[chosen[place]].args[4], requests[chosen[place]].args[3])
                             for place in self.model.too_long}  # fmt: skip
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = _until(text, settings[index][1])
        return answers

    @staticmethod
    def new_tokens(generation: Mapping[str, Any]) -> int:
        """How long an answer may be: what the task says, or 12 tokens."""
        return int(generation.get("max_new_tokens") or NEW_TOKENS)

    def clean(self) -> None:
        """Nothing to free: the worker moves on to the next model or ends (the base class spends seconds on this)."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: dpaudit's models answer in words."""
        raise UsageError("task output_type: got 'loglikelihood'; accepted: 'generate_until' for model dpaudit")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: one question, one answer."""
        raise UsageError(
            "task output_type: got 'generate_until_multi_round'; accepted: 'generate_until' for model dpaudit"
        )


def _batch_size(value: int | str | None) -> int:
    try:
        size = 128 if value is None else int(value)
    except ValueError as error:
        raise rejected("batch_size", value, "a whole number of at least 1") from error
    if size < 1:
        raise rejected("batch_size", value, "a whole number of at least 1")
    return size


def _pictures(task: str, question: int, visuals: Any) -> tuple[Pixels, ...]:
    """The pictures of a question, in order. None, too many, or a video: one clear line, and nothing is measured."""
    count = len(visuals) if isinstance(visuals, list | tuple) else 0
    if not 1 <= count <= MAX_PICTURES or not all(isinstance(item, Image.Image) for item in visuals):
        found = f"{count} pictures" if not 1 <= count <= MAX_PICTURES else "a video or sound"
        raise rejected(f"task {task}, question {question}", found, f"1 to {MAX_PICTURES} pictures a question")
    return tuple(np.asarray(item.convert("RGB"), dtype=np.uint8) for item in visuals)


def _history(row: Any) -> History:
    """The turns before a question of a run's own held-out set; nothing for other tasks."""
    given = row.get(HISTORY) if isinstance(row, dict) else None
    return tuple((str(asked), str(said)) for asked, said in json.loads(given)) if isinstance(given, str) else ()


def _stops(until: object) -> tuple[str, ...]:
    stops = [until] if isinstance(until, str) else until if isinstance(until, list | tuple) else []
    return tuple(str(stop) for stop in stops if stop)


def _until(text: str, stops: Sequence[str]) -> str:
    cuts = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(cuts)] if cuts else text
