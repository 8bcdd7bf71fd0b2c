"""Whether this process may ask the network for models and data: only where its user said so.

A configuration that somebody else wrote may name any repository of the hub. So nothing is fetched because a run folder,
a model or an adapter says so: `dpaudit train` and `sweep` fetch what their user's own configuration names, the
commands that read a run (audit, benchmark, train --resume) only with --online, and `audit --base ID` what was typed.
What lies in the local cache already needs no network.
"""

import contextlib
import os
from collections.abc import Iterator

VARIABLE = "DPAUDIT_ONLINE"  # in the environment, so that worker processes know it as well


def allow() -> None:
    """From now on this process and those that it starts may fetch what a configuration names."""
    os.environ[VARIABLE] = "1"


def allowed() -> bool:
    """Whether `allow` was called, here or in a parent process."""
    return os.environ.get(VARIABLE) == "1"


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """While it lasts, huggingface_hub refuses every request, whatever a library or a file asks for."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
