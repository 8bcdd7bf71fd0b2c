"""Other people's training, unchanged, as the factory that `dpaudit check` and `dpaudit audit-trainer` take.

    from dpaudit.under_test import hf_trainer, opacus_loop, step_function

`opacus_loop` takes what `make_private` returned and a train function, `hf_trainer` a Hugging Face Trainer with DP code
of its own, `step_function` a step written by hand in torch, numpy or jax. The code is in trainers.adapters.under_test
and is imported on first use, so that this module costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dpaudit import extras, packages

if TYPE_CHECKING:
    from trainers.adapters.under_test import hf_trainer, opacus_loop, step_function

packages.give_way()

__all__ = ["hf_trainer", "opacus_loop", "step_function"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras.named(__name__), packages.ours():
        module = importlib.import_module("trainers.adapters.under_test")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
