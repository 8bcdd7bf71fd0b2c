"""The command line's contract on the installed program: exit codes, one line an error, stdout for results alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpaudit import __version__
from dpaudit.cli import console
from dpaudit.cli.app import COMMANDS, run
from dpaudit.documents import DOCUMENTS

DPAUDIT = Path(sys.executable).parent / "dpaudit"


def dpaudit(*arguments: str | bytes, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DPAUDIT, *arguments], cwd=cwd, capture_output=True, text=True, errors="replace", check=False, timeout=120
    )


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dpaudit: "), done.stderr
    for word in words:
        assert word in done.stderr


def test_version_and_help() -> None:
    done = dpaudit("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dpaudit {__version__}\n", "")
    done = dpaudit("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    assert console.LIMIT_SENTENCE in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nonsense"], ["nonsense"]),
        (["doctor", "--bogus"], ["--bogus", "--help"]),
        (["doctor", "surplus"], ["surplus"]),
        (["doctor", "--out"], ["--out"]),
        ([b"\xff\xfe"], ["No such command"]),
    ],
)
def test_wrong_usage_exits_2_with_one_line(arguments: list[str | bytes], words: list[str], tmp_path: Path) -> None:
    assert_one_line(dpaudit(*arguments, cwd=tmp_path), 2, *words)


def test_commands_start_without_torch() -> None:
    """`dpaudit bound` must start in under a second: importing the command line pulls in no heavy library."""
    code = (
        "import sys, dpaudit.cli, dpaudit.accounting, dpaudit.claims, dpaudit.ledger, dpaudit.runs, dpaudit.atomic, "
        "dpaudit.randomness, dpaudit.environment, dpaudit.cli.doctor;"
        "print([name for name in ('torch', 'transformers', 'pandas', 'matplotlib', 'sklearn', 'dp_accounting',"
        " 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# A command of our own in place of a real one, to see how each way of ending is turned into an exit code.
_ENDING = """
import sys, types
import dpaudit.cli.app as app
from dpaudit import errors
from dpaudit.cli import console
from dpaudit.documents import CheckDocument

def command() -> None:
    '''Test.'''
    {body}

module = types.ModuleType("ending")
module.command = command
sys.modules["ending"] = module
app.COMMANDS["ending"] = ("ending", "Test.")
sys.argv = ["dpaudit", "ending"]
app.main()
"""


def ending(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _ENDING.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "body, code, line",
    [
        ("console.say('x')", 0, None),
        ("console.finish(console.verdict_exit_code('refuted'))", 1, None),
        ("raise errors.rejected('field', 3, ['a', 'b'])", 2, "dpaudit: field: got 3; accepted: one of a, b"),
        ("raise errors.UsageError('two\\n  lines')", 2, "dpaudit: two lines"),
        ("raise errors.UsageError('red \\x1b[31m bell \\x07 [bold]')", 2, "dpaudit: red \ufffd[31m bell \ufffd [bold]"),
        ("raise errors.InvalidGame('coins edited')", 3, "dpaudit: coins edited"),
        ("raise errors.EnvironmentFailure('disk full')", 4, "dpaudit: disk full"),
        ("raise KeyboardInterrupt", 130, "dpaudit: interrupted; finished work is kept"),
    ],
)
def test_every_ending_has_its_exit_code(body: str, code: int, line: str | None) -> None:
    process = ending(body)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == ("" if line is None else line + "\n")


def test_a_defect_keeps_its_traceback() -> None:
    process = ending("raise ZeroDivisionError")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 70 and "| Traceback" in stderr
    assert stderr.splitlines()[-1].startswith("dpaudit: defect: ZeroDivisionError; no verdict was reached")


@pytest.mark.parametrize(
    "body",
    ["raise SystemExit(0)", "raise SystemExit(1)", "raise MemoryError", "raise GeneratorExit", "import no_such_module",
     "raise RuntimeError('\\x1b[2J\\nverdict   not refuted')", "assert False"],
)  # fmt: skip
def test_what_nobody_expected_is_no_verdict(body: str) -> None:
    """Code 1 means refuted or unsupported, 0 that all is well: neither may come by accident or from foreign code."""
    process = ending(body)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 70 and stdout == ""
    assert "\x1b" not in stderr and not any(line.startswith("verdict") for line in stderr.splitlines())


def test_ctrl_c() -> None:
    process = ending("import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.count("\n") == 1


def test_a_reader_that_goes_away() -> None:
    process = ending("[console.say('x' * 1000) for _ in range(10000)]")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == console.ENVIRONMENT and stderr == ""


def test_json_is_exactly_one_document() -> None:
    process = ending("console.log('progress'); console.emit(CheckDocument(verdict='pass', checks=()))")
    stdout, stderr = process.communicate(timeout=60)
    assert json.loads(stdout)["verdict"] == "pass" and stderr == "progress\n"


@pytest.mark.parametrize(
    "verdict, strict, code",
    [
        ("refuted", False, 1), ("unsupported", False, 1), ("invalid", False, 3), ("invalid", True, 3),
        ("inconclusive", False, 0), ("inconclusive", True, 3), ("not refuted", True, 0), ("no claim", True, 0),
    ],
)  # fmt: skip
def test_exit_codes_of_verdicts(verdict: str, strict: bool, code: int) -> None:
    assert console.verdict_exit_code(verdict, strict=strict) == code  # type: ignore[arg-type]


def test_run_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dpaudit {__version__}\n"
    assert run(["no-such-command"]) == 2


def test_every_document_kind_is_unique() -> None:
    assert len({document.named() for document in DOCUMENTS}) == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("audit no-such-run 2>/dev/full", 2),  # it was 1, which means refuted
        ("audit no-such-run 2>&-", 2),
        ("audit no-such-run 2>&- >&- <&-", 2),
        ("bound steinke --canaries 100 --guesses 50 --correct 40 >/dev/full", 4),
        ("bound steinke --canaries 100 --guesses 50 --correct 40 --json >/dev/full 2>&1", 4),
        ("--help >/dev/full", 4),
        ("--version >&-", 0),
    ],
)
def test_streams_that_can_not_be_written_choose_no_verdict(tmp_path: Path, line: str, code: int) -> None:
    done = subprocess.run(["bash", "-c", f"exec {DPAUDIT} {line}"], cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == []
