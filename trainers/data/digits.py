"""The embedded data set: questions about pictures of real handwritten digits.

The handwriting is scikit-learn's copy of the test part of UCI's "Optical Recognition of Handwritten Digits" (1,797
samples of 13 writers, 8x8 pixels with values 0..16, CC BY 4.0, https://archive.ics.uci.edu/dataset/80). Each sample
lies in exactly one picture at a random place and size, so protecting the picture protects the sample. How pictures and
questions are made is public and the same as for the synthetic ones (trainers.public.scene); nothing is derived from
the rows themselves.
"""

import numpy as np
import numpy.typing as npt

from trainers.public.scene import PUBLIC_ANSWERS, pictures
from trainers.records import Dataset, Unit

__all__ = ["PUBLIC_ANSWERS", "RESERVE", "TEST", "TRAIN", "load_digits_vqa"]

TRAIN, TEST, RESERVE = 1150, 350, 297


def _stratified(labels: npt.NDArray[np.int64], rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Indices of train, test and reserve: disjoint, together everything, each class spread evenly over all three.

    The classes are shuffled within themselves and interleaved; every stretch of the sequence then holds all classes
    in nearly equal parts.
    """
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        key[members] = (rng.permutation(len(members)) + rng.uniform()) / len(members)
    train, test, reserve = np.split(np.argsort(key, kind="stable"), [TRAIN, TRAIN + TEST])
    return [rng.permutation(train), rng.permutation(test), rng.permutation(reserve)]


def load_digits_vqa(seed: int = 0) -> Dataset:
    """The data set; the same for the same seed, on every machine. The unit is the picture with its five questions.

    train 1,150, test 350, reserve 297 units; pictures uint8 (32, 32, 3); `Question.kind` is one of PUBLIC_ANSWERS.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    glyphs = np.asarray(source.images).astype(np.uint8)
    labels = np.asarray(source.target).astype(np.int64)
    rng = np.random.default_rng([seed, 1797])

    def units(chosen: npt.NDArray[np.int64]) -> tuple[Unit, ...]:
        names = [f"digit-{index:04d}" for index in chosen]
        drawn = pictures(names, glyphs[chosen], labels[chosen].tolist(), rng)
        return tuple(Unit(item.id, (item,)) for item in drawn)

    train, test, reserve = (units(chosen) for chosen in _stratified(labels, rng))
    return Dataset("digits", "image (with all its questions)", train, test, reserve)
