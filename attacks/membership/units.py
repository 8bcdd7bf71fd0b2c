"""Units as attacks read and change them: pictures and questions in the order of units, pictures and questions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trainers.records import Image, Picture, Pixels, Question, Unit
from trainers.vlm import VisionLanguageModel


def pixels_of(units: Sequence[Unit]) -> list[Pixels]:
    """One array a picture."""
    return [picture.pixels for unit in units for picture in unit.pictures]


def questions_of(units: Sequence[Unit]) -> list[Question]:
    """All questions."""
    return [question for unit in units for picture in unit.pictures for question in picture.questions]


@dataclass(frozen=True)
class Asked:
    """Every question of some units with the pictures that it shows, the right answer (Q,), and its unit (Q,)."""

    shown: list[tuple[Image, ...]]
    questions: list[Question]
    answers: list[str]
    owner: npt.NDArray[np.int64]

    @classmethod
    def of(cls, units: Sequence[Unit]) -> "Asked":
        rows = [(i, p.images, q) for i, unit in enumerate(units) for p in unit.pictures for q in p.questions]
        return cls(
            [shown for _, shown, _ in rows],
            [question for *_, question in rows],
            [question.answer for *_, question in rows],
            np.array([index for index, *_ in rows], dtype=np.int64),
        )

    def answered_by(self, model: VisionLanguageModel) -> list[str]:
        """Greedy answers."""
        return model.answer(self.shown, self.questions)


def changed(
    units: Sequence[Unit], pictures: Sequence[Pixels] | None, questions: Sequence[Question] | None
) -> list[Unit]:
    """Units with other pixels (one array a picture) or other questions (one a question), both in reading order."""
    pixels = iter(pictures or ())
    asked = iter(questions or ())
    return [
        replace(
            unit,
            pictures=tuple(
                Picture(
                    picture.id,
                    picture.images[0] if pictures is None else next(pixels),
                    picture.questions if questions is None else tuple(next(asked) for _ in picture.questions),
                    picture.beside,
                )
                for picture in unit.pictures
            ),
        )
        for unit in units
    ]
