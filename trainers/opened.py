"""A checkpoint's folder, opened: everything but its weights, so that what is wrong is said before they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpaudit import online, untrusted
from dpaudit.errors import DpauditError, EnvironmentFailure, UsageError, rejected
from trainers import model_files
from trainers.families import FAMILIES, Family, Scattered, processors

REFERENCE = Path(__file__).parent / "public" / "base"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MEANS = {"clip": 0.48145466, "siglip": 0.5}  # of red, by the kind of tower, as its processors bring pictures to it


@dataclass(frozen=True)
class Opened:
    """A folder that was checked. source: what the user named, None for the reference model. flag: how errors name it.

    empty: the model without memory (on the device `meta`), in float32.
    """

    source: str | None
    flag: str
    folder: Path
    files: model_files.ModelFiles
    family: type[Family]
    architecture: Any
    config: Any
    tokenizer: Any
    processor: Any
    guard: model_files.TokenizerGuard | None
    empty: Any

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks wrong but can't be known to be."""
        vision = getattr(self.config, "vision_config", None)
        kind = str(getattr(vision, "model_type", "")).partition("_")[0]
        mean = getattr(self.processor, "image_mean", None)
        red = float(mean[0]) if isinstance(mean, list | tuple) and mean else None
        other = next((name for name, value in MEANS.items() if red is not None and abs(value - red) < 1e-3), kind)
        if kind not in MEANS or other == kind:
            return ()
        return (
            f"{self.source}: its tower is of kind {kind}, its picture processor normalises as for {other}; is "
            f"{PROCESSORS[0]} that of this checkpoint?",
        )


def open_checkpoint(path: str | None = None, *, fetch: bool | None = None, flag: str = "model.path") -> Opened:
    """The reference model (path None), a folder, or a hub id. Never runs code that a checkpoint brings along.

    fetch: whether a hub id may be asked for over the network (None: where the user said so, dpaudit.online). Raises
    UsageError or EnvironmentFailure, one line that begins with `flag`; no weights are read.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()  # what matters is said here, in one line
    folder = REFERENCE if path is None else model_files.find(path, flag, model_files.may_fetch(fetch))
    # Whatever these libraries raise on a checked folder is about its files.
    with online.cut_off(), told_as(f"{flag}: got {path!r}, which can't be loaded"), untrusted.bounded_work():
        model_type = model_files.model_type(folder, f"{flag}:")
        family = family_class(model_type, path, flag)
        files = model_files.check(folder, f"{flag}:")
        config = CONFIG_MAPPING[model_type].from_dict(dict(files.config))
        architecture = _architecture(family, config)
        guard = None
        empty = model_files.check_size(files, lambda: architecture._from_config(config), f"{flag}:")
        if path is not None:
            guard = model_files.TokenizerGuard.of(folder, f"{flag}:")
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, config=config, local_files_only=True
        )
        model_files.check_vocabulary(empty, tokenizer, str(path), flag)
        plain = hasattr(config, "dpaudit_template")
        processor = _processor_of(folder, family, model_type, tokenizer, flag, needed=not plain)
        family(empty, processor, path or "reference").prompter(tokenizer)  # has it a prompt?
    return Opened(path, flag, folder, files, family, architecture, config, tokenizer, processor, guard, empty)


@contextmanager
def told_as(problem: str) -> Iterator[None]:
    """Whatever a library makes of foreign files ends as one line: UsageError, or EnvironmentFailure without memory."""
    try:
        yield
    except DpauditError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise EnvironmentFailure(f"{problem}: this machine has too little memory for it") from None
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "torchvision" in str(error).lower() or "VIDEO_PROCESSOR" in str(error):
            first = "its processor needs the package torchvision; pip install torchvision"
        raise UsageError(f"{problem}: {first:.300}") from error


def _architecture(family: type[Family], config: Any) -> Any:
    """The class of transformers that a configuration is of."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as CLASSES

    return CLASSES[type(config)] if family is Scattered else getattr(transformers, family.architecture)


def _processor_of(
    folder: Path, family: type[Family], model_type: str, tokenizer: Any, flag: str, *, needed: bool
) -> Any:
    """The checkpoint's own picture processor, or None where it ships none and none is `needed` (then: plain resize).

    Families that take processor and model as they are get the whole processor. A chat template that lies beside it is
    put on the tokenizer.
    """
    from transformers import AutoImageProcessor

    _find_template(folder, tokenizer)
    if not any((folder / name).exists() for name in PROCESSORS):
        if needed:
            accepted = (
                f"a folder with the checkpoint's picture processor ({' or '.join(PROCESSORS)}): how it was trained"
            )
            raise rejected(flag, str(folder), f"{accepted} to see can't be guessed")
        return None
    if family is Scattered:
        return processors.load(folder, model_type)
    try:
        return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        why = (" ".join(str(error).split()) or type(error).__name__)[:100]
        raise UsageError(
            f"{flag}: {folder}: its picture processor can't be made ({why}); take {PROCESSORS[0]} from the same "
            "checkpoint as the weights"
        ) from error


def _find_template(folder: Path, tokenizer: Any) -> None:
    """Older checkpoints keep the chat template in a file of the processor, which no tokenizer reads."""
    if getattr(tokenizer, "chat_template", None) is not None:
        return
    for name in ("chat_template.jinja", "chat_template.json"):
        if not (folder / name).exists():
            continue
        text = untrusted.read_text(untrusted.part_of(folder, name), untrusted.MOST_CONFIGURATION)
        tree = {"chat_template": text} if name.endswith(".jinja") else untrusted.parse_json(text)
        found = tree.get("chat_template") if isinstance(tree, dict) else None
        if not isinstance(found, str):
            raise UsageError(f"model: {folder / name}: holds no chat template; take the checkpoint's own")
        tokenizer.chat_template = found
        return


def family_class(model_type: str, source: str | None, flag: str = "model.path") -> type[Family]:
    """The family of a model type; raises UsageError for one that does not answer questions about pictures."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in KNOWN:
        return Scattered
    if model_type == "None":
        raise UsageError(f"{flag}: {source}: its config.json names no model_type; take the checkpoint's own")
    what = "a type that answers no questions about pictures"
    if model_type in TEXT:
        what = "a text-only model"
    elif model_type not in CONFIG_MAPPING:
        what = "which transformers does not know (a newer transformers may know it)"
    accepted = f"a checkpoint of model type {', '.join(sorted(FAMILIES))}, or others of docs/models.md"
    raise UsageError(f"{flag}: {source} is of type {model_type:.60}, {what}; accepted: {accepted}")
