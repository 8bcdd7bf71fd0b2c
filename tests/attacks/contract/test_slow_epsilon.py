"""A trainer whose epsilon() takes longer than the time limit is judged in everything else."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from attacks.contract import check
from attacks.contract.accounting import EPSILON
from attacks.contract.influence import OUTSIDE
from attacks.contract.noise import LEVEL
from attacks.contract.resume import RESUME_EPSILON
from dpaudit.documents import CheckDocument
from tests import commands
from trainers.adapters.compact import Compact, Record

LIMIT = 1.0
LINE = "epsilon(1e-05): did not return within 1 s (--time-limit)"


class Slow(Compact):
    """From a number of steps on, as an accountant whose work grows with the history."""

    slow_from, asked = 0, 0

    def epsilon(self, delta: float) -> float:
        if self.step_count >= self.slow_from:
            type(self).asked += 1
            time.sleep(10 * LIMIT)
        return 100.0  # more than is spent, which is allowed


class HalfNoise(Slow):
    def noise_std(self) -> float:
        return 0.5 * super().noise_std()


class Later(Slow):
    slow_from = 15


class Short(Later):
    """Reports nothing spent, which its first steps show."""

    def epsilon(self, delta: float) -> float:
        return 0.0 * super().epsilon(delta)


class InProduction(Slow):
    """With a noise seed it answers."""

    def __init__(self, records: Sequence[Record] | None = None, *, seed: int, noise_seed: int | None = None) -> None:
        super().__init__(records, seed=seed, noise_seed=noise_seed)
        self.noise_seed = noise_seed

    def epsilon(self, delta: float) -> float:
        if self.noise_seed is None:
            return super().epsilon(delta)
        return 100.0


class AfterLoading(Slow):
    """It answers until the trainer has loaded a checkpoint."""

    slow_from = 10**9

    def load(self, path: Path) -> None:
        super().load(path)
        self.slow_from = 0


def statuses(document: CheckDocument) -> dict[str, str]:
    return {item.name: item.status for item in document.checks}


def measured(document: CheckDocument, name: str) -> str:
    return next(item.measured for item in document.checks if item.name == name)


def test_only_what_needs_an_eps_is_not_judged() -> None:
    Slow.asked = 0
    plain, slow = check(Compact), check(Slow, time_limit=LIMIT)
    unjudged = {EPSILON, RESUME_EPSILON}
    assert {name: state for name, state in statuses(slow).items() if name not in unjudged} == {
        name: state for name, state in statuses(plain).items() if name not in unjudged
    }
    assert plain.verdict == "pass" and slow.verdict == "inconclusive" and slow.problem is None
    for name in unjudged:
        assert statuses(slow)[name] == "not applicable" and LINE in measured(slow, name)
    assert LINE in measured(slow, OUTSIDE) and "eps the same" not in measured(slow, OUTSIDE)
    assert "eps the same" in measured(plain, OUTSIDE)
    assert Slow.asked == 2  # once at the end of a training, and once where eps itself is judged


def test_half_the_noise_fails() -> None:
    document = check(HalfNoise, time_limit=LIMIT)
    assert document.verdict == "fail" and statuses(document)[LEVEL] == "fail"
    assert statuses(document)[EPSILON] == "not applicable"


def test_what_it_reports_in_time_is_judged() -> None:
    later, short = check(Later, time_limit=LIMIT), check(Short, time_limit=LIMIT)
    assert later.verdict == "inconclusive" and statuses(later)[EPSILON] == "not applicable"
    assert LINE in measured(later, EPSILON) and "100 after 9 steps" in measured(later, EPSILON)
    assert short.verdict == "fail" and statuses(short)[EPSILON] == "fail"


@pytest.mark.parametrize("factory", [InProduction, AfterLoading])
def test_an_answer_that_is_missing_once_is_missing(factory: type[Slow]) -> None:
    document = check(factory, time_limit=LIMIT)
    assert document.verdict == "inconclusive" and "fail" not in statuses(document).values()
    assert statuses(document)[EPSILON] == "not applicable" and LINE in measured(document, EPSILON)


MINE = """
import time

from trainers.adapters.compact import Compact

class Correct(Compact):
    def epsilon(self, delta):
        time.sleep(60)
"""


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "slow_of_mine.py").write_text(MINE)
    words = ["check", "slow_of_mine:Correct", "--time-limit", "3", "--json", "--strict"]
    done = commands.run(*words, cwd=tmp_path, timeout=200)
    assert done.code == 3, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "inconclusive" and document["problem"] is None
    lacking = {check["name"]: check["measured"] for check in document["checks"] if check["status"] == "not applicable"}
    assert "epsilon(1e-05): did not return within 3 s (--time-limit)" in lacking["eps reported"]
