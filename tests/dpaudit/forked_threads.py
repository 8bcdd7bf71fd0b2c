"""A module that leaves a thread behind when it is imported."""

from tests.dpaudit.forked import leave_a_thread

leave_a_thread()
