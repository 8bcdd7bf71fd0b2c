"""Settings of the whole suite."""

import signal

from hypothesis import settings

# The same examples at every run: a red suite must mean a changed program. To look for new ones, run with
# `--hypothesis-profile=default`.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# A shell starts a command in the background with Ctrl-C ignored, and what is ignored stays so in every process that the
# tests start; they must end at Ctrl-C all the same.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
