"""Signals against plain computations on one question at a time, and every attack on a tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.membership.by_text import sampled_answers, similarity
from attacks.membership.gradients import SKETCH, base_gradients, unit_gradients
from attacks.membership.signals import ORDERS, renyi_entropies, signals
from attacks.membership.table import attacks, default_attack, score_all
from attacks.membership.view import Access, References, View
from attacks.scores import losses
from dpaudit.config import LoraConfig, resolve
from dpaudit.errors import UsageError
from tests.tiny import random_units
from trainers.inputs import UnitInputs
from trainers.records import Picture, Unit
from trainers.vlm import VisionLanguageModel

UNITS = (*random_units(7), *random_units(3, seed=5, pictures=2, prefix="t"))
KINDS = np.array(["a"] * 5 + ["b"] * 5)


def models(tiny: Path) -> tuple[VisionLanguageModel, VisionLanguageModel]:
    """A base model and one with an adapter that moves it."""
    base = VisionLanguageModel.load(str(tiny), device="cpu")
    tuned = VisionLanguageModel.load(str(tiny), device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for value in tuned.attach_lora(LoraConfig(rank=2), generator=np.random.default_rng(0)).values():
            value.add_(0.03 * torch.randn_like(value))
    return base, tuned


def view_of(tiny: Path, *, references: bool = True) -> View:
    base, tuned = models(tiny)
    rng = np.random.default_rng(2)
    refs = References(
        rng.exponential(size=(6, 10)), rng.random((6, 10)) < 0.5, rng.exponential(size=(6, 8)),
        np.array(["a"] * 8), rng.exponential(size=8),
    )  # fmt: skip
    target, plain = Access(tuned, UNITS, adapted=True), Access(base, UNITS, adapted=False)
    return View(UNITS, KINDS, target, plain, refs if references else None, seed=3)


def test_entropies_are_those_of_the_definition() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(9), size=4)
    found = renyi_entropies(torch.tensor(p).log()).numpy()
    for column, order in enumerate(ORDERS):
        if order == 1.0:
            expected = -(p * np.log(p)).sum(axis=1)
        elif np.isinf(order):
            expected = -np.log(p.max(axis=1))
        else:
            expected = np.log((p**order).sum(axis=1)) / (1 - order)
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-6)


def test_signals_of_a_batch_are_those_of_every_record_alone(tiny: Path) -> None:
    _, model = models(tiny)
    together = signals(model, UNITS)
    np.testing.assert_allclose(together.loss, losses(model, UNITS), rtol=1e-5)
    for index, unit in enumerate(UNITS):
        alone = signals(model, [unit])
        mine = together.owner == index
        for name in ("log_p", "mean", "spread"):
            np.testing.assert_allclose(getattr(together, name)[mine], getattr(alone, name), rtol=1e-3, atol=1e-4)
        for name, (owner, values) in together.entropies.items():
            np.testing.assert_allclose(values[owner == index], alone.entropies[name][1], rtol=1e-3, atol=1e-4)
    # The picture has 17 tokens here (CLS and 16 patches), and the question's tokens are counted without the answer's.
    pictures = sum(len(unit.pictures) for unit in UNITS)
    assert len(together.entropies["image"][0]) == 17 * pictures
    answers = sum(
        len(model.prompter.encode(q.text, q.answer)[1]) for u in UNITS for p in u.pictures for q in p.questions
    )
    assert len(together.owner) == len(together.entropies["answer"][0]) == answers


def test_gradients_along_the_adapter_are_derivatives_of_the_loss(tiny: Path) -> None:
    """-d loss / d lambda against finite differences of the loss with the adapter's B scaled by lambda."""
    _, model = models(tiny)
    found = unit_gradients(model, UNITS, UnitInputs(model, UNITS))
    ups = {name: value for name, value in model.adapter_parameters().items() if "lora_B" in name}
    before = {name: value.detach().clone() for name, value in ups.items()}

    def at(scale: float) -> np.ndarray:
        with torch.no_grad():
            for name, value in ups.items():
                value.copy_(before[name] * scale)
        return losses(model, UNITS)

    step = 2e-2
    np.testing.assert_allclose(found.alignment, -(at(1 + step) - at(1 - step)) / (2 * step), rtol=0.03, atol=3e-3)
    np.testing.assert_allclose(found.start, -(at(step) - at(-step)) / (2 * step), rtol=0.03, atol=3e-3)
    at(1.0)
    assert (found.norm > 0).all()


def test_sketched_gradients_keep_cosines(tiny: Path) -> None:
    config = resolve({}, [f"model.path={tiny}", "model.device=cpu", "model.lora.rank=2"])
    sketch = base_gradients(config)(UNITS[:6])
    assert sketch.shape == (6, SKETCH)
    model = VisionLanguageModel.load(str(tiny), device="cpu")
    parameters = model.attach_lora(config.model.lora, generator=np.random.default_rng(0))
    rows = []
    for unit in UNITS[:6]:
        inputs = UnitInputs(model, [unit])
        loss = model.losses(inputs.select([0]).tokens, inputs.select([0]).packed)
        grads = torch.autograd.grad((loss * inputs.select([0]).weight).sum(), list(parameters.values()))
        rows.append(torch.cat([g.flatten() for g in grads]).numpy())
    exact = np.stack(rows)

    def cosines(x: np.ndarray) -> np.ndarray:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return unit @ unit.T

    assert np.abs(cosines(sketch) - cosines(exact)).max() < 0.15  # 1 / sqrt(4096) is 0.016


def test_every_attack_scores_every_record_and_says_what_it_is(tiny: Path) -> None:
    view = view_of(tiny)
    scores = score_all(view)
    assert list(scores) == list(attacks())
    assert all(value.shape == (10,) and np.isfinite(value).all() for value in scores.values())
    again = score_all(view, ["neighbourhood", "temperature", "shuffled-answers", "quantile-regression"])
    for name, value in again.items():
        np.testing.assert_array_equal(value, scores[name])  # what is random is seeded
    for name, attack in attacks().items():
        assert attack.name == name and attack.description.endswith(".") and attack.source and attack.cost
    assert default_attack(view) == "bavaria"
    with pytest.raises(UsageError, match=r"attack: got 'lirra'; accepted: one of loss-against-base"):
        score_all(view, ["lirra"])


def test_without_references_those_attacks_are_left_out(tiny: Path) -> None:
    view = view_of(tiny, references=False)
    assert default_attack(view) == "loss-against-base"
    applying = [name for name, attack in attacks().items() if attack.applies(view)]
    assert "bavaria" not in applying and "loss" in applying


def test_similarity_is_graded_and_symmetric() -> None:
    assert similarity("Seven ", "seven") == 1.0
    assert similarity("", "seven") < similarity("eleven", "seven") < 1.0
    assert similarity("ab", "ba") == similarity("ba", "ab")
    assert similarity("x", "yy") == 0.0


def test_sampling_at_a_low_temperature_is_the_greedy_answer(tiny: Path) -> None:
    _, model = models(tiny)
    pictures = [unit.pictures[0] for unit in UNITS]
    asked = [picture.questions[0] for picture in pictures]
    shown = [picture.shown for picture in pictures]
    cold = sampled_answers(model, shown, asked, temperature=1e-4, seed=0)
    assert cold == model.answer(shown, asked)
    hot = sampled_answers(model, shown, asked, temperature=3.0, seed=0)
    assert hot != cold and hot == sampled_answers(model, shown, asked, temperature=3.0, seed=0)


def test_a_record_with_one_answer_in_its_group_borrows_none(tiny: Path) -> None:
    """Nothing to shuffle: the score is 0, not an error."""
    base, tuned = models(tiny)
    unit = Unit("only", (Picture("only", UNITS[0].pictures[0].pixels, UNITS[0].pictures[0].questions[:1]),))
    view = View([unit], np.array(["a"]), Access(tuned, [unit], adapted=True), Access(base, [unit], adapted=False))
    assert attacks()["shuffled-answers"].scores(view).tolist() == [0.0]
