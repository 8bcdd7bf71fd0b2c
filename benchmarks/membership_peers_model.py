"""The problem of membership_peers.py: handwriting with one question, and the reference model as a classifier of it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pictures
from torch import Tensor, nn

from dpaudit.config import LoraConfig, RunConfig, resolve
from trainers.data.digits import load_digits_vqa
from trainers.inputs import UnitInputs
from trainers.prompts import IGNORE, Packed
from trainers.records import Unit
from trainers.vlm import VisionLanguageModel

BATCH, RATE = 32, 5e-3
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def write_data(folder: Path) -> None:
    """The embedded handwriting with its first question alone, as files."""
    digits = load_digits_vqa()
    folder.mkdir(parents=True, exist_ok=True)
    for name, units in (("train", digits.train), ("test", digits.test)):
        rows = []
        for unit in units:
            (picture,), file = unit.pictures, f"{unit.id}.png"
            Pictures.fromarray(np.asarray(picture.pixels)).save(folder / file)
            rows.append({"image": file, "question": picture.questions[0].text, "answer": picture.questions[0].answer})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_of(data: Path, epochs: int) -> RunConfig:
    """Our training of half of the units, with as many steps as the others take in so many epochs."""
    half = len((data / "train.jsonl").read_text(encoding="utf-8").splitlines()) // 2
    steps = epochs * -(-half // BATCH)
    words = ["method=non-private", "seed=1", "model.device=cpu", f"data.path={data}", "data.train=train.jsonl",
             "data.test=test.jsonl", f"training.steps={steps}", f"training.batch-size={BATCH}",
             f"training.learning-rate={RATE}"]  # fmt: skip
    return resolve({}, words)


class AnswerModel(nn.Module):
    """The reference model with LoRA as a classifier: pictures (B, 32, 32, 3) uint8, or their visual tokens, to logits
    (B, vocabulary) of the first token of the answer to "Which digit is this?"."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.vlm = VisionLanguageModel.load(None, device="cpu")
        seed = int(torch.randint(2**31, ()).item())
        self.vlm.attach_lora(LoraConfig(), generator=np.random.default_rng(seed))
        self.hf = self.vlm.hf
        unit = load_digits_vqa().train[0]
        asked = replace(unit, pictures=(replace(unit.pictures[0], questions=unit.pictures[0].questions[:1]),))
        self.packed = answer_alone(UnitInputs(self.vlm, [asked]).select([0]).packed)

    def forward(self, x: Tensor) -> Tensor:
        visual = x if self.tokens else self.encode(x)
        packed = self.packed
        values = (packed.input_ids, packed.segment, packed.offset, packed.targets, packed.weights)
        rows = Packed(*(value.expand(len(x), -1) for value in values))
        return self.vlm.logits(visual, rows)

    def encode(self, pictures: Tensor) -> Tensor:
        """Visual tokens (B, M, D)."""
        return self.vlm.reduce(self.vlm.visual_tokens([picture.numpy() for picture in pictures])).tokens


def answer_alone(packed: Packed) -> Packed:
    """One row that predicts the answer's first token and not the end token behind it."""
    first = (packed.targets != IGNORE).to(torch.int8).argmax(dim=1)
    targets = torch.full_like(packed.targets, IGNORE)
    targets[0, first] = packed.targets[0, first]
    return replace(packed, targets=targets, head=None)


class Classified:
    """A data set as the others want it: `data` (N, …) and `targets` (N,), the answers' first tokens."""

    def __init__(self, units: Sequence[Unit], tokens: bool) -> None:
        model = AnswerModel()
        self.data = torch.from_numpy(np.stack([np.asarray(unit.pictures[0].pixels) for unit in units]))
        if tokens:
            with torch.no_grad():
                self.data = torch.cat([model.encode(part) for part in self.data.split(64)])
        self.targets = torch.from_numpy(labels_of(model.vlm, units))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index], self.targets[index]


def labels_of(model: VisionLanguageModel, units: Sequence[Unit]) -> npt.NDArray[np.int64]:
    """(N,) first tokens of the answers."""
    inputs = UnitInputs(model, units)
    targets = inputs.select(range(len(units))).packed.targets
    first = (targets != IGNORE).to(torch.int8).argmax(dim=1)
    return targets[torch.arange(len(units)), first].numpy()


def rate_at(scores: Floats, member: Bools, most: float = 0.01) -> float:
    """The largest true positive rate of a threshold whose false positive rate is at most `most`."""
    outside = np.sort(scores[~member])[::-1]
    allowed = int(most * len(outside))
    return float((scores[member] > outside[allowed]).mean())
