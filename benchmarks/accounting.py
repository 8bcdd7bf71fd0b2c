"""eps of 200 settings against computations that share nothing with dpaudit's accountant.

    python benchmarks/accounting.py --out benchmarks/results/accounting.csv [--rows N]

For each (sigma, q, T, delta, relation):

- `exact`: delta(eps) as a contour integral of the moment generating function (Alghamdi et al. 2023, arXiv 2208.09595),
  delta = 1/(2 pi) int M(s)^T e^(-s eps) / (s (s + 1)) du, s = theta + i u, M by the trapezoidal rule over the noise. No
  lattice, no convolution, no truncation of the losses. Both sums converge geometrically; aliasing of the outer one only
  raises delta. `exact_error` is the relative error of delta that cutting the integral may cause, and the eps of the row
  is taken at delta raised and lowered by it.
- the Gaussian's closed form where q = 1, one step's closed form where T = 1; the integral's doubles are right to about
  1e-7, so where it is above the closed form without any sampling, which no sampling exceeds, that is the exact one;
- RDP (dp-accounting) where it says something, and PRV (Opacus) in every eighth row of at most 10,000 steps;
- `mpmath`: every 50th row's contour integral again in 40 digits.

A row holds when dpaudit's eps is not below the exact one, and at most 1 % above the best of all others (or 1e-9). Few
steps at a tiny rate leave an integrand that hardly decays; where cutting it may cost more than 1 % of delta the row is
`unresolved` and says nothing.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr

from dpaudit import accounting
from dpaudit.accounting import DpSgd

Floats = npt.NDArray[np.float64]

SIGMAS = (0.3, 0.5, 0.7, 1.0, 1.5, 3.0, 8.0, 20.0, 60.0, 200.0)
RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1 - 1e-12, 1.0)
STEPS = (1, 30, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
DELTAS = (1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14)
NAMED = (  # found wrong once, in either direction
    (158.1139, 1 - 1e-12, 100_000, 1e-12),
    (0.7, 0.01, 20_000, 1e-12),
    (0.8, 0.001, 100_000, 1e-12),
    (20.0, 0.001, 10_000_000, 1e-6),
    (0.5, 1e-6, 10_000_000, 1e-10),
)
ALLOWED = 1.01
UNRESOLVED = 1e-2
MOST_NODES = 16_384


def settings(rows: int) -> list[tuple[float, float, int, float, str]]:
    """The named settings and a fixed random choice from the grid, every fifth under replace."""
    rng = np.random.default_rng(20_260_101)
    found = [(*setting, "add-remove") for setting in NAMED]
    while len(found) < rows:
        setting = tuple(values[int(rng.integers(len(values)))] for values in (SIGMAS, RATES, STEPS, DELTAS))
        relation = "replace" if len(found) % 5 == 4 else "add-remove"
        if (*setting, relation) not in found:
            found.append((*setting, relation))
    return found


class Contour:
    """delta(eps) of T steps in one direction by contour integration."""

    def __init__(self, sigma: float, rate: float, steps: int, direction: str) -> None:
        shift, self.steps = 1 / sigma, steps
        reach = 14.0
        z = np.linspace(-reach - shift, reach + shift, max(1400, math.ceil((reach + shift) / 0.06)))
        width = z[1] - z[0]

        def normal(centre: float) -> Floats:
            return np.exp(-0.5 * (z - centre) ** 2) / math.sqrt(2 * math.pi) * width

        def loss(g: Floats) -> Floats:  # ln(1 - q + q e^g)
            if rate == 1:
                return g
            near = np.log1p(rate * np.expm1(np.clip(g, -1, 30)))
            return np.where((g > -1) & (g < 30), near, np.logaddexp(math.log1p(-rate), math.log(rate) + g))

        up, down = loss(shift * z - shift**2 / 2), loss(-shift * z - shift**2 / 2)
        mixture = (1 - rate) * normal(0.0) + rate * normal(shift)
        self.losses = {"remove": up, "add": -up, "replace": up - down}[direction]
        self.weights = normal(0.0) if direction == "add" else mixture

    def log_moment(self, s: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
        """ln E e^(s L), through E (e^(s L) - 1), which keeps its digits for tiny losses; shape of s."""
        out = np.empty(s.size, dtype=np.complex128)
        missing = float(self.weights.sum() - 1)
        for start in range(0, s.size, 256):
            part = s[start : start + 256]
            a, b = np.outer(part.real, self.losses), np.outer(part.imag, self.losses)
            top = max(0.0, float(a.max()) - 600)
            if top:
                out[start : start + 256] = np.log(np.exp(a - top + 1j * b) @ self.weights) + top
                continue
            grown = np.expm1(a)
            change = (grown * np.cos(b) - 2 * np.sin(b / 2) ** 2) @ self.weights + missing
            turned = ((1 + grown) * np.sin(b)) @ self.weights
            with np.errstate(divide="ignore", over="ignore"):
                modulus = 0.5 * np.log1p(np.maximum(change * (2 + change) + turned**2, -1))
            out[start : start + 256] = modulus + 1j * np.arctan2(turned, 1 + change)
        return out

    def real(self, theta: float) -> float:
        return float(self.log_moment(np.array([theta + 0j]))[0].real)

    def epsilon(self, delta: float) -> tuple[float, float]:
        """(eps, relative error of delta that cutting the integral may cause)."""
        centre = float(self.weights @ self.losses)
        spread = math.sqrt(max(self.steps * float(self.weights @ (self.losses - centre) ** 2), 1e-300))

        def exponent(x: float, eps: float) -> float:
            theta = math.exp(x)
            return self.steps * self.real(theta) - theta * eps - x - math.log1p(theta)

        def saddle(eps: float) -> tuple[float, float]:
            bounds = (-9 - math.log(spread), 9 - math.log(spread))
            found = minimize_scalar(
                lambda x: exponent(x, eps), bounds=bounds, method="bounded", options={"xatol": 1e-4}
            )
            return math.exp(found.x), float(found.fun)

        low, high = 0.0, spread
        while saddle(high)[1] > math.log(delta):
            low, high = high, 2 * high
        for _ in range(8):  # the exponent alone, about right
            middle = (low + high) / 2
            low, high = (middle, high) if saddle(middle)[1] > math.log(delta) else (low, middle)
        eps, error = high, 1.0
        for _ in range(2):  # once more at the eps found, where the integrand is best
            eps, error = self._solve(saddle(max(eps, 1e-9 * spread))[0], eps, delta, spread)
        return eps, error

    def _solve(self, theta: float, guess: float, delta: float, spread: float) -> tuple[float, float]:
        step = 1e-3 * theta
        values = [self.steps * self.real(theta + d) - math.log((theta + d) * (1 + theta + d)) for d in (-step, 0, step)]
        width = 1 / math.sqrt(abs(values[0] + values[2] - 2 * values[1]) / step**2)
        du, nodes, base = width / 8, 256, values[1]
        if not 0 < du < math.inf:  # the exponent's curvature is lost in rounding: this oracle says nothing
            return guess, math.inf
        while True:
            s = theta + 1j * du * np.arange(nodes)
            logs = self.steps * self.log_moment(s) - np.log(s) - np.log1p(s) - base
            tail = float(np.exp(logs[-32:].real).max()) * float(abs(s[-1])) / du
            if tail < 1e-10 or nodes >= MOST_NODES:
                break
            nodes *= 4
        weights = np.where(np.arange(nodes) == 0, 0.5, 1.0)

        def log_delta(eps: float) -> float:
            total = float((weights * np.exp(logs - (s - theta) * eps).real).sum()) * du / math.pi
            return math.log(max(total, 1e-300)) + base - theta * eps

        # Near the guess only: far from it the integrand oscillates away.
        low, gap = max(0.0, guess - spread / 10), spread / 10
        while low > 0 and log_delta(low) <= math.log(delta):
            low, gap = max(0.0, low - gap), 2 * gap
        if low == 0 and log_delta(0.0) <= math.log(delta):
            return 0.0, tail
        high = guess + spread / 10
        while log_delta(high) > math.log(delta):
            high += spread
        eps = float(brentq(lambda e: log_delta(e) - math.log(delta), low, high, xtol=1e-14 * spread, rtol=1e-12))
        # The tail against the sum, both in units of e^base.
        return eps, tail * du / math.pi / max(math.exp(log_delta(eps) - base + theta * eps), 1e-300)


def one_step(sigma: float, rate: float, delta: float, relation: str) -> float:
    """eps of a single Poisson step in closed form, up to the output where the loss is eps."""
    shift = 1 / sigma

    def mixed(z: float, sign: float) -> float:  # ln of density over that of N(0)
        return float(np.logaddexp(math.log1p(-rate), math.log(rate) + sign * shift * z - shift**2 / 2))

    def beyond(z: float, sign: float) -> float:
        return (1 - rate) * float(ndtr(-z)) + rate * float(ndtr(sign * shift - z))

    def value(z: float) -> tuple[float, float]:
        """(eps, delta) where outputs above z have larger losses than eps."""
        eps = mixed(z, 1.0) - (mixed(z, -1.0) if relation == "replace" else 0.0)
        other = beyond(z, -1.0) if relation == "replace" else float(ndtr(-z))
        return eps, beyond(z, 1.0) - math.exp(min(eps, 700.0)) * other

    start = 0.0 if relation == "replace" else shift / 2  # loss 0
    if value(start)[1] <= delta:
        return 0.0
    return value(float(brentq(lambda z: value(z)[1] - delta, start, shift + 12, xtol=1e-15, rtol=1e-15)))[0]


def exact(sigma: float, rate: float, steps: int, delta: float, relation: str) -> tuple[float, float, str]:
    """(eps, relative error of delta, by what)."""
    moved = 2.0 if relation == "replace" else 1.0
    if rate == 1:
        return accounting.gaussian_epsilon(moved * math.sqrt(steps) / sigma, delta), 0.0, "closed form"
    if steps == 1:
        return one_step(sigma, rate, delta, relation), 0.0, "closed form of one step"
    orders = ("replace",) if relation == "replace" else ("remove", "add")
    value, error = max(Contour(sigma, rate, steps, order).epsilon(delta) for order in orders)
    full = accounting.gaussian_epsilon(moved * math.sqrt(steps) / sigma, delta)
    return min(value, full), error, "contour integral" if value < full else "closed form without sampling"


def in_digits(sigma: float, rate: float, steps: int, eps: float, direction: str) -> float:
    """delta(eps) by the contour integral in 40 digits."""
    from mpmath import mp

    mp.dps = 40
    plain = Contour(sigma, rate, steps, direction)
    spread = math.sqrt(steps * float(plain.weights @ plain.losses**2))

    def exponent(x: float) -> float:
        return steps * plain.real(math.exp(x)) - math.exp(x) * eps - x - math.log1p(math.exp(x))

    bounds = (-9 - math.log(spread), 9 - math.log(spread))
    theta = math.exp(minimize_scalar(exponent, bounds=bounds, method="bounded").x)
    shift, q = 1 / mp.mpf(sigma), mp.mpf(rate)
    z = [mp.mpf(-14) - shift + k * (28 + 2 * shift) / 700 for k in range(701)]
    width = z[1] - z[0]

    def density(x: "mp.mpf") -> "mp.mpf":
        return mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi) * width

    up = [mp.log(1 - q + q * mp.exp(shift * x - shift**2 / 2)) for x in z]
    down = [mp.log(1 - q + q * mp.exp(-shift * x - shift**2 / 2)) for x in z]
    losses = {"remove": up, "add": [-a for a in up], "replace": [a - b for a, b in zip(up, down, strict=True)]}
    mixture = [(1 - q) * density(x) + q * density(x - shift) for x in z]
    weights = [density(x) for x in z] if direction == "add" else mixture
    total, k, du = mp.mpf(0), 0, 0.25 * min(1.0, theta) if spread < 1e-3 else 0.6 / spread
    while k < 400:
        s = mp.mpc(theta, k * du)
        moment = mp.fsum(w * mp.exp(s * a) for w, a in zip(weights, losses[direction], strict=True))
        term = mp.exp(steps * mp.log(moment) - s * eps) / (s * (s + 1))
        total += (term.real / 2 if k == 0 else term.real) * du / mp.pi
        if k > 20 and abs(term) < abs(total) * 1e-12:
            break
        k += 1
    return float(total)


def others(event: DpSgd, delta: float, prv: bool) -> dict[str, float | None]:
    """What RDP says of it, and PRV where it is asked: it takes seconds to minutes."""
    asked = prv and event.steps <= 10_000
    return {
        "rdp": accounting.rdp_epsilon(event, delta),
        "prv": accounting.prv_epsilon(event, delta) if asked else None,
    }


def row(setting: tuple[float, float, int, float, str], digits: bool, prv: bool) -> dict[str, object]:
    """One line of the table."""
    sigma, rate, steps, delta, relation = setting
    event = DpSgd(sigma, rate, steps, relation)  # type: ignore[arg-type]
    began = time.process_time()
    got = accounting.epsilon(event, delta)
    seconds = time.process_time() - began
    truth, error, how = exact(sigma, rate, steps, delta, relation)
    found = others(event, delta, prv)
    least = min([value for value in (truth, found["rdp"], found["prv"]) if value is not None])
    # delta wrong by `error` moves eps by at most that over its slope, which is at least 1 in log delta per unit of eps.
    lower = truth * (1 - 1e-9) - error
    holds = got >= lower and got <= max(ALLOWED * max(least, lower), least + 1e-9)
    again = ""
    if digits and how == "contour integral" and truth > 0:
        orders = ("replace",) if relation == "replace" else ("remove", "add")
        again = f"{max(in_digits(sigma, rate, steps, truth, order) for order in orders) / delta - 1:.1e}"
    return {
        "sigma": sigma, "q": rate, "T": steps, "delta": delta, "relation": relation,
        "dpaudit": f"{got:.10g}", "exact": f"{truth:.10g}", "by": how, "exact_error": f"{error:.1e}",
        "rdp": "" if found["rdp"] is None else f"{found['rdp']:.6g}",
        "prv": "" if found["prv"] is None else f"{found['prv']:.6g}",
        "over": f"{got / truth - 1:.1e}" if 0 < truth < math.inf else "", "mpmath_delta_error": again,
        "cpu_s": f"{seconds:.3f}", "holds": "unresolved" if error > UNRESOLVED else "yes" if holds else "NO",
    }  # fmt: skip


def main(progress: Callable[[str], object] = lambda text: print(text, file=sys.stderr)) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--start", type=int, default=0, help="first row, to share the work between processes")
    parser.add_argument("--most", type=int, default=200, help="rows of this process")
    given = parser.parse_args()
    chosen = settings(given.rows)[given.start : given.start + given.most]
    failed = 0
    with given.out.open("w", newline="") as file:
        writer = None
        for index, setting in enumerate(chosen):
            number = given.start + index
            line = row(setting, digits=number % 50 == 1, prv=number % 8 == 0)
            writer = writer or csv.DictWriter(file, fieldnames=list(line))
            if index == 0 and given.start == 0:
                writer.writeheader()
            writer.writerow(line)
            file.flush()
            failed += line["holds"] == "NO"
            progress(f"{index + 1}/{len(chosen)} {line}")
    progress(f"{len(chosen) - failed} of {len(chosen)} rows do not contradict")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
