"""Other people's training as a factory of trainers under test; users import it as `dpaudit.under_test`."""

from trainers.adapters.under_test.function import step_function
from trainers.adapters.under_test.hf import hf_trainer
from trainers.adapters.under_test.opacus import opacus_loop

__all__ = ["hf_trainer", "opacus_loop", "step_function"]
