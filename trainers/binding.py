"""What a noise key may be used for: one configuration, one base model and one data set in one order.

Noise of step t is a function of (key, t, name). The same noise on the gradient of other data cancels in the difference
of the two releases and leaves the private gradients, whatever sigma was. So a key is written together with hashes of
what it was drawn for and is taken up for nothing else, whether a run is resumed, copied or started over. The hashes are
keyed with the noise key itself: without it they say nothing about the data, not even to somebody who can guess it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpaudit.errors import UsageError
from dpaudit.randomness import Key, bound_of
from trainers.records import Picture, Unit, pixels_sha256
from trainers.vlm import VisionLanguageModel

PARTS = {
    "configuration": "another configuration",
    "model": "another base model",
    "data": "other data, or another order",
}


def binding(key: Key, config_sha256: str, units: Sequence[Unit], model: VisionLanguageModel) -> dict[str, str]:
    """Keyed hashes of configuration, base model and units; units: all that may enter a batch, in their order."""
    return {
        "configuration": _of(key, "configuration", config_sha256),
        "model": _model(key, model),
        "data": _of(key, "data", tuple(units)),
    }


def check(path: Path, ours: Mapping[str, str]) -> bytes:
    """UsageError unless the key in `path` was drawn for what `ours` hashes; returns b"", for `Group.from_first`."""
    theirs = bound_of(path)
    if theirs is None:
        raise UsageError(f"{path}: names no data that it was drawn for, so it can't be used again; start a new run")
    for part, what in PARTS.items():
        if theirs.get(part) != ours[part]:
            raise UsageError(
                f"{path}: its noise was drawn for {what}; on this the two releases would differ by private gradients "
                "without noise; restore what was trained on, or start a new run in another folder"
            )
    return b""


def identity(ours: Mapping[str, str]) -> str:
    """One short name for all of it, by which a checkpoint knows its run."""
    return hashlib.sha256(json.dumps(dict(ours), sort_keys=True).encode()).hexdigest()


def _of(key: Key, purpose: str, value: object) -> str:
    digest = key.keyed_hash(purpose)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: "hashlib.blake2b", value: object) -> None:
    """Add a value so that no two values feed alike: a tag, the length, the content. Dataclasses field by field."""
    if isinstance(value, np.ndarray):
        _feed(digest, f"{value.dtype.str}{value.shape}")
        _add(digest, b"a", np.ascontiguousarray(value).data.cast("B") if value.size else b"")
    elif isinstance(value, str):
        _add(digest, b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, Picture):
        hashes = tuple(map(pixels_sha256, value.images))  # the same wherever the picture lies, and known where that is
        _feed(digest, ("picture", value.id, hashes, value.questions))
    elif is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
        _feed(digest, tuple(part for pair in parts for part in pair))
    elif isinstance(value, tuple):
        _add(digest, b"t", len(value).to_bytes(8, "big"))
        for item in value:
            _feed(digest, item)
    else:
        raise TypeError(f"{type(value).__name__}: has no hash here")


def _add(digest: "hashlib.blake2b", tag: bytes, content: "bytes | memoryview") -> None:
    digest.update(tag + len(content).to_bytes(8, "big"))
    digest.update(content)


def _model(key: Key, model: VisionLanguageModel) -> str:
    """Weights, tokenizer, picture preprocessing and prompt: all that turns a unit into a gradient. Device-free."""
    digest = key.keyed_hash("model")
    for name, value in sorted(model.core.state_dict().items()):
        _feed(digest, (name, f"{value.dtype}{tuple(value.shape)}"))
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _add(digest, b"w", plain.numpy().data)
    for said in _around(model):
        _feed(digest, json.dumps(said, sort_keys=True, default=str))
    return digest.hexdigest()


def _lasting(tree: Any) -> Any:
    """A model's configuration without what depends on where it lies and on who reads it."""
    if isinstance(tree, dict):
        left_out = ("transformers_version", "dtype", "torch_dtype")
        return {k: _lasting(v) for k, v in tree.items() if not str(k).startswith("_") and k not in left_out}
    return [_lasting(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _around(model: VisionLanguageModel) -> list[Any]:
    processor, tokenizer = model.family.processor, model.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return [
        _lasting(model.core.config.to_dict()),
        "resize" if processor is None else json.loads(processor.to_json_string()),
        [model.prompter.template, model.prompter.prefix],
        tokenizer.get_vocab() if fast is None else json.loads(fast.to_str()),
    ]
