"""The public questions on which the base model was instructed.

Three kinds are asked as in the embedded data set. Parity and comparison are asked in other words, so that adapting
the base means learning new questions as well as new handwriting, as adapting a real vision-language model does.
"""

import numpy as np

from trainers.public.scene import NUMBERS
from trainers.records import Picture, Question

LESSON_THRESHOLDS = (3, 4, 5, 6)


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _parity(digit: int, rng: np.random.Generator) -> Question:
    even = digit % 2 == 0
    if rng.integers(2):
        return Question("What is its parity?", "even" if even else "odd", "parity")
    if rng.integers(2):
        return Question("Is the digit even?", _yes(even), "parity")
    return Question("Is the digit odd?", _yes(not even), "parity")


def _comparison(digit: int, rng: np.random.Generator) -> Question:
    threshold = LESSON_THRESHOLDS[int(rng.integers(len(LESSON_THRESHOLDS)))]
    if rng.integers(2):
        return Question(f"Is it more than {NUMBERS[threshold]}?", _yes(digit > threshold), "greater")
    return Question(f"Is the digit less than {NUMBERS[threshold]}?", _yes(digit < threshold), "greater")


def lesson(picture: Picture, rng: np.random.Generator) -> Picture:
    """The same picture with the base model's questions instead of the embedded data set's."""
    asked = {question.kind: question for question in picture.questions}
    digit = NUMBERS.index(asked["digit"].answer)
    questions = (asked["digit"], asked["identity"], _parity(digit, rng), _comparison(digit, rng), asked["side"])
    return Picture(picture.id, picture.pixels, questions)
