"""A foreign checkpoint, tried once when it is loaded: a public picture of noise and a question, forwards.

Settings that pass every check may still make a model that fails, or says nothing but NaN: heads that do not divide,
rotary factors of the wrong length, an epsilon that is no number. So what training and audits do is done here first, on
nothing private, and whatever goes wrong is one line about the checkpoint and not a defect of dpaudit.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit import untrusted
from dpaudit.errors import UsageError
from trainers.families import Scattered, scattered
from trainers.generation import end_ids
from trainers.inputs import UnitInputs
from trainers.opened import told_as
from trainers.records import Picture, Question, Unit

if TYPE_CHECKING:
    from trainers.vlm import VisionLanguageModel

ASKED = Question("What is this?", "noise")
# Of the picture of noise. The most tiles that a known checkpoint makes of one are 37 of 384 x 384 pixels.
MOST_NUMBERS = 3 << 23
MOST_TOKENS = 1 << 13


def check(model: "VisionLanguageModel", flag: str) -> None:
    """UsageError, one line that begins with `flag`, unless the model answers for a picture and a question.

    One forward pass over a picture and its answer, as in training; then a few tokens of text with a cache, as in
    generation, at the end of the context: some rotary embeddings have other factors there. On the CPU it may take
    untrusted.MOST_DECODED bytes beside the weights.
    """
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    limited = untrusted.bounded_memory() if model.device.type == "cpu" else nullcontext()
    failing = told_as(f"{flag}: got {model.source!r}, which fails on a picture of noise and a question")
    with failing, limited, torch.no_grad():
        _check_tower(model, noise, flag)
        if isinstance(model.family, Scattered):
            scattered.check(model)
        end_ids(model)
        rows = UnitInputs(model, [Unit("probe", (Picture("probe", noise, (ASKED,)),))]).select([0])
        for found in (model.losses(rows.tokens, rows.packed), *_two_steps(model)):
            if not bool(torch.isfinite(found).all()):
                raise UsageError(
                    f"{flag}: got {model.source!r}, which gives no finite numbers for a picture of noise and a question"
                )


def _check_tower(model: "VisionLanguageModel", noise: npt.NDArray[np.uint8], flag: str) -> None:
    """Picture processor and tower fit each other, and a small picture stays one that a model can read."""
    try:
        made = model.family.prepare([noise])[0].values
        numbers = sum(part.numel() for part in (made.values() if isinstance(made, dict) else [made]))
        count = 0 if numbers > MOST_NUMBERS else len(model.encoded([noise])[0].head.slot)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, MemoryError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if model.family.processor is None:
            raise UsageError(f"{flag}: got {model.source!r}, whose tower fails on a picture ({why})") from error
        raise UsageError(
            f"{flag}: {model.source}: its picture processor does not fit its tower ({why}); take "
            "preprocessor_config.json from the same checkpoint as the weights"
        ) from error
    if numbers > MOST_NUMBERS or count > MOST_TOKENS:
        what = f"{count} tokens" if numbers <= MOST_NUMBERS else f"{numbers} numbers"
        raise UsageError(
            f"{flag}: {model.source}: its preprocessing makes {what} of a picture of 80x64 pixels; accepted: at most "
            f"{MOST_NUMBERS} numbers and {MOST_TOKENS} tokens"
        )


def _two_steps(model: "VisionLanguageModel") -> tuple[Tensor, Tensor]:
    """Logits behind a question without a picture and behind one token more, at the last places of the context."""
    from transformers import DynamicCache

    family, ids = model.family, model.prompter.question_ids(ASKED)
    cache = DynamicCache(config=model.core.config.get_text_config())
    visible = torch.ones((1, len(ids)), dtype=torch.bool, device=model.device)
    places = torch.arange(len(ids) + 1, device=model.device) + max(0, model.max_positions - len(ids) - 1)
    positions = places.expand(family.axes, 1, -1)
    embeds = model.embed(torch.tensor([ids], dtype=torch.int64, device=model.device)).to(model.dtype)
    mask = family.prompt_mask(visible, torch.zeros_like(visible))
    first = family.output(family.decode(embeds, mask, positions[:, :, :-1], cache)[:, -1])
    more = model.embed(first.argmax(dim=-1))[:, None].to(embeds.dtype)
    mask = torch.ones((1, 1, 1, len(ids) + 1), dtype=torch.bool, device=model.device)
    second = family.output(family.decode(more, mask, positions[:, :, -1:], cache)[:, -1])
    return first, second
