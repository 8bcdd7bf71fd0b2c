"""Code under audit that ends its process reaches no verdict, whatever exit code it chooses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpaudit.cli import supervised

COMMAND = """
import ctypes, os, signal, sys, time
from dpaudit.cli import supervised
def command():
    print("child", os.getpid(), flush=True)
    {body}
sys.exit(supervised.run(command))
"""


def start(body: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a child ends with its parent on Linux only")
@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return 0", 0, False),
        ("return 1", 1, False),
        ("return 3", 3, False),
        ("os._exit(0)", 70, True),
        ("os._exit(1)", 70, True),
        ("os._exit(2)", 2, False),  # what the watchdog does, after its message
        ("ctypes.CDLL(None)._exit(0)", 70, True),
        ("os.execv('/bin/true', ['true'])", 70, True),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, False),
    ],
)
def test_the_exit_code_is_the_one_that_was_reached(body: str, code: int, said: bool) -> None:
    done = start(body)
    _, err = done.communicate(timeout=60)
    assert (done.returncode, "ended the process" in err) == (code, said), err


@pytest.mark.skipif(sys.platform != "linux", reason="a child ends with its parent on Linux only")
def test_signals_reach_the_command_and_it_ends_with_its_parent() -> None:
    waiting = "try:\n        print(1, flush=True)\n        time.sleep(60)\n    except KeyboardInterrupt: return 130"
    interrupted = start(waiting)
    assert interrupted.stdout is not None
    assert [interrupted.stdout.readline()[:5], interrupted.stdout.readline()] == ["child", "1\n"]
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    killed = start("time.sleep(60)")
    assert killed.stdout is not None
    child = int(killed.stdout.readline().split()[1])
    killed.kill()
    killed.wait(timeout=60)
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child lives on")


def test_which_commands_are_supervised() -> None:
    wanted = [["check", "a:b"], ["audit-trainer", "a:b"], ["audit", "--trainer", "a:b"], ["audit", "--trainer=a:b"]]
    assert all(supervised.wanted(words) for words in wanted) is (sys.platform == "linux")
    for words in ([], ["--version"], ["audit", "run"], ["scores", "check"], ["train", "--out", "audit-trainer"]):
        assert not supervised.wanted(words)


@pytest.mark.skipif(sys.platform != "linux", reason="a child ends with its parent on Linux only")
def test_the_installed_command(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(
        "import os\nfrom trainers.adapters.compact import Compact\n"
        "class Ends(Compact):\n    def step(self, indices):\n        os._exit(0)\n"
    )
    command = [str(Path(sys.executable).parent / "dpaudit"), "check", "ends:Ends", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 70 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("dpaudit: the code under audit ended the process")
