"""Decoders and their measures against what they must give by arithmetic."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from attacks.fusion.reconstruction import (
    Corpus,
    Level,
    accounted,
    features,
    fused_noise,
    grey,
    judge,
    perceptron,
    psnr,
    rebuild,
    ridge,
    ssim,
    strip_text,
)

PLAIN = Level("plain", 0.0, lambda tokens, _: tokens)


def linear(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that are a linear function of 40 features."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).normal(size=(40, 64)) / 12
    x = rng.normal(size=(count, 40))
    y = 0.5 + x @ weights + noise * rng.normal(size=(count, 64))
    return x.astype(np.float32), y.astype(np.float32)


def test_ridge_finds_a_linear_map_and_gives_up_on_noise() -> None:
    x, y = linear(400, 0.01)
    z, truth = linear(50, 0.0, seed=1)
    assert float(((ridge(x, y, z) - truth) ** 2).mean()) < 1e-3
    rng = np.random.default_rng(2)
    blank = rng.normal(size=(400, 40)).astype(np.float32)  # features that say nothing
    made = ridge(blank, y, rng.normal(size=(50, 40)).astype(np.float32))
    spread = float(((truth - y.mean(axis=0)) ** 2).mean())
    assert float(((made - truth) ** 2).mean()) < 1.3 * spread  # hardly worse than the mean picture


def test_the_perceptron_learns_what_it_is_shown_and_repeats_itself() -> None:
    x, y = linear(600, 0.0)
    z, truth = linear(50, 0.0, seed=1)
    made = perceptron(x, y, z)
    assert float(((made - truth) ** 2).mean()) < 0.3 * float(((truth - y.mean(axis=0)) ** 2).mean())
    assert np.array_equal(made, perceptron(x, y, z))


def test_psnr_is_its_definition() -> None:
    truth = np.full((2, 32, 32), 0.5, dtype=np.float32)
    off = truth.copy()
    off[0] += 0.1  # error 0.01: 20 dB
    assert psnr(off, truth)[0] == pytest.approx(20.0, abs=1e-4)
    assert psnr(off, truth)[1] == pytest.approx(100.0)  # capped


def test_ssim_against_its_definition_on_one_window() -> None:
    rng = np.random.default_rng(3)
    one, two = rng.random((2, 1, 8, 8))
    a, b = one.ravel(), two.ravel()
    top = (2 * a.mean() * b.mean() + 1e-4) * (2 * ((a - a.mean()) * (b - b.mean())).mean() + 9e-4)
    bottom = (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var() + b.var() + 9e-4)
    assert ssim(one, two)[0] == pytest.approx(top / bottom)
    pictures = rng.random((3, 32, 32))
    assert ssim(pictures, pictures) == pytest.approx(1.0)
    assert (ssim(pictures, 1 - pictures) < 0).all()


def test_noise_lies_where_the_method_puts_it() -> None:
    tokens = [torch.zeros(5, 200) for _ in range(20)]
    paper = torch.stack(fused_noise(2.0, 3).noise(tokens, "train"))
    assert (paper[:, :2] == 0).all() and float(paper[:, 2:].std()) == pytest.approx(2.0, rel=0.03)
    assert not torch.equal(paper, torch.stack(fused_noise(2.0, 3).noise(tokens, "tests")))
    released = torch.stack(accounted(3.0, 0.5).noise(tokens, "train"))
    assert float(released.std()) == pytest.approx(1.5, rel=0.03)
    assert fused_noise(0.0, 3).noise(tokens, "train") is tokens


def test_levels_are_judged_on_the_same_pictures_and_shown_in_a_strip() -> None:
    rng = np.random.default_rng(4)
    tokens = [torch.from_numpy(rng.normal(size=(4, 30)).astype(np.float32)) for _ in range(260)]
    weights = rng.normal(size=(120, 1024)).astype(np.float32) / 40
    pictures = np.clip(0.5 + features(tokens) @ weights, 0, 1).reshape(-1, 32, 32).astype(np.float32)
    train, test = Corpus(tokens[:240], pictures[:240]), Corpus(tokens[240:], pictures[240:])
    made = rebuild(train, test, [PLAIN, fused_noise(20.0, 4)])
    names = [(row.decoder, row.released) for row in made.rows]
    assert names == [("mean picture", "nothing"), ("ridge", "plain"), ("ridge", "fused tokens with noise 20")]
    mean, plain, noisy = made.rows
    assert plain.psnr > noisy.psnr and plain.psnr > mean.psnr + 2
    assert all(row.psnr_low < row.psnr < row.psnr_high and row.pictures == 20 for row in made.rows)
    strip = Image.open(io.BytesIO(base64.b64decode(strip_text(made.strip))))
    assert strip.size == (8 * 34, 3 * 34) and made.caption.count(";") == 2


def test_a_perfect_picture_scores_one() -> None:
    truth = np.random.default_rng(5).random((4, 32, 32)).astype(np.float32)
    row = judge(truth.reshape(4, -1), truth, decoder="x", level=PLAIN)
    assert row.ssim == pytest.approx(1.0) and row.psnr == pytest.approx(100.0)


def test_grey_values_are_luminance() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    assert grey([red])[0].mean() == pytest.approx(0.298, abs=0.01) and grey([red]).shape == (1, 32, 32)
