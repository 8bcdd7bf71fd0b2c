"""What the frozen tower said of each picture, kept in the run's private part, so that it is said once.

A file holds the encoded pictures of one chunk: tokens after the reducer, without fusion noise, and the heads they stand
in. Files are written whole or not at all (mode 0600), carry the settings they were made with and a checksum of every
byte, and are checked when opened; one that is torn, changed or of other settings is left aside with a warning and its
pictures are encoded again. Tensors are memory-mapped, so a cached run needs no more memory than its current batches;
the price of that is the operating system's: who cuts a file that a running process has mapped kills the process.

A picture is found by the SHA-256 of its pixels together with that of all else that went in: tower weights, layers,
preprocessing, reducer, precision, prompt, device and versions. Files lie in the run's private part, or in the folder
that the owner names for all runs of a project (trainers.feature_folder), and nowhere else: these are noiseless
functions of private pictures (see the release rows of the ledger's truth table).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from dpaudit import atomic, untrusted
from dpaudit.runs import RunFolder
from trainers import feature_folder
from trainers.generation import Encoded
from trainers.prompts import HeadRow
from trainers.records import Image, pixels_sha256

if TYPE_CHECKING:
    from trainers.vlm import VisionLanguageModel

FORMAT = "dpaudit-features-1"
# Reading and checking is cheaper than encoding for every tower that was measured (benchmarks/feature_cache.py, one CPU
# thread: 0.05 against 1.6 ms a picture for the reference tower with 0.2 M parameters, 7 against 230 ms for CLIP-B/32).
# Below this size all of it is a second or two of a run of minutes: files made of private pictures aren't worth that.
LARGE_TOWER = 10_000_000


def tower_parameters(model: "VisionLanguageModel") -> int:
    """How many parameters the vision tower has."""
    return sum(parameter.numel() for parameter in model.family.tower.parameters())


def settings_sha256(model: "VisionLanguageModel") -> str:
    """Hex SHA-256 of everything but the picture that its encoding depends on."""
    weights = hashlib.sha256()
    for name, value in sorted(model.family.tower.state_dict().items()):
        weights.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        weights.update(_bytes(value))
    processor = model.family.processor
    said = {
        "format": FORMAT,
        "family": model.family.model_type,
        "tower": weights.hexdigest(),
        "layers": list(model.layers),
        "drop_cls": model.drop_cls,
        "reducer": model.reducer_config.model_dump(mode="json", exclude={"noise"}),
        "preprocessing": "resize" if processor is None else processor.to_json_string(),
        "prompt": [model.prompter.template, model.prompter.prefix],
        "precision": str(model.dtype),
        "device": model.device.type,
        "versions": {name: version(name) for name in ("dpaudit", "torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def cache_of(
    run: RunFolder | None, wanted: str, model: "VisionLanguageModel", warn: Callable[[str], None]
) -> "Features | None":
    """The feature cache of a run, or None where the configuration (auto: the size of the tower) wants none.

    The project's folder where there is one, otherwise the run's own. run: None for a rank that may not touch it. A twin
    that an audit trains never reads what its run has encoded: the owner could have changed it. UsageError for a
    project's folder that others can open.
    """
    if wanted == "never" or (wanted == "auto" and tower_parameters(model) < LARGE_TOWER):
        return None
    project = feature_folder.named()
    if project is not None:
        return Features(project / settings_sha256(model)[:32], warn)
    return None if run is None else Features(run.private / "features", warn)


class Features:
    """Encoded pictures in the folder `place`, made on demand."""

    def __init__(self, place: Path, warn: Callable[[str], None] = lambda _text: None) -> None:
        self.place, self.warn = place, warn
        self._settings: str | None = None
        self._known: dict[str, Encoded] = {}
        self.encoded_now = 0  # pictures that were not found

    def encoded(self, model: "VisionLanguageModel", pixels: Sequence[Image]) -> list[Encoded]:
        """Pictures in their order, encoded now where no file has them; no other is decoded."""
        if self._settings is None:
            self._settings = settings_sha256(model)
            for path in sorted(self.place.glob("*.safetensors")) if self.place.is_dir() else ():
                self._known |= self._open(path)
        keys = [pixels_sha256(item) for item in pixels]
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        if missing:
            found = model.encoded([pixels[index] for index in missing])
            self.encoded_now += len(missing)
            path = self._save([keys[index] for index in missing], found)
            self._known |= self._open(path)
        return [self._known[key] for key in keys]

    def _save(self, keys: Sequence[str], found: Sequence[Encoded]) -> Path:
        heads = [item.head for item in found]
        tensors = {
            "tokens": torch.cat([item.tokens for item in found]).cpu(),
            "counts": torch.tensor([len(item.tokens) for item in found]),
            "fused": torch.tensor([item.fused for item in found]),
            "widths": torch.tensor([len(head.slot) for head in heads]),
            "starts": torch.tensor([head.start for head in heads]),
            "ids": torch.cat([torch.from_numpy(head.ids) for head in heads]),
            "slots": torch.cat([torch.from_numpy(head.slot) for head in heads]),
            "positions": torch.cat([torch.from_numpy(head.positions) for head in heads], dim=1),
        }
        pictures = ",".join(keys)
        named = {"format": FORMAT, "settings": str(self._settings), "pictures": pictures}
        atomic.make_folder(self.place, mode=0o700)
        path = self.place / f"{hashlib.sha256(f'{self._settings},{pictures}'.encode()).hexdigest()[:32]}.safetensors"
        atomic.write_tensors(path, tensors, named | {"checksum": _checksum(tensors)}, mode=0o600)
        return path

    def _open(self, path: Path) -> dict[str, Encoded]:
        """The pictures of a file; none, and a warning, when it is not whole or not made with these settings."""
        try:
            with untrusted.open_tensors(path) as file:
                named = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if named.get("format") != FORMAT or named.get("checksum") != _checksum(tensors):
                self.warn(f"{path.name}: not a whole feature file; its pictures are encoded again")
                return {}
            if named.get("settings") != self._settings:
                self.warn(f"{path.name}: features of other settings; its pictures are encoded again")
                return {}
            return _split(named["pictures"].split(","), tensors)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            self.warn(f"{path.name}: can't be read ({' '.join(str(error).split())[:80]}); encoding its pictures again")
            return {}


def _split(keys: Sequence[str], tensors: dict[str, Tensor]) -> dict[str, Encoded]:
    """One entry a picture, all of them views into the file."""
    counts, widths = tensors["counts"].tolist(), tensors["widths"].tolist()
    tokens = torch.split(tensors["tokens"], counts)
    ids, slots = (torch.split(tensors[name], widths) for name in ("ids", "slots"))
    positions = torch.split(tensors["positions"], widths, dim=1)
    out = {}
    for index, key in enumerate(keys):
        arrays = ids[index].numpy(), slots[index].numpy(), positions[index].numpy()
        head = HeadRow(*arrays, int(tensors["starts"][index]))
        out[key] = Encoded(tokens[index], int(tensors["fused"][index]), head)
    return out


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    """The raw bytes of a tensor; no copy where it lies whole on the CPU."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
