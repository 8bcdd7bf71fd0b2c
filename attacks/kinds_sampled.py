"""Canaries that the base model itself makes up, at a high temperature and from a public prompt.

Mitchell, Andrew, Ganesh, McMahan and Kairouz 2026 (arXiv 2606.10481) sample canaries from a language model at a
temperature of at least 0.8 with prompts of the task: they are outliers that a person can still read. Here the base
model asks a question about a scene of random shapes, and then answers it, both at temperature 1; a model that asks
nothing (the small reference model) is asked a made-up question. Prompt, pictures and base model are public, so nothing
depends on the data or on a coin. The texts are stored with the coins as code points, since rounding differs between
machines and a sampled text with it.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from attacks.kinds import Draft, Materials, Sampler, single
from attacks.kinds_drawn import own_question, shapes_picture
from dpaudit.config import RunConfig
from dpaudit.errors import UsageError
from trainers.records import Pixels, Question

PROMPT = "Ask a short question about this picture."
TEMPERATURE = 1.0
TRIES = 8  # of a text that came out empty
LONGEST = 200  # characters of a text


class Sampled:
    """Scenes of random shapes with questions and answers sampled from the base model."""

    name = "sampled"
    description = (
        "A scene of random shapes; its question and its answer are sampled from the base model at temperature 1."
    )
    synthetic = True

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Texts are taken from `materials.chosen`, or sampled now and left there.

        Raises UsageError where the base model keeps saying nothing.
        """
        pictures = [shapes_picture(materials.height, materials.width, rng) for _ in range(count)]
        seed, spare = int(rng.integers(2**30)), [own_question(rng) for _ in range(count)]
        stored = materials.chosen.get(self.name)
        if stored is None:
            stored = pack(self._sample(pictures, spare, materials.sampler, seed))
            materials.chosen[self.name] = stored
        texts = unpack(stored)
        if len(texts) != 2 * count or not all(0 < len(text) <= LONGEST for text in texts):
            raise UsageError("coins: the sampled texts stored in them do not fit this run's kinds and count")
        drafts = zip(pictures, texts[:count], texts[count:], strict=True)
        return [Draft(single(*draft, "sampled"), "shapes, sampled texts") for draft in drafts]

    def _sample(
        self, pictures: Sequence[Pixels], spare: Sequence[str], sampler: Sampler | None, seed: int
    ) -> list[str]:
        """The questions, then the answers."""
        if sampler is None:
            raise UsageError("canaries.kinds: kind 'sampled' is sampled from the base model, which is not at hand")
        asked = self._said([(pixels, PROMPT) for pixels in pictures], sampler, 2 * seed)
        questions = [text or other for text, other in zip(asked, spare, strict=True)]
        answers = self._said(list(zip(pictures, questions, strict=True)), sampler, 2 * seed + 1)
        if not all(answers):
            raise UsageError(
                f"canaries.kinds: kind 'sampled' got {sum(map(bool, answers))} answers of {len(answers)} from the base "
                f"model, which says nothing at temperature {TEMPERATURE:g}; leave the kind out"
            )
        return questions + answers

    @staticmethod
    def _said(asked: Sequence[tuple[Pixels, str]], sampler: Sampler, seed: int) -> list[str]:
        """One text each, in one line; empty where none came in TRIES."""
        texts = [""] * len(asked)
        for attempt in range(TRIES):
            empty = [place for place, text in enumerate(texts) if not text]
            if not empty:
                break
            said = sampler([asked[place] for place in empty], seed + attempt * 2**32)
            for place, text in zip(empty, said, strict=True):
                texts[place] = " ".join(text.replace("\0", " ").split())[:LONGEST].strip()
        return texts


def pack(texts: Sequence[str]) -> tuple[int, ...]:
    """Texts as code points, each closed by 0."""
    return tuple(number for text in texts for number in (*map(ord, text), 0))


def unpack(numbers: Sequence[int]) -> list[str]:
    """The texts again. Raises UsageError for numbers that are no characters (halves of a surrogate pair among them)."""
    try:
        whole = "".join(map(chr, numbers))
        whole.encode()
    except (ValueError, OverflowError):
        raise UsageError("coins: the sampled texts stored in them are damaged") from None
    *texts, rest = whole.split("\0")
    return texts if not rest else [*texts, ""]


def sampler_of(config: RunConfig) -> Sampler:
    """Texts of the base model of a configuration, loaded at the first call."""
    from attacks.membership.by_text import sampled_answers
    from trainers.vlm import VisionLanguageModel

    @cache
    def base() -> VisionLanguageModel:
        chosen = config.model
        model = VisionLanguageModel.load(chosen.path, device=chosen.device, precision=chosen.precision)
        model.set_reducer(config.reducer)
        return model

    def sample(asked: Sequence[tuple[Pixels, str]], seed: int) -> list[str]:
        shown, questions = [(pixels,) for pixels, _ in asked], [Question(text, "", "sampled") for _, text in asked]
        return sampled_answers(base(), shown, questions, temperature=TEMPERATURE, seed=seed)

    return sample
