"""What is done with a foreign tokenizer or chat template: in a process of its own, with limits of time and memory.

A pattern of a tokenizer may double a text at every letter or search for years, a template may loop for ever, and
neither can be interrupted inside one process. So they are tried here first, on the very texts they will be used on;
`ask` says what came of it in one line. The child imports nothing of dpaudit and opens no file: everything comes through
its input.
"""

import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS = 10  # of processor time
PATTERN_SECONDS = TEMPLATE_SECONDS = 2  # sound ones take a thousandth
WAITING = 180  # seconds on the clock, on a machine that is busy with other things
MEMORY = 3 << 29  # bytes beyond what the libraries take
MOST_RESULT = 1 << 17  # characters of a prompt
TOKENS_A_CHARACTER, TOKENS_BESIDE = 16, 256  # a byte-level tokenizer takes four at most


class Refused(Exception):
    """The child did not come to an end within its limits, or said why it could not; one line."""


def ask(task: str, given: dict[str, Any], content: bytes = b"", *, seconds: int = SECONDS) -> Any:
    """Run `task` on `given` and `content` in a child and return its answer. Raises Refused."""
    header = json.dumps({"task": task, "seconds": seconds, "memory": MEMORY, **given}).encode()
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__))],
            input=header + b"\n" + content,
            capture_output=True,
            timeout=max(WAITING, 3 * seconds),
            env=os.environ | quiet,
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"takes more than {max(WAITING, 3 * seconds)} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if "result" in answer:
        return answer["result"]
    what = f"takes more than {seconds} s of processor time or {MEMORY >> 20} MB"
    raise Refused(str(answer.get("error", what))[:300])


@lru_cache(maxsize=64)
def matching(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a regular expression matches as a whole. Raises Refused."""
    return tuple(ask("pattern", {"pattern": pattern, "names": list(names)}, seconds=PATTERN_SECONDS))


# -- in the child ----------------------------------------------------------------------------------------------------


def _limit(seconds: int, memory: int) -> None:
    """After the imports: what the task itself may take."""
    try:
        import resource
    except ImportError:
        return
    spent = resource.getrusage(resource.RUSAGE_SELF)
    end = seconds + 1 + int(spent.ru_utime + spent.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing is written
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        now = 1 << 30
    resource.setrlimit(resource.RLIMIT_DATA, (now + memory, now + memory))


def _tokenizer(given: dict[str, Any], content: bytes) -> int:
    """Read a tokenizer and tokenise the texts, and back; the number of tokens."""
    from tokenizers import Tokenizer

    _limit(given["seconds"], given["memory"])
    tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    total = 0
    for text in given["texts"]:
        ids = tokenizer.encode(text).ids
        most = TOKENS_A_CHARACTER * len(text) + TOKENS_BESIDE
        if len(ids) > most:
            raise ValueError(f"turns {len(text)} characters into {len(ids)} tokens")
        if len(tokenizer.decode(ids)) > TOKENS_A_CHARACTER * most:
            raise ValueError(f"turns {len(ids)} tokens into far too much text")
        total += len(ids)
    return total


def _template(given: dict[str, Any], content: bytes) -> list[tuple[str | None, str | None]]:
    """Render a chat template on conversations: text or error of each."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit(given["seconds"], given["memory"])
    template = content.decode("utf-8")
    found: list[tuple[str | None, str | None]] = []
    for messages in given["conversations"]:
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=True,
                enable_thinking=False,
                **given["special"],
            )
        except MemoryError:
            raise
        except Exception as error:  # a template may refuse a conversation and take another
            found.append((None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]))
            continue
        text = str(rendered[0][0])
        if len(text) > MOST_RESULT:
            raise ValueError(f"gives {len(text)} characters")
        found.append((text, None))
    return found


def _pattern(given: dict[str, Any], content: bytes) -> list[str]:
    """Match a regular expression against names."""
    _limit(given["seconds"], given["memory"])
    pattern = re.compile(given["pattern"])
    return [name for name in given["names"] if pattern.fullmatch(name)]


def main() -> None:
    """The child: one task from standard input, its answer as JSON on standard output."""
    given = json.loads(sys.stdin.buffer.readline())
    content = sys.stdin.buffer.read()
    output = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    tasks = {"tokenizer": _tokenizer, "template": _template, "pattern": _pattern}
    try:
        answer: dict[str, Any] = {"result": tasks[given["task"]](given, content)}
    except MemoryError:
        answer = {"error": f"takes more than {given['memory'] >> 20} MB"}
    except BaseException as error:  # whatever a library makes of a foreign file, its panics included
        told = " ".join(str(error).split())
        answer = {"error": f"{type(error).__name__}: {told}"[:300]}
    os.write(output, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
