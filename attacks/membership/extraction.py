"""What leaked, and not only who: exposure of inserted secrets, and answers given back from half of the record.

Exposure (Carlini et al. 2019, "The Secret Sharer"): how far up the true secret ranks among secrets that might have been
there, log2 |R| - log2 rank. With references drawn like the secret, the rank of one that was never seen is uniform: its
exposure reaches k bits with probability at most 2^-k. That gives a test without any distributional assumption.

Regeneration (the template is Deja vu, arXiv 2402.02103): can the model give the answer from the picture alone (a
question that says nothing) or from the question alone (a plain picture)? What the base model can do as well is no leak,
so every figure stands beside the base model's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from attacks.canaries import Canary
from attacks.kinds import rare_word
from attacks.kinds_drawn import CROSS_MODAL, HIGH_PERPLEXITY, OUT_OF_DISTRIBUTION, RARE_ANSWER, random_code
from attacks.membership.by_text import similarities
from attacks.membership.units import Asked, changed, pixels_of, questions_of
from attacks.scores import losses
from dpaudit.bounds.roc import clopper_pearson_interval
from dpaudit.documents import Extraction, Regeneration
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]

REFERENCES = 63  # with the secret 64: exposure up to 6 bits
EMPTY_QUESTION = "what is the answer?"
HIGH = 3.0  # bits: a secret that was never seen gets there once in eight


# How each kind draws its secrets. Kinds whose answers follow from data or labels have none.
SECRETS: Mapping[str, Callable[[np.random.Generator], str]] = {
    **{kind.name: kind.answer for kind in (RARE_ANSWER, OUT_OF_DISTRIBUTION, CROSS_MODAL, HIGH_PERPLEXITY)},
    "noise": rare_word,
    "rendered-code": random_code,
}


@dataclass(frozen=True)
class Exposure:
    """rank (m,): of each secret among REFERENCES + 1, 1 = most likely, ties count against the attack.
    bits (m,): log2(REFERENCES + 1) - log2 rank."""

    rank: npt.NDArray[np.int64]
    bits: Floats


def reference_secrets(canary: Canary, spare_tokens: Sequence[str], rng: np.random.Generator) -> list[str] | None:
    """Other answers that the kind might have drawn, all different from the true one; None where it has no secrets."""
    answer = canary.unit.pictures[0].questions[0].answer
    if canary.kind == "new-token":
        free = [token for token in spare_tokens if token != answer]
        if len(free) < REFERENCES:
            return None
        return [free[int(place)] for place in rng.permutation(len(free))[:REFERENCES]]
    draw = SECRETS.get(canary.kind)
    if draw is None:
        return None
    found: dict[str, None] = {}
    while len(found) < REFERENCES:
        other = draw(rng)
        if other != answer:
            found[other] = None
    return list(found)


def exposure(model: VisionLanguageModel, units: Sequence[Unit], secrets: Sequence[Sequence[str]]) -> Exposure:
    """Ranks of the units' own answers among `secrets` (one list a unit), by loss under `model`.

    units: one picture with one question each. A reference with the same loss as the secret ranks before it.
    """
    own = losses(model, units)
    rank = np.ones(len(units), dtype=np.int64)
    for place in range(REFERENCES):
        questions = [
            replace(unit.pictures[0].questions[0], answer=others[place])
            for unit, others in zip(units, secrets, strict=True)
        ]
        rank += losses(model, changed(units, None, questions)) <= own
    return Exposure(rank, np.log2(REFERENCES + 1) - np.log2(rank))


def exposures(
    target: VisionLanguageModel,
    base: VisionLanguageModel,
    candidates: Sequence[Canary],
    *,
    spare_tokens: Sequence[str],
    seed: int,
) -> tuple[Extraction, ...]:
    """One row a kind: mean exposure of members, of non-members, and of members under the base model.

    p-value: exact binomial, one-sided, for "members reach 3 bits no more often than secrets that nobody saw" (1/8). It
    takes secrets as independent; canaries that meet in the weights are not quite, so it describes and decides nothing.
    """
    rng = np.random.default_rng([seed, 7])
    chosen: dict[str, list[tuple[Canary, list[str]]]] = {}
    for canary in candidates:
        if len(canary.unit.pictures) == 1 and len(canary.unit.pictures[0].questions) == 1:
            others = reference_secrets(canary, spare_tokens, rng)
            if others is not None:
                chosen.setdefault(canary.kind, []).append((canary, others))
    rows = []
    for kind, items in chosen.items():
        units, secrets = [canary.unit for canary, _ in items], [others for _, others in items]
        members = np.array([canary.member for canary, _ in items])
        if not 0 < members.sum() < len(members):
            continue
        after, before = exposure(target, units, secrets), exposure(base, units, secrets)
        high = int((after.bits[members] >= HIGH).sum())
        rows.append(
            Extraction(
                kind=kind,
                members=int(members.sum()),
                others=int((~members).sum()),
                most_bits=float(np.log2(REFERENCES + 1)),
                bits_members=float(after.bits[members].mean()),
                bits_others=float(after.bits[~members].mean()),
                bits_members_base=float(before.bits[members].mean()),
                first_members=int((after.rank[members] == 1).sum()),
                first_others=int((after.rank[~members] == 1).sum()),
                p_value=float(binomtest(high, int(members.sum()), 2.0**-HIGH, alternative="greater").pvalue),
            )
        )
    return tuple(rows)


def half_records(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """The records with one half taken away: 'picture alone' asks a question that says nothing, 'question alone' shows a
    plain grey picture. For rendered codes the latter is the code masked out."""
    silent = [replace(question, text=EMPTY_QUESTION) for question in questions_of(units)]
    grey = [np.full_like(pixels, 128) for pixels in pixels_of(units)]
    return {"picture alone": changed(units, None, silent), "question alone": changed(units, grey, None)}


def regeneration(
    target: VisionLanguageModel, base: VisionLanguageModel, units: Sequence[Unit], members: npt.NDArray[np.bool_]
) -> tuple[Regeneration, ...]:
    """How many questions are answered exactly from half of the record, by members and others, target and base."""
    rows = []
    for half, halves in half_records(units).items():
        asked = Asked.of(halves)
        after, before = (similarities(asked.answered_by(model), asked.answers) for model in (target, base))
        inside = members[asked.owner]
        exact, exact_base = after == 1.0, before == 1.0
        n_in, n_out = int(inside.sum()), int((~inside).sum())
        if not n_in or not n_out:
            continue
        low, high = clopper_pearson_interval(int(exact[inside].sum()), n_in, 0.95)
        rows.append(
            Regeneration(
                half=half,
                questions_members=n_in,
                questions_others=n_out,
                members=float(exact[inside].mean()),
                members_low=low,
                members_high=high,
                others=float(exact[~inside].mean()),
                members_base=float(exact_base[inside].mean()),
                others_base=float(exact_base[~inside].mean()),
                similarity_members=float(after[inside].mean()),
                similarity_others=float(after[~inside].mean()),
            )
        )
    return tuple(rows)
