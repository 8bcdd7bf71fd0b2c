"""The contract on factories that break the protocol: one line that names the method."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.contract import MethodFailure, check
from dpaudit.errors import UsageError
from trainers.adapters import compact
from trainers.adapters.compact import SHAPES, Compact, Record


def lacking(name: str) -> type:
    class Trainer:
        records = compact.own_records()
        claim = Compact(seed=0).claim

        def step(self, indices: Sequence[int]) -> None: ...

        def released(self) -> dict[str, Tensor]:
            return {}

        def parameters(self) -> dict[str, Tensor]:
            return {}

        def __init__(self, records: Any = None, *, seed: int, noise_seed: int | None = None) -> None: ...

    delattr(Trainer, name)
    return Trainer


@pytest.mark.parametrize("name", ["records", "claim", "step", "released", "parameters"])
def test_a_missing_method_is_named(name: str) -> None:
    with pytest.raises(MethodFailure, match=f"^{name}: missing; the trainer must offer") as failure:
        check(lacking(name))
    assert "\n" not in str(failure.value)


class Slow(Compact):
    def step(self, indices: Sequence[int]) -> None:
        while True:
            with contextlib.suppress(Exception):  # the kind of code that swallows everything
                time.sleep(0.01)


class Raising(Compact):
    def step(self, indices: Sequence[int]) -> None:
        raise RuntimeError("out of\nmemory")


class Leaving(Compact):
    def parameters(self) -> Mapping[str, Tensor]:
        raise SystemExit(0)


class WrongShape(Compact):
    def released(self) -> Mapping[str, Tensor | None]:
        return {**super().released(), "w1": torch.zeros(3)}


class WrongName(Compact):
    def released(self) -> Mapping[str, Tensor | None]:
        return {"w9": torch.zeros(3)}


class NotATensor(Compact):
    def released(self) -> Any:
        return dict.fromkeys(SHAPES, "zeros")


class NoClaim(Compact):
    claim = ("sigma", 1)  # type: ignore[assignment]


class NegativeC(Compact):
    max_grad_norm = -1.0


class OddSampler(Compact):
    def sample(self) -> list[int]:
        return [999]


class OddEpsilon(Compact):
    def epsilon(self, delta: float) -> float:
        return float("nan")


class Blind(Compact):
    def gradient(self, record: Record) -> dict[str, torch.Tensor]:
        raise ValueError("no gradient")


class TwoRecords(Compact):
    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(compact.own_records()[:2], seed=seed, noise_seed=noise_seed)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Slow, r"step\(\[0, 1, 2\]\): did not return within 0.3 s"),
        (Raising, r"step\(\[0, 1, 2\]\): raised RuntimeError: out of memory \(test_protocol.py:\d+\)"),
        (Leaving, r"parameters\(\): raised SystemExit"),
        (WrongShape, r"released\(\): 'w1' has shape \(3,\), the parameter has \(6, 8\)"),
        (WrongName, r"released\(\): names 'w9'"),
        (NotATensor, r"released\(\): '(w1|b1)' is str; accepted: a floating-point tensor or array"),
        (NoClaim, "claim: got tuple; accepted: dpaudit.claims.StepClaim"),
        (Blind, r"^gradient\(a Record\): raised ValueError: no gradient"),  # and nothing of the record
        (NegativeC, r"^claim.max_grad_norm: got -1.0; accepted: a finite number above 0"),
        (OddSampler, r"sample\(\): returned an index outside 0 to 39"),
        (OddEpsilon, r"epsilon\(1e-05\): returned nan"),
        (TwoRecords, "records: holds 2 units; accepted: at least 3"),
        (lambda **_: 1 / 0, r"factory: raised (TypeError|ZeroDivisionError)"),
        (lambda records=None, *, seed, noise_seed=None: None, "records: missing"),
    ],
)
def test_hostile_factories_get_one_line_that_names_the_method(factory: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        check(factory, time_limit=0.3 if factory is Slow else 20.0)
    assert "\n" not in str(failure.value)


def test_a_factory_must_be_callable() -> None:
    with pytest.raises(UsageError, match="factory: got 3"):
        check(3)  # type: ignore[arg-type]


class Whole(Compact):
    def parameters(self) -> dict[str, Any]:
        return {name: value.to(torch.int64) for name, value in super().parameters().items()}


def test_whole_numbers_are_no_parameters() -> None:
    with pytest.raises(MethodFailure, match="accepted: a floating-point tensor or array"):
        check(Whole)
