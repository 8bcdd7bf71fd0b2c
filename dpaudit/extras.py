"""Which extra of dpaudit brings a package: the one line for a command that needs more than is installed."""

import contextlib
import importlib.util
from collections.abc import Iterator

from dpaudit.errors import EnvironmentFailure

# Import name -> extra of dpaudit (pyproject.toml).
EXTRAS = {
    "PLD_accounting": "allocation",
    "accelerate": "train",
    "bitsandbytes": "nf4",
    "cryptography": "train",
    "datasets": "benchmark",
    "evaluate": "benchmark",
    "jinja2": "train",
    "lmms_eval": "lmms",
    "loguru": "benchmark",
    "markupsafe": "train",
    "matplotlib": "plot",
    "opacus": "train",
    "peft": "train",
    "PIL": "train",
    "pyarrow": "parquet",
    "pytablewriter": "benchmark",
    "pytz": "benchmark",
    "ray": "ray",
    "sacrebleu": "benchmark",
    "safetensors": "train",
    "sklearn": "train",
    "tenacity": "benchmark",
    "tokenizers": "train",
    "torch": "train",
    "transformers": "train",
    "yaml": "train",
}
# lmms-eval goes in after its needs and without its own list of them, which breaks torch on CPU machines.
LMMS_EVAL = "pip install 'dpaudit[benchmark]' && pip install --no-deps 'lmms-eval==0.7.3'"
# Extras of one package -> what needs no more than that; anything else that finds the package missing needs `train`.
ALONE = {"parquet": "scores", "plot": "plot"}


def missing(error: ModuleNotFoundError, what: str) -> EnvironmentFailure | None:
    """The line for `what` (a command, a module) that found a package missing; None where no extra brings it."""
    name = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(name)
    if extra is None:
        return None
    if ALONE.get(extra, what) != what:
        extra = "train"
    return EnvironmentFailure(f"{what}: needs {name}, which is not installed: pip install 'dpaudit[{extra}]'")


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """A package that is missing inside, named with its extra: EnvironmentFailure instead of ModuleNotFoundError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise (missing(error, what) or error) from None


def require_lmms_eval(what: str) -> None:
    """Before anything is computed: lmms-eval and all that it really needs. EnvironmentFailure with the one command."""
    needed = ("lmms_eval", *(name for name, extra in EXTRAS.items() if extra == "benchmark"))
    lacking = [name for name in needed if not _there(name)]
    if lacking:
        raise EnvironmentFailure(f"{what}: needs {', '.join(lacking)}, not installed: {LMMS_EVAL}")


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a finder that knows better than to look
        return False
