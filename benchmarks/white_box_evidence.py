"""The white-box evidence, simulated: false refutations, power, repeated audits, beside the counts it replaced.

    python benchmarks/white_box_evidence.py --out benchmarks/results/white_box_evidence.csv     # about 15 minutes

For each setting (sigma, q, T) a pool of candidates is simulated for each true noise (times the claim), and games of
1,000 candidates are drawn from it with replacement and judged as dpaudit judges them. `auditor`: share of auditors of a
correct claim who refute it at some moment of up to ten games with fresh coins. `kl`: mean log evidence of all canaries
at 0.9 times the noise; refuting by them alone takes 6.9 + 0.8 nats. `counts`: power of the order-statistics test of the
same claim, with the best number of guesses.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
from scipy.stats import binom

from dpaudit import accounting
from dpaudit.analysis.plan import plan
from dpaudit.documents import Claim
from dpaudit.evidence.channel import Channel, simulate
from dpaudit.evidence.coins import Posteriors
from dpaudit.evidence.game import ALL, SHARES, SPARE, Rule
from dpaudit.evidence.noise import NoiseLevel

SETTINGS = (
    (0.5, 0.005, 500), (0.6, 0.01, 100), (0.8, 0.02, 1000), (1.0, 0.05, 200), (1.0, 0.1, 2000),
    (1.2, 0.12, 168), (2.0, 0.25, 100), (4.0, 1.0, 50), (1.0, 1.0, 1), (3.0, 0.5, 400),
)  # fmt: skip
SCALES = (1.0, 1.02, 1.1, 1.5, 0.95, 0.9, 0.7)
CANARIES, ALPHA, GAMES, POOL_NUMBERS = 1000, 0.001, 2000, 8_000_000


def games(channel: Channel, scale: float, rng: np.random.Generator, canaries: int) -> tuple[np.ndarray, np.ndarray]:
    """(GAMES, 2) log evidence: of all canaries alone (with what is kept), and of the whole game with spare
    directions."""
    size = int(np.clip(POOL_NUMBERS // channel.steps, 4000, 40_000))
    seen, coins = simulate(channel, size, rng, scale=scale)
    pool = Posteriors.of(seen, channel)
    rule = Rule(np.arange(canaries) % 2 == 1, SPARE)
    count = SPARE * channel.steps
    alone, whole = np.empty(GAMES), np.empty(GAMES)
    for place in range(GAMES):
        chosen = rng.integers(size, size=canaries)
        noise = NoiseLevel(float(scale**2 * rng.chisquare(count)), count)
        posteriors, tossed = pool.rows(chosen), coins[chosen]
        alone[place] = rule.parts(posteriors, tossed, None)[ALL]
        whole[place] = rule.log_e(posteriors, tossed, noise)
    return alone, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/white_box_evidence.csv"))
    parser.add_argument("--canaries", type=int, default=CANARIES)
    arguments = parser.parse_args()
    rows = []
    allowed = int(binom.ppf(0.999, GAMES, ALPHA))
    for number, (sigma, q, steps) in enumerate(SETTINGS):
        began, channel = time.monotonic(), Channel(sigma, q, steps)
        claim = Claim(
            epsilon=accounting.epsilon(accounting.DpSgd(sigma, q, steps), 1e-5), delta=1e-5, relation="add-remove",
            unit="record", noise_multiplier=sigma, sampling="poisson", sample_rate=q, steps=steps,
        )  # fmt: skip
        row: dict[str, object] = {"sigma": sigma, "q": q, "T": steps, "canaries": arguments.canaries}
        row |= {"eps": round(float(claim.epsilon), 3), "allowed": allowed}
        for scale in SCALES:
            rng = np.random.default_rng([number, round(1000 * scale)])
            alone, whole = games(channel, scale, rng, arguments.canaries)
            if scale >= 1:
                row[f"false {scale:g}"] = int((whole >= -math.log(ALPHA)).sum())
            else:
                row[f"power {scale:g}"] = float((whole >= -math.log(ALPHA)).mean())
                row[f"coins alone {scale:g}"] = float((alone + math.log(SHARES[ALL]) >= -math.log(ALPHA)).mean())
            if scale == 0.9:
                row["kl"] = round(float(alone.mean()), 2)
            if scale == 1.0:
                paths = rng.choice(whole, size=(GAMES, 10)).cumsum(axis=1).max(axis=1)
                row["auditor"] = int((paths >= -math.log(ALPHA)).sum())
        counted = plan(claim, canaries=arguments.canaries, alpha=ALPHA, alternative=0.9, separate=True)
        row["counts 0.9"] = round(counted.power, 4)
        row["seconds"] = round(time.monotonic() - began, 1)
        rows.append(row)
        print(row, flush=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
