"""Fused-region canaries: a secret that only the fused tokens can carry, and its counterpart that the kept ones carry.

All candidates show the same public picture with a colour code painted on a few patches, and ask for the word that
belongs to the code. In one half of them the code lies on patches of low attention, which the reducer merges (or drops);
in the other half, the counterparts, on dominant patches, which it keeps. Nothing else differs, so the
exposure of the counterparts minus that of the others measures what the path from low-attention patches loses, and what
remains is what it carries.

The encoder mixes patches before the reducer looks at them, so a little of the code also reaches the kept tokens: a run
with `cls-topk`, which drops the merged patches, shows how much (docs/fusion-path.md).

Where a code lies is decided on the frozen public tower and this run's reducer and checked on the finished picture. The
choice is stored with the coins, since rounding may differ between machines.
"""

from collections.abc import Sequence

import numpy as np

from attacks.kinds import PUBLIC_WORDS, Draft, Materials, Selection, noise_picture, single
from dpaudit.errors import UsageError
from trainers.records import Pixels

LOW, DOMINANT = "a code in patches of low attention", "a code in dominant patches"
PATCHES = 4  # of a code, where the picture has room: more of them seldom stay in their region when they are painted
TRIES = 60
STRONGEST, WEAKEST = 110.0, 4.0  # levels of colour that a code adds or takes; weaker with every try


def grid(count: int) -> int:
    """Patches along one side of a picture with `count` of them. UsageError for a grid that is not square."""
    side = round(count**0.5)
    if side * side != count:
        raise UsageError(f"canaries.kinds: kind 'fused-region' needs a square grid of patches, the encoder has {count}")
    return int(side)


def painted(base: Pixels, patches: Sequence[int], side: int, strength: float, rng: np.random.Generator) -> Pixels:
    """`base` with each of the patches (row-major, `side` a row) moved to a colour of its own."""
    out = base.astype(np.float64)
    edges = [round(place * len(base) / side) for place in range(side + 1)]
    for patch in patches:
        row, column = divmod(int(patch), side)
        shift = strength * rng.choice([-1.0, 1.0], size=3)
        out[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] += shift
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


class FusedRegion:
    """A code on merged patches, with a counterpart on kept ones; see the module's text."""

    name = "fused-region"
    description = (
        "One public picture with a colour code on patches of low attention (which only fused tokens carry) or, as "
        "counterpart, on dominant patches; the answer is the code's word."
    )
    synthetic = True
    question = "which word belongs to the coloured fields?"

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """Codes in both regions by turns. Raises UsageError where the run's reducer selects no patches."""
        if materials.selection is None:
            raise UsageError(
                "canaries.kinds: kind 'fused-region' needs a reducer that selects patches by attention; accepted: "
                "reducer.name visionzip or cls-topk"
            )
        side = min(materials.height, materials.width)
        base = noise_picture(side, side, rng)
        seeds = [int(seed) for seed in rng.integers(2**31, size=count)]
        words = [PUBLIC_WORDS[int(place)] for place in rng.integers(len(PUBLIC_WORDS), size=count)]
        stored = materials.chosen.get(self.name)
        if stored is None:
            stored = self._choose(base, seeds, materials.selection)
            materials.chosen[self.name] = stored
        patches, size = stored[0], stored[1]
        if len(stored) != 2 + count * (1 + size):
            raise UsageError("coins: the codes stored in them do not fit this run's kinds and count")
        drafts = []
        for place, (seed, word) in enumerate(zip(seeds, words, strict=True)):
            at = 2 + place * (1 + size)
            pixels = self._picture(base, stored[at + 1 : at + 1 + size], grid(patches), seed, stored[at])
            drafts.append(Draft(single(pixels, self.question, word, "code"), DOMINANT if place % 2 else LOW))
        return drafts

    @staticmethod
    def _picture(base: Pixels, patches: Sequence[int], side: int, seed: int, attempt: int) -> Pixels:
        strength = STRONGEST + (WEAKEST - STRONGEST) * attempt / (TRIES - 1)
        return painted(base, patches, side, strength, np.random.default_rng([seed, attempt]))

    def _choose(self, base: Pixels, seeds: Sequence[int], selection: Selection) -> tuple[int, ...]:
        """(patches, size of a code, then attempt and patches of each candidate) as integers for the coin file."""
        kept = selection([base])[0]
        side = grid(len(kept))
        size = max(1, min(PATCHES, int(kept.sum()) // 2, int((~kept).sum()) // 2))
        found: dict[int, tuple[int, ...]] = {}
        for attempt in range(TRIES):
            pending = [place for place in range(len(seeds)) if place not in found]
            if not pending:
                break
            proposed = []
            for place in pending:
                region = np.flatnonzero(kept if place % 2 else ~kept)
                order = np.random.default_rng([seeds[place], attempt, 1]).permutation(len(region))
                proposed.append(tuple(int(patch) for patch in np.sort(region[order[:size]])))
            pictures = [
                self._picture(base, patches, side, seeds[place], attempt)
                for place, patches in zip(pending, proposed, strict=True)
            ]
            for place, patches, mask in zip(pending, proposed, selection(pictures), strict=True):
                inside = mask[list(patches)]
                if inside.all() if place % 2 else not inside.any():
                    found[place] = (attempt, *patches)
        if len(found) < len(seeds):
            raise UsageError(
                f"canaries.kinds: kind 'fused-region' found codes that stay in their region for {len(found)} of "
                f"{len(seeds)} candidates; lower canaries.count, or change reducer.keep"
            )
        return (len(kept), size, *(number for place in range(len(seeds)) for number in found[place]))
