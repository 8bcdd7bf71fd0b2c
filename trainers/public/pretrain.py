"""Make the reference model's base checkpoint from public synthetic pictures only.

    python -m trainers.public.pretrain --out DIR --seed 0

Two stages. The tower first learns public labels (which digit, its 8x8 shape, where it lies) from its CLS token,
because a small LLaVA trained on questions alone stays on a plateau where it ignores the picture. Then projector and
language model learn the lessons (trainers.public.lessons) about printed digits, at first from the CLS token alone,
then behind changing reducers, so that the base copes with pruned and fused tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trainers.prompts import IGNORE
from trainers.public.glyphs import Style, glyphs
from trainers.public.lessons import lesson
from trainers.public.model import TOWER_WIDTH, reference_model
from trainers.public.scene import GLYPH, LARGEST, NUMBERS, SIZE, SMALLEST, draw, pictures, placement
from trainers.records import Picture
from trainers.reducers import Reduced, Reducer, VisualTokens, cls_topk, keep_all, random_positions, visionzip
from trainers.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Plan:
    """Sizes of the two stages. The defaults made the shipped checkpoint; tests use tiny ones."""

    strokes: int = 60_000
    fonts: int = 20_000
    tower_steps: int = 1_800
    tower_batch: int = 128
    tower_rate: float = 2e-3
    lessons: int = 10_000
    cls_steps: int = 500
    mixed_steps: int = 1_400
    lesson_batch: int = 64
    lesson_rate: float = 2e-3


@dataclass(frozen=True)
class Bank:
    """Glyphs (n, 8, 8) with values 0..16 and their digits (n,)."""

    glyphs: npt.NDArray[np.uint8]
    digits: npt.NDArray[np.int64]

    @staticmethod
    def drawn(style: Style, count: int, rng: np.random.Generator) -> "Bank":
        digits = rng.integers(0, 10, count)
        return Bank(glyphs(style, digits.tolist(), rng), digits)

    def pictures(self, count: int, rng: np.random.Generator) -> tuple[Picture, ...]:
        """Pictures of the first `count` glyphs."""
        names = [f"public-{index:06d}" for index in range(count)]
        return pictures(names, self.glyphs[:count], self.digits[:count].tolist(), rng)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + float(np.cos(np.pi * step / steps))))


def _descend(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[int], Tensor], *, steps: int, rate: float, decay: float
) -> None:
    """AdamW on `loss_of(step)` with gradients clipped to norm 1."""
    trained = list(parameters)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=decay, betas=(0.9, 0.98))
    recent = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _rate(step, steps, min(200, max(1, steps // 5)))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent += float(loss.detach())
        if (step + 1) % 200 == 0:
            _say(f"  step {step + 1}/{steps}  loss {recent / 200:.3f}")
            recent = 0.0
    for parameter in trained:
        parameter.requires_grad_(False)


class Heads(nn.Module):
    """What the tower's CLS token must tell: the digit, its 8x8 shape, its centre and size. Thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(TOWER_WIDTH)
        self.digit = nn.Linear(TOWER_WIDTH, 10)
        self.shape = nn.Linear(TOWER_WIDTH, GLYPH * GLYPH)
        self.place = nn.Linear(TOWER_WIDTH, 3)

    def loss(self, cls: Tensor, digits: Tensor, shapes: Tensor, places: Tensor) -> Tensor:
        """cls (B, D), digits (B,), shapes (B, 64) in 0..1, places (B, 3) of about unit size."""
        hidden = self.norm(cls)
        squared = nn.functional.mse_loss
        return (
            nn.functional.cross_entropy(self.digit(hidden), digits)
            + 10 * squared(self.shape(hidden), shapes)
            + squared(self.place(hidden), places)
        )


def train_tower(model: VisionLanguageModel, plan: Plan, rng: np.random.Generator) -> None:
    """Stage 1. Only the layers up to the one that LLaVA reads are trained; the last one stays as initialised."""
    strokes, fonts = Bank.drawn("strokes", plan.strokes, rng), Bank.drawn("fonts", plan.fonts, rng)
    bank = Bank(np.concatenate([strokes.glyphs, fonts.glyphs]), np.concatenate([strokes.digits, fonts.digits]))
    tower = model.core.model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    layers, depth = inner.encoder.layers, len(inner.encoder.layers) + 1 + model.layers.features
    inner.encoder.layers = layers[:depth]
    heads = Heads()

    def loss_of(_: int) -> Tensor:
        chosen = rng.integers(0, len(bank.digits), plan.tower_batch)
        spots = [placement(rng) for _ in chosen]
        drawn = draw(bank.glyphs[chosen], spots, rng).astype(np.float32) / 127.5 - 1
        pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
        centre = [[p.left + p.size / 2 - SIZE / 2, p.top + p.size / 2 - SIZE / 2, p.size] for p in spots]
        places = torch.tensor(centre) - torch.tensor([0, 0, (SMALLEST + LARGEST) / 2])
        hidden = tower(pixels, output_hidden_states=True).hidden_states[depth]
        shapes = torch.from_numpy(bank.glyphs[chosen].reshape(len(chosen), -1).astype(np.float32) / 16)
        return heads.loss(hidden[:, 0], torch.from_numpy(bank.digits[chosen]), shapes, places / 6)

    trained = [*inner.embeddings.parameters(), *inner.pre_layrnorm.parameters(), *inner.encoder.parameters()]
    trained += list(heads.parameters())
    _descend(trained, loss_of, steps=plan.tower_steps, rate=plan.tower_rate, decay=0.05)
    inner.encoder.layers = layers


def encode(model: VisionLanguageModel, shown: tuple[Picture, ...]) -> VisualTokens:
    """Visual tokens of pictures, from the frozen tower."""
    return model.visual_tokens([picture.pixels for picture in shown])


def _cls_only(visual: VisualTokens) -> Reduced:
    if visual.cls is None:
        raise ValueError("the reference tower has a CLS token")
    return Reduced(visual.cls, torch.zeros(visual.rows, 0, dtype=torch.int64))


def _some_reducer(rng: np.random.Generator) -> Reducer:
    draw_ = rng.uniform()
    if draw_ < 0.4:
        return keep_all(drop_cls=False)
    if draw_ < 0.7:
        return visionzip(16, 8)
    if draw_ < 0.85:
        return cls_topk(16)
    return random_positions(16, int(rng.integers(2**30)))


def train_language(model: VisionLanguageModel, plan: Plan, rng: np.random.Generator) -> None:
    """Stage 2: projector and language model on lessons about printed digits; the tower is frozen."""
    shown = Bank.drawn("fonts", plan.lessons, rng).pictures(plan.lessons, rng)
    lessons = tuple(lesson(picture, rng) for picture in shown)
    visual, packed = encode(model, lessons), model.prompter.pack(lessons)

    def loss_of(step: int) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(lessons), plan.lesson_batch))
        reduce = _cls_only if step < plan.cls_steps else _some_reducer(rng)
        return model.losses(reduce(visual[rows]).tokens, packed[rows]).mean()

    trained = [*model.core.model.multi_modal_projector.parameters(), *model.core.model.language_model.parameters()]
    steps = plan.cls_steps + plan.mixed_steps
    _descend(trained, loss_of, steps=steps, rate=plan.lesson_rate, decay=0.01)


@torch.no_grad()
def refresh_spare_tokens(model: VisionLanguageModel, seed: int) -> None:
    """Give every reserved token a random direction of an ordinary token's length.

    Training pushes the embeddings of tokens that never occur into one common direction (measured: mean of norm 2.7,
    spread 0.14), where no fine-tuning could tell them apart; new-token canaries need them apart.
    """
    vocabulary = model.tokenizer.get_vocab()
    spare = [vocabulary[token] for token in model.spare_tokens(len(vocabulary))]
    weight = model.core.get_input_embeddings().weight
    answers = [model.prompter.encode("?", word)[1][0] for word in ("yes", "no", *NUMBERS)]
    # Lengths in the stored precision, so that a reloaded checkpoint gives the same tokens.
    drawn = np.random.default_rng([seed, 3]).normal(size=(len(spare), weight.shape[1]))
    drawn *= float(weight[answers].half().float().norm(dim=1).mean()) / np.linalg.norm(drawn, axis=1, keepdims=True)
    weight[spare] = torch.as_tensor(drawn, dtype=weight.dtype)


@torch.no_grad()
def exact_match(
    model: VisionLanguageModel, shown: tuple[Picture, ...], visual: VisualTokens | None = None
) -> dict[str, float]:
    """Share of answers whose every token is the most likely one given the true ones before it, overall and per kind.

    That is exact match of greedy generation: the first wrong token makes both wrong.
    """
    visual = encode(model, shown) if visual is None else visual
    packed = model.prompter.pack(shown)
    right: dict[str, list[bool]] = {}
    for start in range(0, len(shown), 128):
        rows = slice(start, start + 128)
        part = packed[rows]
        best = torch.full_like(part.targets, IGNORE)
        best[part.targets != IGNORE] = model.logits(model.reduce(visual[rows]).tokens, part).argmax(dim=-1)
        wrong = (best != part.targets).float()
        for row, picture in enumerate(shown[rows]):
            for index, question in enumerate(picture.questions):
                mine = part.segment[row] == index
                right.setdefault(question.kind, []).append(not bool(wrong[row][mine].any()))
    scores = {kind: float(np.mean(values)) for kind, values in right.items()}
    return {"all": float(np.mean([value for values in right.values() for value in values])), **scores}


def pretrain(seed: int, plan: Plan) -> VisionLanguageModel:
    """Both stages from one seed."""
    model = reference_model(seed)
    model.hf.eval()
    tower_rng, language_rng = (np.random.default_rng(item) for item in np.random.SeedSequence(seed).spawn(2))
    _say("tower: public labels")
    train_tower(model, plan, tower_rng)
    _say("projector and language model: lessons about printed digits")
    train_language(model, plan, language_rng)
    refresh_spare_tokens(model, seed)
    return model


def save(model: VisionLanguageModel, folder: Path) -> None:
    """fp16 safetensors in the Hugging Face layout, with the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.hf.to(torch.float16).save_pretrained(str(folder))
    model.tokenizer.save_pretrained(str(folder))


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    model = pretrain(arguments.seed, Plan())
    save(model, arguments.out)
    _say(f"took {time.monotonic() - start:.0f} s, {time.process_time():.0f} s of CPU")
    reloaded = VisionLanguageModel.load(str(arguments.out), device="cpu")
    rng = np.random.default_rng(arguments.seed + 1)
    report = {}
    styles: tuple[Style, ...] = ("fonts", "strokes", "shifted-strokes")
    for style in styles:
        shown = Bank.drawn(style, 500, rng).pictures(500, rng)
        report[style] = exact_match(reloaded, shown)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
