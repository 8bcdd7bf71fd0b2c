"""Settings of the whole suite."""

import os
import signal

import pytest
from hypothesis import settings

from dpaudit import online

# The same examples at every run: a red suite must mean a changed program. To look for new ones, run with
# `--hypothesis-profile=default`.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# A shell starts a command in the background with Ctrl-C ignored, and what is ignored stays so in every process that the
# tests start; they must end at Ctrl-C all the same.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that an earlier test ran in this process may have allowed downloads: `dpaudit train` does."""
    monkeypatch.delenv(online.VARIABLE, raising=False)
    os.environ.pop(online.VARIABLE, None)
