"""Bounds from independent runs under every threshold rule, for many simulated audits at once."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from dpaudit.bounds import bands
from dpaudit.bounds.clopper_pearson import upper_rate

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
DELTA, CONFIDENCE = 1e-5, 0.95


def tables(n_in: int, n_out: int, rule: str, tail: float) -> tuple[Floats, Floats]:
    """Upper limits of the FNR by misses and of the FPR by alarms."""
    if rule in ("threshold", "split"):
        return tuple(np.array([upper_rate(k, n, tail) for k in range(n + 1)]) for n in (n_in, n_out))  # type: ignore[return-value]
    band = {"bonferroni": bands.bonferroni, "dkw": bands.dkw, "order-statistic band": bands.order_statistic}[rule]
    return band(n_in, tail), band(n_out, tail)


def rates(inside: Floats, outside: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats, Coins]:
    """Misses and alarms at every threshold "score >= sorted pooled score"; last: thresholds that split no tie."""
    pooled = np.hstack([inside, outside])
    order = np.argsort(pooled, axis=1, kind="stable")
    member = order < inside.shape[1]
    values = np.take_along_axis(pooled, order, axis=1)
    misses = np.cumsum(member, axis=1) - member
    alarms = outside.shape[1] - (np.cumsum(~member, axis=1) - ~member)
    whole = np.hstack([np.ones((pooled.shape[0], 1), bool), values[:, 1:] > values[:, :-1]])
    return misses, alarms, values, whole


def eps_of(fnr: Floats, fpr: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = np.log((1 - DELTA - fnr) / fpr), np.log((1 - DELTA - fpr) / fnr)
    return np.maximum(0.0, np.nan_to_num(np.maximum(a, b), nan=0.0, neginf=0.0))


def mu_of(fnr: Floats, fpr: Floats) -> Floats:
    return np.maximum(0.0, np.nan_to_num(-ndtri(fpr) - ndtri(fnr), nan=0.0, neginf=0.0))


RUNS_RULES = ("threshold", "split", "bonferroni", "dkw", "order-statistic band")


def runs_rows(inside: Floats, outside: Floats, middle: float) -> Iterator[tuple[str, str, Floats]]:
    """(method, rule, eps or mu of all audits) for independent runs, (audits, n) each."""
    tail = (1 - CONFIDENCE) / 2
    n_in, n_out = inside.shape[1], outside.shape[1]
    misses, alarms, _, whole = rates(inside, outside)
    measures = {"clopper-pearson": eps_of, "gdp": mu_of}
    for rule in RUNS_RULES:
        if rule == "threshold":
            fn_table, fp_table = tables(n_in, n_out, rule, tail)
            fnr, fpr = fn_table[(inside < middle).sum(axis=1)], fp_table[(outside >= middle).sum(axis=1)]
            for method, measure in measures.items():
                yield method, rule, measure(fnr, fpr)
        elif rule == "split":
            h_in, h_out = n_in // 2, n_out // 2
            fn_half, fp_half = tables(h_in, h_out, rule, tail)
            a, b, values, ok = rates(inside[:, :h_in], outside[:, :h_out])
            fn_rest, fp_rest = tables(n_in - h_in, n_out - h_out, rule, tail)
            for method, measure in measures.items():
                best = np.argmax(np.where(ok, measure(fn_half[a], fp_half[b]), -1.0), axis=1)
                cut = values[np.arange(best.size), best][:, None]
                fnr, fpr = (
                    fn_rest[(inside[:, h_in:] < cut).sum(axis=1)],
                    fp_rest[(outside[:, h_out:] >= cut).sum(axis=1)],
                )
                yield method, rule, measure(fnr, fpr)
        else:
            fn_table, fp_table = tables(n_in, n_out, rule, tail)
            for method, measure in measures.items():
                yield method, rule, np.where(whole, measure(fn_table[misses], fp_table[alarms]), 0.0).max(axis=1)
