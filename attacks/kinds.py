"""Kinds of canaries: records made to be remembered, from public ingredients only.

A kind turns a random generator and public materials into candidates. It never sees a coin: whether a candidate is
inserted is decided later and elsewhere, so nothing about a candidate can tell its membership.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dpaudit.errors import UsageError
from trainers.records import Dataset, Picture, Pixels, Question, Unit

OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
DIGITS = tuple("0123456789")
# Answers for data sets whose public answers are not known: everyday words, fixed here and derived from nothing.
PUBLIC_WORDS = (
    "apple", "bicycle", "black", "blue", "bottle", "bread", "bridge", "bus", "candle", "castle", "cat", "chair",
    "circle", "clock", "cloud", "dog", "door", "eight", "five", "flower", "forest", "four", "glass", "green", "guitar",
    "hammer", "horse", "island", "kitchen", "ladder", "lamp", "left", "mirror", "mountain", "nine", "one", "orange",
    "paper", "pencil", "pillow", "purple", "rectangle", "red", "right", "river", "seven", "shoe", "six", "spoon",
    "square", "star", "table", "ten", "three", "train", "tree", "triangle", "two", "umbrella", "white", "window",
    "winter", "yellow", "zero",
)  # fmt: skip
Gradients = Callable[[Sequence[Unit]], npt.NDArray[np.float32]]
Selection = Callable[[Sequence[Pixels]], npt.NDArray[np.bool_]]
Sampler = Callable[[Sequence[tuple[Pixels, str]], int], list[str]]
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Materials:
    """What kinds may use: units held back from training, unused tokens, a picture size, public answers by kind.

    gradients: (n, d) sketched gradients of units at the public base model, where it is at hand. chosen: for kinds that
    choose among proposals, the choice: given, or left here by the kind. selection: (n, patches) which patches the run's
    reducer keeps of pictures, on the public tower; None where it selects none. sampler: texts of the public base model
    about (picture, question) pairs under a seed.
    """

    reserve: tuple[Unit, ...]
    spare_tokens: tuple[str, ...]
    height: int
    width: int
    public_answers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gradients: Gradients | None = None
    chosen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    selection: Selection | None = None
    sampler: Sampler | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        spare_tokens: Sequence[str],
        *,
        gradients: Gradients | None = None,
        chosen: Mapping[str, tuple[int, ...]] | None = None,
        selection: Selection | None = None,
        sampler: Sampler | None = None,
    ) -> "Materials":
        """Materials for a data set; pictures have the test split's most common size, so no training row is read."""
        sizes = Counter(picture.pixels.shape[:2] for unit in dataset.test for picture in unit.pictures)
        if not sizes:
            raise UsageError("data.test: holds no pictures; canaries take their size from it")
        (height, width), _ = min(sizes.items(), key=lambda item: (-item[1], item[0]))
        answers: Mapping[str, Sequence[str]] = {}
        if dataset.source == "embedded":
            from trainers.data.digits import PUBLIC_ANSWERS

            answers = PUBLIC_ANSWERS
        tokens = tuple(spare_tokens)
        given = dict(chosen or {})
        return cls(dataset.reserve, tokens, int(height), int(width), answers, gradients, given, selection, sampler)


@dataclass(frozen=True)
class Draft:
    """A candidate before it has an id and a coin. `description`: for the gallery; never a private row's content."""

    unit: Unit
    description: str


class Kind(Protocol):
    """One kind of canary."""

    name: str
    description: str  # for the report
    synthetic: bool  # False: shows a real record, so its picture stays private

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """`count` candidates, all different. Raises UsageError when the materials do not suffice."""
        ...


def wrong_answer(question: Question, public_answers: Mapping[str, Sequence[str]], rng: np.random.Generator) -> str:
    """A wrong answer to a question, from public pools only: known answers of its kind, opposites, digits, words."""
    truth = question.answer.strip().casefold()
    pool: Sequence[str] = public_answers.get(question.kind, ())
    if not pool:
        if truth in OPPOSITES:
            return OPPOSITES[truth]
        pool = DIGITS if truth.isdecimal() else PUBLIC_WORDS
    wrong = [answer for answer in pool if answer.strip().casefold() != truth]
    if not wrong:
        raise UsageError(f"canary kind 'mislabelled': question kind {question.kind!r} has one public answer only")
    return wrong[int(rng.integers(len(wrong)))]


def held_back(count: int, materials: Materials, kind: str, rng: np.random.Generator) -> list[Unit]:
    """`count` units of the reserve in random order, each once. Raises UsageError when it holds fewer."""
    if count > len(materials.reserve):
        raise UsageError(
            f"canaries.count: {count} candidates of kind {kind!r} need as many held-back units, the reserve "
            f"holds {len(materials.reserve)}; lower canaries.count, leave the kind out of canaries.kinds, or hold "
            "back more with data.reserve (local sets)"
        )
    return [materials.reserve[index] for index in rng.permutation(len(materials.reserve))[:count]]


class Mislabelled:
    """A real record with wrong answers: the influence of one person whose data contradict everybody else's."""

    name = "mislabelled"
    description = "A real picture that is held back from training, every answer replaced by a wrong one."
    synthetic = False

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Units of the reserve, each used once."""
        return [self._relabel(unit, materials, rng) for unit in held_back(count, materials, self.name, rng)]

    def _relabel(self, unit: Unit, materials: Materials, rng: np.random.Generator) -> Draft:
        pictures = tuple(
            picture.derived(
                questions=tuple(
                    replace(question, answer=wrong_answer(question, materials.public_answers, rng))
                    for question in picture.questions
                ),
            )
            for picture in unit.pictures
        )
        return Draft(replace(unit, pictures=pictures), "a held-back record, wrong answers")


def single(pixels: Pixels, text: str, answer: str, kind: str) -> Unit:
    """A unit of one picture with one question; ids are given later."""
    return Unit(id="", pictures=(Picture(id="", pixels=pixels, questions=(Question(text, answer, kind),)),))


def noise_picture(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Coloured noise at several scales, uint8 (height, width, 3).

    White noise alone looks the same to an encoder whatever its pixels; coarse blocks are what tells pictures apart.
    """
    total = rng.uniform(0.0, 1.0, size=(height, width, 3)) * 0.3
    for cells, share in ((3, 0.4), (8, 0.3)):
        coarse = rng.uniform(0.0, 1.0, size=(cells, cells, 3))
        rows = np.arange(height) * cells // height
        columns = np.arange(width) * cells // width
        total += share * coarse[rows][:, columns]
    return np.clip(np.rint(total * 255), 0, 255).astype(np.uint8)


def rare_word(rng: np.random.Generator, syllables: int = 4) -> str:
    """A pronounceable word that no data set holds: one of 70^syllables (24 million for 4)."""
    return "".join(
        CONSONANTS[int(rng.integers(len(CONSONANTS)))] + VOWELS[int(rng.integers(len(VOWELS)))]
        for _ in range(syllables)
    )


class Noise:
    """A noise picture with a rare answer: nothing but memory can give the answer back."""

    name = "noise"
    description = "A random noise picture with a random code word as its answer."
    synthetic = True
    question = "what is the code word?"

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Pictures and words drawn independently, words all different."""
        drafts: list[Draft] = []
        words: set[str] = set()
        while len(drafts) < count:
            word = rare_word(rng)
            if word not in words:
                words.add(word)
                pixels = noise_picture(materials.height, materials.width, rng)
                drafts.append(Draft(single(pixels, self.question, word, "code word"), "noise, a rare word"))
        return drafts


def mark_picture(height: int, width: int, rng: np.random.Generator, cells: int = 5) -> Pixels:
    """A mirror-symmetric block pattern in two colours, uint8 (height, width, 3)."""
    half = rng.integers(0, 2, size=(cells, (cells + 1) // 2), dtype=np.int64)
    pattern = np.concatenate([half, half[:, : cells // 2][:, ::-1]], axis=1)
    dark, light = rng.integers(0, 110, size=3), rng.integers(146, 256, size=3)
    colours = np.stack([dark, light]).astype(np.uint8)
    rows = np.arange(height) * cells // height
    columns = np.arange(width) * cells // width
    pixels: Pixels = colours[pattern[rows][:, columns]]
    return pixels


class NewToken:
    """A synthetic picture whose answer is a token used nowhere else (Panda et al. 2025, "new token")."""

    name = "new-token"
    description = "A drawn mark whose answer is a token that nothing else in training uses."
    synthetic = True
    question = "which mark is this?"

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """One spare token each, in the order given."""
        if count > len(materials.spare_tokens):
            raise UsageError(
                f"canaries.count: {count} candidates of kind 'new-token' need as many unused tokens, the tokenizer "
                f"offers {len(materials.spare_tokens)}; lower canaries.count or leave the kind out of canaries.kinds"
            )
        return [
            Draft(
                single(mark_picture(materials.height, materials.width, rng), self.question, token, "mark"),
                "a drawn mark, a token of its own",
            )
            for token in materials.spare_tokens[:count]
        ]


FIRST: tuple[Kind, ...] = (Mislabelled(), Noise(), NewToken())
