"""How much of a picture its released tokens give back, by decoders trained on other public pictures.

Ridge regression and a small perceptron from all tokens of a picture to its grey values at 32 x 32. Decoders are fitted
on public synthetic pictures whose tokens carry the same noise, and judged on the embedded data set's test pictures,
which are public too: no private picture is reconstructed, and none can appear in the strip. What they reach is a lower
limit; a stronger decoder gets more.

PSNR = -10 log10(mean squared error) at peak 1; SSIM as Wang et al. 2004 with 8 x 8 uniform windows, C1 = 0.01^2,
C2 = 0.03^2. Intervals: 95 % of the mean over pictures (normal approximation).
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dpaudit.documents import Reconstruction
from dpaudit.randomness import Key
from trainers.fusion import TokenRelease
from trainers.records import Pixels
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float32]
Noise = Callable[[list[torch.Tensor], str], list[torch.Tensor]]

SIDE = 32
WINDOW = 8
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the ridge, relative to the mean squared norm of a row
JUDGED = 16  # every so many pixels decide the penalty
COMPONENTS = 256  # of the tokens, for the perceptron
STEPS, BATCH, HIDDEN = 600, 128, 256
SHOWN = 8


@dataclass(frozen=True)
class Corpus:
    """Tokens and grey pictures: tokens a list of (M, D), pictures (n, SIDE, SIDE) in [0, 1]."""

    tokens: list[torch.Tensor]
    pictures: Floats


@dataclass(frozen=True)
class Level:
    """One way to release tokens."""

    name: str
    std: float
    noise: Noise
    multiplier: float | None = None


def grey(pixels: Sequence[Pixels]) -> Floats:
    """(n, SIDE, SIDE) luminance in [0, 1]."""
    images = [Image.fromarray(item).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for item in pixels]
    stack: Floats = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return stack / np.float32(255)


def corpus(model: VisionLanguageModel, pixels: Sequence[Pixels]) -> Corpus | None:
    """Tokens of public pictures under the model's reducer; None where pictures have different numbers of tokens."""
    tokens = [item.tokens.float().cpu() for item in model.encoded(pixels)]
    return Corpus(tokens, grey(pixels)) if len({item.shape for item in tokens}) == 1 else None


def fused_noise(std: float, fused: int) -> Level:
    """The paper's: N(0, std^2) on the fused tokens, the others as they are."""

    def noise(tokens: list[torch.Tensor], stream: str) -> list[torch.Tensor]:
        if std == 0 or fused == 0:
            return tokens
        rng = np.random.default_rng(list(stream.encode()))
        out = [item.clone() for item in tokens]
        for item in out:
            drawn = rng.standard_normal((fused, item.shape[1]), dtype=np.float32)
            item[-fused:] += std * torch.from_numpy(drawn)
        return out

    return Level(f"fused tokens with noise {std:.3g}" if std else "no noise", std, noise)


def accounted(radius: float, multiplier: float) -> Level:
    """Accounted fusion at R and z."""

    def noise(tokens: list[torch.Tensor], stream: str) -> list[torch.Tensor]:
        release = TokenRelease(radius, multiplier, Key.from_seed(len(stream)))
        return [release.publish([item], [f"{stream} {index}"])[0] for index, item in enumerate(tokens)]

    return Level(f"accounted fusion, z = {multiplier:.3g}", radius * multiplier, noise, multiplier)


def features(tokens: Sequence[torch.Tensor]) -> Floats:
    """(n, M * D)."""
    return np.stack([item.flatten().numpy() for item in tokens]).astype(np.float32)


def ridge(train: Floats, target: Floats, test: Floats) -> Floats:
    """Ridge regression in its dual form; the penalty is chosen on the last fifth of the training pictures."""
    mean, centre = train.mean(axis=0), target.mean(axis=0)
    x, y, z = train - mean, target - centre, test - mean
    split = len(x) * 4 // 5
    scale = float((x**2).mean()) * x.shape[1]
    gram = x @ x.T
    best, chosen = np.inf, PENALTIES[-1]
    for penalty in PENALTIES:
        weights = _solve(gram[:split, :split], penalty * scale, y[:split, ::JUDGED])
        error = float(((gram[split:, :split] @ weights - y[split:, ::JUDGED]) ** 2).mean())
        if error < best:
            best, chosen = error, penalty
    return np.asarray(z @ x.T @ _solve(gram, chosen * scale, y) + centre, dtype=np.float32)


def _solve(gram: Floats, penalty: float, target: Floats) -> Floats:
    from scipy.linalg import solve

    padded = gram.astype(np.float64) + penalty * np.eye(len(gram))
    return np.asarray(solve(padded, target.astype(np.float64), assume_a="pos"), dtype=np.float32)


def perceptron(train: Floats, target: Floats, test: Floats, *, seed: int = 0) -> Floats:
    """A perceptron with one hidden layer on the leading principal components of the tokens.

    The weights kept are those of the step that did best on the last fifth of the training pictures.
    """
    mean, centre = train.mean(axis=0), target.mean(axis=0)
    x, z = train - mean, test - mean
    values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
    values, vectors = np.maximum(values[-COMPONENTS:], 1e-9), vectors[:, -COMPONENTS:]
    basis = (x.T @ (vectors / np.sqrt(values)).astype(np.float32)) / np.sqrt(values.mean() / len(x)).astype(np.float32)
    inputs, asked = torch.from_numpy(x @ basis), torch.from_numpy(z @ basis)
    wanted, split = torch.from_numpy(target - centre), len(x) * 4 // 5
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs.shape[1], HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, target.shape[1])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    rng = np.random.default_rng(seed)
    best, out = np.inf, torch.zeros(len(z), target.shape[1])
    for step in range(1, STEPS + 1):
        chosen = torch.from_numpy(rng.integers(split, size=BATCH))
        loss = torch.nn.functional.mse_loss(model(inputs[chosen]), wanted[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 25 == 0:
            with torch.no_grad():
                error = float(torch.nn.functional.mse_loss(model(inputs[split:]), wanted[split:]))
                if error < best:
                    best, out = error, model(asked)
    return np.asarray(out.numpy() + centre, dtype=np.float32)


def psnr(made: Floats, truth: Floats) -> npt.NDArray[np.float64]:
    """(n,) dB at peak 1."""
    error = ((made.astype(np.float64) - truth) ** 2).reshape(len(made), -1).mean(axis=1)
    return np.asarray(-10 * np.log10(np.maximum(error, 1e-10)))


def ssim(made: Floats, truth: Floats) -> npt.NDArray[np.float64]:
    """(n,) mean structural similarity over all 8 x 8 windows."""
    windows = [
        np.lib.stride_tricks.sliding_window_view(item.astype(np.float64), (WINDOW, WINDOW), axis=(1, 2))
        for item in (made, truth)
    ]
    one, two = windows
    mean_one, mean_two = one.mean(axis=(-2, -1)), two.mean(axis=(-2, -1))
    var_one, var_two = one.var(axis=(-2, -1)), two.var(axis=(-2, -1))
    covariance = (one * two).mean(axis=(-2, -1)) - mean_one * mean_two
    top = (2 * mean_one * mean_two + 1e-4) * (2 * covariance + 9e-4)
    bottom = (mean_one**2 + mean_two**2 + 1e-4) * (var_one + var_two + 9e-4)
    return np.asarray((top / bottom).reshape(len(made), -1).mean(axis=1))


def judge(made: Floats, truth: Floats, *, decoder: str, level: Level) -> Reconstruction:
    """Figures of one decoder on one level."""
    clipped = np.clip(made, 0, 1).reshape(truth.shape)
    noise, like = psnr(clipped, truth), ssim(clipped, truth)

    def spread(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
        half = 1.96 * float(values.std(ddof=1)) / np.sqrt(len(values))
        mean = float(values.mean())
        return mean, mean - half, mean + half

    p, p_low, p_high = spread(noise)
    s, s_low, s_high = spread(like)
    return Reconstruction(
        decoder=decoder,
        released=level.name,
        std=level.std,
        multiplier=level.multiplier,
        pictures=len(truth),
        psnr=p,
        psnr_low=p_low,
        psnr_high=p_high,
        ssim=s,
        ssim_low=s_low,
        ssim_high=s_high,
    )


@dataclass(frozen=True)
class Rebuilt:
    """Figures of all levels, and a strip of pictures (PNG): originals on top, one row a level."""

    rows: tuple[Reconstruction, ...]
    strip: bytes
    caption: str


def rebuild(train: Corpus, test: Corpus, levels: Sequence[Level], *, deep: Sequence[str] = ()) -> Rebuilt:
    """Every level by ridge, those named in `deep` by the perceptron too; beside them the mean training picture."""
    truth, target = test.pictures, train.pictures.reshape(len(train.pictures), -1)
    nothing = Level("nothing", 0.0, lambda tokens, _: tokens)
    mean = np.repeat(target.mean(axis=0)[None], len(truth), axis=0)
    rows = [judge(mean, truth, decoder="mean picture", level=nothing)]
    shown, names = [truth[:SHOWN]], ["original"]
    for level in levels:
        seen = features(level.noise(train.tokens, "train"))
        asked = features(level.noise(test.tokens, "tests"))
        made = ridge(seen, target, asked)
        rows.append(judge(made, truth, decoder="ridge", level=level))
        if level.name in deep:
            made = perceptron(seen, target, asked)
            rows.append(judge(made, truth, decoder="mlp", level=level))
        shown.append(np.clip(made, 0, 1).reshape(truth.shape)[:SHOWN])
        names.append(level.name)
    caption = "Public handwritten digits and what a decoder rebuilt of them, from top to bottom: " + "; ".join(names)
    return Rebuilt(tuple(rows), _png(shown), caption + ".")


def _png(rows: Sequence[Floats]) -> bytes:
    """Rows of pictures with a white gap of one pixel."""
    gap = 1
    lines = []
    for pictures in rows:
        parts = [np.pad(item, gap, constant_values=1.0) for item in pictures]
        lines.append(np.concatenate(parts, axis=1))
    whole = np.rint(np.concatenate(lines, axis=0) * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(whole).save(out, "PNG", optimize=True)
    return out.getvalue()


def strip_text(strip: bytes) -> str:
    """The strip for a document."""
    return base64.b64encode(strip).decode("ascii")


def public_corpora(model: VisionLanguageModel, *, train: int = 1500, test: int = 100) -> tuple[Corpus, Corpus] | None:
    """Synthetic pictures to learn from and the embedded test pictures to judge by; None where it can't be done."""
    from trainers.data.digits import load_digits_vqa
    from trainers.public.synthetic import synthetic_pictures

    drawn = synthetic_pictures("base", train, np.random.default_rng(11))
    known = corpus(model, [picture.pixels for picture in drawn])
    asked = corpus(model, [unit.pictures[0].pixels for unit in load_digits_vqa().test[:test]])
    return None if known is None or asked is None else (known, asked)
