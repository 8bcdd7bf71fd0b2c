"""`--executor` and its companions: what is refused, and for which audits they mean something."""

import pytest

from dpaudit.cli import app
from dpaudit.cli.executor import LANES, choose
from dpaudit.errors import UsageError
from dpaudit.executors import PROCESSES, LocalExecutor
from dpaudit.executors_ray import RayExecutor
from dpaudit.forks import TRAINING


def test_what_is_asked_is_made() -> None:
    here = choose("local", None, 2, None, None)
    assert here.make(None) == LocalExecutor(PROCESSES, 2, modules=TRAINING) and here.lanes == PROCESSES
    far = choose("ray", None, 1, "head:6379", 0.25)
    assert far.make(None) == RayExecutor("head:6379", gpus_per_trial=0.25) and far.lanes == LANES


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("slurm", None, 1, None, None), "--executor: got 'slurm'; accepted: local or ray"),
        (("local", None, 1, "auto", None), "--address: only with --executor ray"),
        (("local", None, 1, None, 0.5), "--gpus-per-trial: only with --executor ray"),
        (("local", 0, 1, None, None), "--processes: got 0"),
        (("ray", None, 1, None, 1.5), "--gpus-per-trial: got 1.5"),
    ],
)
def test_bad_settings_are_told_before_anything_starts(asked: tuple, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(*asked)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "flags", [["--executor", "ray"], ["--processes", "2"], ["--address", "auto"], ["--gpus-per-trial", "1"]]
)
@pytest.mark.parametrize("target", [["nowhere"], ["--trainer", "a:b"]])
def test_an_audit_without_many_trainings_refuses_them(
    target: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["audit", *target, *flags]) == 2
    assert f"{flags[0]}: belongs to --trainer --runs N or --mia --references K" in capsys.readouterr().err
