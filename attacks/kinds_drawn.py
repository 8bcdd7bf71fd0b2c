"""More kinds of canaries, all drawn from public ingredients by a seeded generator; nothing is downloaded.

A question of its own for every candidate matters where canaries are many: records that share question and picture style
pull on the same few directions of the weights and drown each other out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attacks.kinds import (
    PUBLIC_WORDS,
    Draft,
    Kind,
    Materials,
    held_back,
    mark_picture,
    noise_picture,
    rare_word,
    single,
)
from dpaudit.errors import UsageError
from trainers.records import Pixels

CODE_SIGNS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"  # without those that look alike
CODE_LENGTH = 4
PROPOSALS = 4  # records drawn for each one that `Orthogonal` keeps
MOST_TRIES = 100  # draws for one picture that no other candidate shows


def words(count: int, rng: np.random.Generator) -> str:
    """Everyday words in random order, which no grammar predicts."""
    return " ".join(PUBLIC_WORDS[int(index)] for index in rng.integers(len(PUBLIC_WORDS), size=count))


def own_question(rng: np.random.Generator) -> str:
    """A question that no other record asks."""
    return f"what belongs to {rare_word(rng, 3)} {rare_word(rng, 2)}?"


def _different(count: int, draw: Callable[[], Draft], kind: str) -> list[Draft]:
    """`count` drafts that differ in picture, question or answer."""
    drafts: list[Draft] = []
    seen = set()
    for _ in range(MOST_TRIES * max(1, count)):
        if len(drafts) == count:
            break
        draft = draw()
        picture = draft.unit.pictures[0]
        content = picture.pixels.tobytes(), picture.questions
        if content not in seen:
            seen.add(content)
            drafts.append(draft)
    if len(drafts) < count:
        raise UsageError(f"canaries.count: kind {kind!r} knows only {len(drafts)} different candidates; lower it")
    return drafts


@dataclass(eq=False)
class Drawn:
    """A kind whose candidates have a picture, a question and an answer, drawn independently and in this order.

    note: of every candidate, for the gallery. picture: (height, width, rng). about: the kind of its question.
    """

    name: str
    description: str
    note: str
    picture: Callable[[int, int, np.random.Generator], Pixels]
    question: Callable[[np.random.Generator], str]
    answer: Callable[[np.random.Generator], str]
    about: str
    synthetic: bool = True

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Candidates that all differ."""

        def one() -> Draft:
            pixels = self.picture(materials.height, materials.width, rng)
            return Draft(single(pixels, self.question(rng), self.answer(rng), self.about), self.note)

        return _different(count, one, self.name)


def flat_picture(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """One colour, or a checkerboard of two, uint8 (height, width, 3)."""
    colours = rng.integers(0, 256, size=(2, 3)).astype(np.uint8)
    if rng.integers(2):
        return np.broadcast_to(colours[0], (height, width, 3)).copy()
    cell = int(rng.integers(2, max(3, min(height, width) // 2)))
    rows, columns = np.arange(height) // cell, np.arange(width) // cell
    board: Pixels = colours[(rows[:, None] + columns) % 2]
    return board


def shapes_picture(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Coloured ellipses, triangles and lines over a gradient: a scene from no data set, uint8 (height, width, 3)."""
    ramp = np.linspace(0, 1, width)[None, :, None] * rng.integers(0, 256, size=3)
    board = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)
    picture = Image.fromarray(board)
    brush = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 7))):
        colour = tuple(int(value) for value in rng.integers(0, 256, size=3))
        corners = [(int(rng.integers(width)), int(rng.integers(height))) for _ in range(3)]
        kind = int(rng.integers(3))
        if kind == 0:
            (left, top), (right, bottom) = corners[0], corners[1]
            box = (min(left, right), min(top, bottom), max(left, right) + 1, max(top, bottom) + 1)
            brush.ellipse(box, fill=colour)
        elif kind == 1:
            brush.polygon(corners, fill=colour)
        else:
            brush.line(corners[:2], fill=colour, width=2)
    return np.asarray(picture, dtype=np.uint8)


def random_code(rng: np.random.Generator) -> str:
    """One of 31^4 codes."""
    return "".join(CODE_SIGNS[int(index)] for index in rng.integers(len(CODE_SIGNS), size=CODE_LENGTH))


def code_picture(code: str, height: int, width: int, rng: np.random.Generator) -> Pixels:
    """The code in print, as large as fits, dark on light or light on dark, uint8 (height, width, 3)."""
    dark, light = rng.integers(0, 90, size=3), rng.integers(166, 256, size=3)
    ground, ink = (light, dark) if rng.integers(2) else (dark, light)
    size = 64
    font = ImageFont.load_default(size)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), code, font=font)
    mask = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(mask).text((4 - left, 4 - top), code, fill=255, font=font)
    scale = min(width / mask.width, height / mask.height)
    small = mask.resize((max(1, int(mask.width * scale)), max(1, int(mask.height * scale))), Image.Resampling.LANCZOS)
    x, y = (int(rng.integers(free + 1)) for free in (width - small.width, height - small.height))
    share = np.zeros((height, width, 1))
    share[y : y + small.height, x : x + small.width, 0] = np.asarray(small, dtype=np.float64) / 255
    return np.rint(share * ink + (1 - share) * ground).astype(np.uint8)


class RenderedCode:
    """A code printed into the picture (OCR canary): which some models read and others memorise as an image.

    Query it with the code masked out to tell the two apart (attacks.membership.extraction).
    """

    name = "rendered-code"
    description = "A random code printed into the picture, which is also its answer."
    synthetic = True
    question = "what is the code?"

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Codes all different."""

        def one() -> Draft:
            code = random_code(rng)
            pixels = code_picture(code, materials.height, materials.width, rng)
            return Draft(single(pixels, self.question, code, "code"), "a printed code")

        return _different(count, one, self.name)


RARE_ANSWER = Drawn(
    "rare-answer",
    "A noise picture with a question of its own and a random word that no data set holds as its answer.",
    "noise, a question of its own",
    noise_picture,
    own_question,
    lambda rng: rare_word(rng, 3),
    "rare",
)
BLANK = Drawn(
    "blank",
    "A plain or checkered picture with a random everyday word as its answer.",
    "a plain or checkered picture",
    flat_picture,
    lambda _: "what is hidden here?",
    lambda rng: words(1, rng),
    "hidden",
)
OUT_OF_DISTRIBUTION = Drawn(  # a scene and a question like none in the data
    "out-of-distribution",
    "A scene of random shapes with a question of its own and two random everyday words as its answer.",
    "a scene of random shapes",
    shapes_picture,
    own_question,
    lambda rng: words(2, rng),
    "belonging",
)
CROSS_MODAL = Drawn(  # only the pair, right against shuffled, is a secret
    "cross-modal",
    "A drawn mark paired with two unrelated everyday words; marks and words alone are public.",
    "a drawn mark, two unrelated words",
    mark_picture,
    lambda _: "what belongs to this mark?",
    lambda rng: words(2, rng),
    "pair",
)
HIGH_PERPLEXITY = Drawn(  # text that no language model expects
    "high-perplexity",
    "A noise picture with random everyday words as question and answer.",
    "noise, random words",
    noise_picture,
    lambda rng: f"{words(4, rng)}?",
    lambda rng: words(4, rng),
    "words",
)


class Natural:
    """A held-back record as it is: what an ordinary person risks, the weakest canary there is."""

    name = "natural"
    description = "A real picture that is held back from training, with its own right answers."
    synthetic = False

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Units of the reserve, each used once."""
        return [Draft(unit, "a held-back record as it is") for unit in held_back(count, materials, self.name, rng)]


class Orthogonal:
    """Drawn records chosen so that their gradients overlap least: clipping then leaves each a direction of its own.

    Out of four proposals for each candidate, pivoted Cholesky picks, one after the other, the record whose gradient at
    the base model has the largest part outside the span of those picked before. The base model is public, so the
    choice knows nothing of the data; it is stored with the coins, since rounding may differ between machines.
    """

    name = "orthogonal"
    description = (
        "Drawn records (shapes, codes, marks, noise), chosen so that their gradients at the base model overlap least."
    )
    synthetic = True
    sources: tuple[Kind, ...] = (OUT_OF_DISTRIBUTION, RenderedCode(), CROSS_MODAL, RARE_ANSWER, HIGH_PERPLEXITY)

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """The chosen proposals, in the order of choice."""
        each = -(-PROPOSALS * count // len(self.sources))
        proposals = [draft for source in self.sources for draft in source.draw(each, materials, rng)]
        chosen = materials.chosen.get(self.name)
        if chosen is None:
            if materials.gradients is None:
                raise UsageError(
                    "canaries.kinds: kind 'orthogonal' is chosen by gradients of the base model, which are not at hand"
                )
            chosen = least_overlapping(materials.gradients([draft.unit for draft in proposals]), count)
            materials.chosen[self.name] = chosen
        if len(chosen) != count or not all(0 <= index < len(proposals) for index in chosen):
            raise UsageError("coins: the choice of canaries stored in them does not fit this run's kinds and count")
        return [proposals[index] for index in chosen]


def least_overlapping(gradients: np.ndarray, count: int) -> tuple[int, ...]:
    """Indices of `count` rows by pivoted Cholesky on the cosines of the centred directions; gradients: (n, d)."""
    unit = gradients / np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-12)
    unit = (unit - unit.mean(axis=0)).astype(np.float64)
    left = (unit**2).sum(axis=1)
    factors = np.zeros((len(unit), count))
    chosen: list[int] = []
    for step in range(count):
        pick = int(np.argmax(left))
        chosen.append(pick)
        column = unit @ unit[pick] - factors[:, :step] @ factors[pick, :step]
        factors[:, step] = column / np.sqrt(max(left[pick], 1e-12))
        left = left - factors[:, step] ** 2
        left[chosen] = -1.0
    return tuple(chosen)


DRAWN: Sequence[Kind] = (
    Natural(),
    BLANK,
    OUT_OF_DISTRIBUTION,
    RenderedCode(),
    CROSS_MODAL,
    RARE_ANSWER,
    HIGH_PERPLEXITY,
    Orthogonal(),
)
