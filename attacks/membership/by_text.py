"""Attacks that see answers only, as a user of a deployed model does."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.membership.attack import Attack
from attacks.membership.signals import mean_by_record
from attacks.membership.units import Asked
from attacks.membership.view import View
from trainers.generation import greedy
from trainers.records import Image, Question
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]

TEMPERATURES = (0.5, 1.0, 1.5)
MOST_NEW_TOKENS = 12
AT_ONCE = 128


def similarity(answer: str, truth: str) -> float:
    """F1 of character pairs, 1 for equal texts: close to ROUGE for long answers and still graded for one word."""
    a, b = answer.strip().casefold(), truth.strip().casefold()
    if a == b:
        return 1.0
    pairs_a, pairs_b = (Counter(f" {text} "[at : at + 2] for at in range(len(text) + 1)) for text in (a, b))
    shared = (pairs_a & pairs_b).total()
    return 2.0 * shared / max(1, pairs_a.total() + pairs_b.total())


def similarities(answers: Sequence[str], truths: Sequence[str]) -> Floats:
    """`similarity` of every pair."""
    return np.array([similarity(answer, truth) for answer, truth in zip(answers, truths, strict=True)])


class AnswerSimilarity(Attack):
    """How much closer to the record's own answers the model answers than the base model does."""

    name = "answer-similarity"
    source = "M4I, metric-based (Hu et al. 2022), against the base model"
    level = "text"
    needs = frozenset({"base"})
    cost = "1 generation, 1 of the base"

    def scores(self, view: View) -> Floats:
        asked = Asked.of(view.units)
        gained = similarities(view.target.answers, asked.answers) - similarities(view.base.answers, asked.answers)
        return mean_by_record(gained, asked.owner, len(view.units))


class TemperatureSensitivity(Attack):
    """Mean similarity of sampled answers to the record's own over temperatures 0.5, 1 and 1.5: what was memorised
    survives heat. Published for sets of records."""

    name = "temperature"
    source = "Hu et al. 2025 (arXiv 2501.18624)"
    level = "text"
    cost = "3 generations"

    def scores(self, view: View) -> Floats:
        asked = Asked.of(view.units)
        seed = int(view.rng(self.name).integers(2**31))
        total = np.zeros(len(asked.answers))
        for index, temperature in enumerate(TEMPERATURES):
            drawn = sampled_answers(
                view.target.model, asked.shown, asked.questions, temperature=temperature, seed=seed + index
            )
            total += similarities(drawn, asked.answers)
        return mean_by_record(total / len(TEMPERATURES), asked.owner, len(view.units))


class _Heated:
    """A model (or its family) whose greedy choice is a sample at a temperature: argmax(logits / T + Gumbel noise)."""

    def __init__(self, wrapped: Any, temperature: float, draw: torch.Generator) -> None:
        self._wrapped, self._temperature, self._draw = wrapped, temperature, draw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    @property
    def family(self) -> "_Heated":
        return _Heated(self._wrapped.family, self._temperature, self._draw)

    def output(self, hidden: Tensor) -> Tensor:
        """Logits over the temperature with Gumbel noise."""
        logits: Tensor = self._wrapped.output(hidden).float().cpu()
        uniform = torch.rand(logits.shape, generator=self._draw).clamp(min=1e-20)
        return (logits / self._temperature - (-uniform.log()).log()).to(hidden.device)


def sampled_answers(
    model: VisionLanguageModel,
    shown: Sequence[tuple[Image, ...]],
    questions: Sequence[Question],
    *,
    temperature: float,
    seed: int,
) -> list[str]:
    """One answer to each question, sampled at a temperature; the same for the same seed."""
    heated: Any = _Heated(model, temperature, torch.Generator().manual_seed(seed))
    ids = [model.prompter.question_ids(item, len(seen)) for item, seen in zip(questions, shown, strict=True)]
    order = sorted(range(len(ids)), key=lambda item: len(ids[item]))
    out = [""] * len(ids)
    for at in range(0, len(order), AT_ONCE):
        chosen = order[at : at + AT_ONCE]
        pictures = [model.shown(model.encoded(shown[item])) for item in chosen]
        texts = greedy(heated, pictures, [ids[item] for item in chosen], MOST_NEW_TOKENS)
        for item, text in zip(chosen, texts, strict=True):
            out[item] = text
    return out


ATTACKS: tuple[Attack, ...] = (AnswerSimilarity(), TemperatureSensitivity())
