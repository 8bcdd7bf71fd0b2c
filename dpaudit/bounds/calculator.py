"""The bounds by name, from counts alone: what `dpaudit bound METHOD` computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpaudit import validate
from dpaudit.bounds import bayes, clopper_pearson, gdp, mahloujifar, steinke
from dpaudit.bounds.clopper_pearson import Counts
from dpaudit.documents import Assumes, BoundDocument
from dpaudit.errors import UsageError, rejected

Arguments = Mapping[str, float | int | None]

THRESHOLD = ("tp", "fn", "fp", "tn")
ONE_RUN = ("canaries", "guesses", "correct")
ORDERED = ("canaries", "guesses", "errors")
FAMILY = ("sample-rate", "steps")


@dataclass(frozen=True)
class Method:
    """A bound: the counts it needs, those it may take, and what it assumes."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    assumes: Assumes
    compute: Callable[[Arguments, float, float], tuple[float, float]]
    estimate: bool = False


def compute(method: str, arguments: Arguments, *, delta: float, confidence: float) -> BoundDocument:
    """Bound and ceiling of `method`; raises UsageError for an unknown method or missing, foreign or bad arguments."""
    if method not in METHODS:
        raise rejected("METHOD", method, METHODS)
    chosen = METHODS[method]
    given = {name for name, value in arguments.items() if value is not None}
    missing = [name for name in chosen.needs if name not in given]
    foreign = sorted(given - set(chosen.needs) - set(chosen.takes))
    options = " ".join(f"--{name}" for name in chosen.needs) + "".join(f" [--{name}]" for name in chosen.takes)
    if missing:
        raise UsageError(f"--{missing[0]}: missing; {method} takes {options}")
    if foreign:
        raise UsageError(f"--{foreign[0]}: not an option of {method}; it takes {options}")
    assumes = chosen.assumes
    if method == "order-statistic" and given & set(FAMILY):
        assumes = "dp-sgd(q,T)"
    lower, top = chosen.compute(arguments, validate.delta(delta), validate.confidence(confidence))
    return BoundDocument(
        method=method,
        epsilon_lower=lower,
        ceiling=top,
        confidence=confidence,
        delta=delta,
        assumes=assumes,
        estimate=chosen.estimate,
    )


def _int(arguments: Arguments, name: str) -> int:
    return validate.count(name, arguments[name])


def _counts(arguments: Arguments) -> Counts:
    return Counts(*(_int(arguments, name) for name in THRESHOLD))


def _clopper_pearson(arguments: Arguments, delta: float, confidence: float) -> tuple[float, float]:
    counts = _counts(arguments)
    return (
        clopper_pearson.epsilon_lower(counts, delta=delta, confidence=confidence),
        clopper_pearson.ceiling(counts, delta=delta, confidence=confidence),
    )


def _gdp(arguments: Arguments, delta: float, confidence: float) -> tuple[float, float]:
    counts = _counts(arguments)
    return (
        gdp.epsilon_lower(counts, delta=delta, confidence=confidence),
        gdp.ceiling(counts, delta=delta, confidence=confidence),
    )


def _bayes(arguments: Arguments, delta: float, confidence: float) -> tuple[float, float]:
    counts = _counts(arguments)
    return (
        bayes.epsilon_lower(counts, delta=delta, confidence=confidence),
        bayes.ceiling(counts, delta=delta, confidence=confidence),
    )


def _steinke(arguments: Arguments, delta: float, confidence: float) -> tuple[float, float]:
    m, r, v = (_int(arguments, name) for name in ONE_RUN)
    return (
        steinke.epsilon_lower(canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence),
        steinke.ceiling(canaries=m, guesses=r, delta=delta, confidence=confidence),
    )


def _mahloujifar(arguments: Arguments, delta: float, confidence: float) -> tuple[float, float]:
    m, r, v = (_int(arguments, name) for name in ONE_RUN)
    return (
        mahloujifar.epsilon_lower(canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence),
        mahloujifar.ceiling(canaries=m, guesses=r, delta=delta, confidence=confidence),
    )


def _order_statistic(arguments: Arguments, delta: float, confidence: float) -> tuple[float, float]:
    from dpaudit.bounds import order_statistic

    n, r, u = (_int(arguments, name) for name in ORDERED)
    if arguments.get("sample-rate") is None and arguments.get("steps") is None:
        return (
            order_statistic.epsilon_lower(canaries=n, guesses=r, errors=u, delta=delta, confidence=confidence),
            order_statistic.ceiling(canaries=n, guesses=r, delta=delta, confidence=confidence),
        )
    from dpaudit.bounds import dp_sgd

    q = validate.real("sample-rate", _or_one(arguments.get("sample-rate")), low=0.0, high=1.0, open_low=True)
    steps = validate.count("steps", _or_one(arguments.get("steps")), least=1)
    lower, top = (
        dp_sgd.epsilon_lower(q, steps, dp_sgd.Ordered(n, r, errors), delta=delta, confidence=confidence)
        for errors in (u, 0)
    )
    return lower, top


def _or_one(value: float | int | None) -> float | int:
    return 1 if value is None else value


METHODS: dict[str, Method] = {
    "clopper-pearson": Method(THRESHOLD, (), "none", _clopper_pearson),
    "gdp": Method(THRESHOLD, (), "gaussian", _gdp),
    "bayes": Method(THRESHOLD, (), "prior", _bayes, estimate=True),
    "steinke": Method(ONE_RUN, (), "none", _steinke),
    "mahloujifar": Method(ONE_RUN, (), "gaussian", _mahloujifar),
    "order-statistic": Method(ORDERED, FAMILY, "gaussian", _order_statistic),
}

# What the assumption means, for people.
ASSUMPTIONS: dict[str, str] = {
    "none": "assumes nothing about the mechanism",
    "gaussian": "assumes the Gaussian family: outside it the truth may be lower",
    "dp-sgd(q,T)": "assumes DP-SGD with this sample rate and number of steps",
    "prior": "a credible bound under a prior, an estimate and never a verdict",
}
