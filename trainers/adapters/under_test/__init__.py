"""Other people's training as a factory of trainers under test; users import it as `dpaudit.under_test`."""

from trainers.adapters.under_test.opacus import opacus_loop

__all__ = ["opacus_loop"]
