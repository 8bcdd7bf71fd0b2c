"""Who was added to a sum of clipped gradients? Read from the released update, for all records together.

DP-SGD moves the weights by -lr (sum of clipped gradients + noise) / B a step. To first order the projection of the
whole update on record i's gradient at the base model is its own share, but also everybody else's:

    c_i <g_i, -update> = a (sum over members j of K_ij + <c_i g_i, noise>),
    K_ij = <c_i g_i, c_j g_j>,    c_i = min(1, C / |g_i|).

Canaries of one style pull in nearly the same direction, the others' share is many times the own one, and a score that
reads each projection alone sees next to nothing (AUC 0.5 on the embedded model at eps = 8). But whoever holds the
released adapter, the public base model and the records knows K. The projections are linear in the coins s with noise
of known shape,

    projections = a (K s + K_other 1 + K^(1/2) noise) + kinds' offsets,    s_i in {0, 1} fair and independent,

and the best linear estimate of every coin undoes the mixing: ridge regression, with the noise's size and the misfit
(gradients change while the weights move) taken from the projections themselves by restricted maximum likelihood. The
score is the estimate as a log-likelihood ratio, estimate / (1 - reliability), so records whose direction is their own
come first. It never sees a coin.

Ours; the ingredients: inner products with the update (Andrew et al. 2024, arXiv 2302.03098; Nasr et al. 2019), linear
mixed models (REML, Patterson and Thompson 1971).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

from attacks.membership.gradients import Fold, gradients_of
from trainers.inputs import UnitInputs
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]

MOST_VALUES = 2**28  # kept of all gradients together, a gigabyte
NARROWEST = 4096  # but at least so many of each
NOISE = tuple(np.geomspace(0.1, 300.0, 18))  # noise variance over a coin's, in units of C^2: looked through by REML
MISFIT = (0.0, *np.geomspace(1e-4, 1.0, 9))  # variance of what the linear model misses, over the signal's


@dataclass(frozen=True)
class Gram:
    """k (m, m): inner products of the records' clipped gradients at the base model, in units of C^2. factors (m,):
    c_i. others (m,): inner products with the sum of the clipped gradients of those who certainly took part."""

    k: Floats
    factors: Floats
    others: Floats


def base_gram(
    model: VisionLanguageModel,
    units: Sequence[Unit],
    others: Sequence[Unit] = (),
    *,
    max_grad_norm: float = math.inf,
) -> Gram:
    """Gram of `units` at the base of a tuned model, its released A matrices in place; one backward pass a record.

    Where a training starts, B is 0 and A's gradient with it, so gradients of B are all there is. max_grad_norm: C;
    infinite: nothing is clipped, and the median norm is the unit. others: units that took part for certain.
    """
    names = [name for name in sorted(model.adapter_parameters()) if "lora_B" in name]
    width = sum(model.adapter_parameters()[name].numel() for name in names)
    fold = Fold(width, max(NARROWEST, MOST_VALUES // max(1, len(units))))
    rows = np.zeros((len(units), fold.width), dtype=np.float32)
    norms = np.zeros(len(units))
    for index, row in _rows(model, units, names, fold):
        norms[index], rows[index] = np.linalg.norm(row.astype(np.float64)), row
    unit = max_grad_norm if math.isfinite(max_grad_norm) else float(np.median(norms)) or 1.0
    factors = _factors(norms, max_grad_norm)
    rows *= (factors / unit).astype(np.float32)[:, None]
    total = np.zeros(fold.width)
    for _, row in _rows(model, others, names, fold):
        norm = np.array([np.linalg.norm(row.astype(np.float64))])
        total += row * (_factors(norm, max_grad_norm)[0] / unit)
    return Gram((rows @ rows.T).astype(np.float64), factors, rows.astype(np.float64) @ total)


def _factors(norms: Floats, most: float) -> Floats:
    return np.minimum(1.0, most / np.maximum(norms, 1e-12)) if math.isfinite(most) else np.ones_like(norms)


def _rows(
    model: VisionLanguageModel, units: Sequence[Unit], names: Sequence[str], fold: Fold
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    if not units:
        return
    adapter = {
        name: torch.zeros_like(value) if "lora_B" in name else value.detach().clone()
        for name, value in model.adapter_parameters().items()
    }
    for index, gradient in gradients_of(model, UnitInputs(model, units), range(len(units)), adapter):
        yield index, fold(gradient[name] for name in names)


def unmixed(projections: Floats, gram: Gram, kinds: npt.NDArray[np.str_]) -> Floats:
    """(m,) log-likelihood ratios of the coins from the projections <g_i, -update> (m,).

    Restricted maximum likelihood over noise and misfit, then the best linear unbiased prediction of s - 1/2. Constants
    that are fitted and not predicted: the scale (through K 1/2 + K_other) and an offset for each kind.
    """
    y = projections * gram.factors
    spread = float(y.std())
    if spread <= 0:
        return np.zeros_like(projections)
    y = y / spread
    k = gram.k / float(np.mean(np.diag(gram.k)) or 1.0)
    values, vectors = np.linalg.eigh(k)
    values = np.maximum(values, 0.0)
    fixed = [0.5 * gram.k.sum(axis=1) + gram.others, *((kinds == kind) * gram.factors for kind in np.unique(kinds))]
    x = vectors.T @ np.stack(fixed, axis=1)
    x = x / np.maximum(np.linalg.norm(x, axis=0), 1e-12)
    rotated = vectors.T @ y
    best, chosen = -math.inf, (1.0, 0.0)
    for noise in NOISE:
        for misfit in MISFIT:
            found = _restricted(rotated, x, _spectrum(values, noise, misfit))
            if found > best:
                best, chosen = found, (noise, misfit)
    spectrum = _spectrum(values, *chosen)
    weighted = x / spectrum[:, None]
    effect = np.linalg.lstsq(x.T @ weighted, weighted.T @ rotated, rcond=None)[0]
    rest = rotated - x @ effect
    # Cov(y, s) = K / 4 and Var y = scale * spectrum: estimate and reliability on the scale where a coin has variance 1.
    sigma = math.sqrt(max(float(rest @ (rest / spectrum)) / max(1, len(y) - x.shape[1]), 1e-12))
    estimate = vectors @ (values / spectrum * rest) / sigma
    reliability = np.clip((vectors**2) @ (values**2 / spectrum), 0.0, 1.0 - 1e-6)
    return np.asarray(estimate / (1.0 - reliability))


def _spectrum(values: Floats, noise: float, misfit: float) -> Floats:
    """Eigenvalues of K K + noise K + misfit mean(K K) I: coins (variance 1), noise, what the model misses."""
    return values**2 + noise * values + max(misfit, 1e-9) * float(np.mean(values**2))


def _restricted(y: Floats, x: Floats, spectrum: Floats) -> float:
    """Restricted log-likelihood, the common scale profiled out, constants left out."""
    weighted = x / spectrum[:, None]
    inner = x.T @ weighted
    effect = np.linalg.lstsq(inner, weighted.T @ y, rcond=None)[0]
    rest = y - x @ effect
    freedom = max(1, len(y) - x.shape[1])
    total = max(float(rest @ (rest / spectrum)), 1e-300)
    eigen = scipy.linalg.eigvalsh(inner)
    kept = eigen[eigen > 1e-10 * eigen.max()]
    logs = float(np.log(spectrum).sum()) + float(np.log(kept).sum())
    return float(-0.5 * (freedom * math.log(total) + logs))
