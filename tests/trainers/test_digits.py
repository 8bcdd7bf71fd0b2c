"""The embedded data set: every real sample once, disjoint splits, answers that follow from the labels."""

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from trainers.data.digits import PUBLIC_ANSWERS, RESERVE, TEST, TRAIN, load_digits_vqa
from trainers.public.scene import NUMBERS, TEMPLATES
from trainers.records import Dataset, Picture


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_digits_vqa()


def _pictures(dataset: Dataset) -> list[Picture]:
    return [picture for unit in dataset.train + dataset.test + dataset.reserve for picture in unit.pictures]


def _sample(picture: Picture) -> int:
    return int(picture.id.removeprefix("digit-"))


def _answer(picture: Picture, kind: str) -> str:
    return next(question.answer for question in picture.questions if question.kind == kind)


def test_every_sample_lies_in_exactly_one_picture_and_one_unit(dataset: Dataset) -> None:
    assert (len(dataset.train), len(dataset.test), len(dataset.reserve)) == (TRAIN, TEST, RESERVE)
    units = dataset.train + dataset.test + dataset.reserve
    assert all(len(unit.pictures) == 1 and unit.id == unit.pictures[0].id for unit in units)
    assert sorted(_sample(picture) for picture in _pictures(dataset)) == list(range(1797))


def test_no_two_splits_share_handwriting(dataset: Dataset) -> None:
    """Also by content: where scikit-learn holds equal samples (it may), they would be seen here."""
    images = load_digits().images
    content = [
        {images[_sample(unit.pictures[0])].tobytes() for unit in split}
        for split in (dataset.train, dataset.test, dataset.reserve)
    ]
    assert not (content[0] & content[1] or content[0] & content[2] or content[1] & content[2])


def test_answers_follow_from_the_labels(dataset: Dataset) -> None:
    labels = load_digits().target
    for picture in _pictures(dataset):
        digit = int(labels[_sample(picture)])
        for question in picture.questions:
            word = question.text.rstrip("?").split()[-1]
            expected = {
                "digit": NUMBERS[digit],
                "identity": "yes" if word == NUMBERS[digit] else "no",
                "parity": ("even", "odd")[digit % 2],
                "greater": "yes" if word in NUMBERS and digit > NUMBERS.index(word) else "no",
                "side": question.answer,
            }[question.kind]
            assert question.answer == expected
            assert question.answer in PUBLIC_ANSWERS[question.kind]


def test_the_digit_lies_where_the_answer_says(dataset: Dataset) -> None:
    """The ink's centre of mass, found from the pixels alone, is on the side that is the answer."""
    agree = []
    for picture in _pictures(dataset):
        grey = picture.pixels.astype(float).mean(axis=2)
        ink = np.clip(np.median(grey) - 40 - grey, 0, None)
        centre = (ink.sum(axis=0) * (np.arange(32) + 0.5)).sum() / ink.sum()
        agree.append(("left" if centre < 16 else "right") == _answer(picture, "side"))
    assert np.mean(agree) > 0.97  # ink is not exactly centred in its box


def test_stratified_and_balanced(dataset: Dataset) -> None:
    for split in (dataset.train, dataset.test, dataset.reserve):
        pictures = [unit.pictures[0] for unit in split]
        digits = Counter(_answer(picture, "digit") for picture in pictures)
        expected = len(split) / 10
        assert set(digits) == set(NUMBERS)
        assert all(abs(count - expected) < 0.05 * len(split) for count in digits.values())
        for kind in ("identity", "side", "parity"):
            share = Counter(_answer(picture, kind) for picture in pictures).most_common(1)[0][1] / len(pictures)
            assert share < 0.62  # five standard errors of a fair coin at 297 pictures would be 0.645


def test_pictures_and_questions(dataset: Dataset) -> None:
    for picture in _pictures(dataset):
        assert picture.pixels.shape == (32, 32, 3) and picture.pixels.dtype == np.uint8
        assert [question.kind for question in picture.questions] == list(TEMPLATES)


def test_the_seed_decides_everything(dataset: Dataset) -> None:
    again, other = load_digits_vqa(0), load_digits_vqa(1)
    for one, two in zip(_pictures(dataset), _pictures(again), strict=True):
        assert one.id == two.id and one.questions == two.questions and np.array_equal(one.pixels, two.pixels)
    assert [unit.id for unit in other.train] != [unit.id for unit in dataset.train]
    assert dataset.ledger == () and dataset.source == "embedded"
