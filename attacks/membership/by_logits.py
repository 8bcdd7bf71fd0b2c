"""Attacks that see the target's next-token probabilities. All of them together cost a dozen forward passes."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from attacks.membership import formulas
from attacks.membership.attack import Attack
from attacks.membership.signals import ORDERS, answer_laws, mean_by_record
from attacks.membership.units import changed, pixels_of, questions_of
from attacks.membership.view import View
from attacks.scores import calibrate, losses
from trainers.records import Pixels, Question

Floats = npt.NDArray[np.float64]

AUGMENTATIONS = ("mirror", "crop", "turn", "brightness")
NEIGHBOURS = 4  # of each sort: pictures with noise, questions with a word left out
PICTURE_NOISE = 12.0  # standard deviation in grey levels
OTHER_ANSWERS = 3


class LossAgainstBase(Attack):
    """How much lower the loss is than the base model's leads to expect; free in fine-tuning, hence the default."""

    name = "loss-against-base"
    source = "reference-model attack (Carlini et al. 2021) with the pre-trained base, slope fitted within each kind"
    needs = frozenset({"base"})
    cost = "1 forward, 1 of the base"

    def scores(self, view: View) -> Floats:
        return calibrate(view.base.loss, view.target.loss, view.kinds)


class Loss(Attack):
    """Minus the loss of the answer."""

    name = "loss"
    source = "Yeom et al. 2018"

    def scores(self, view: View) -> Floats:
        return -view.target.loss


class LossDifference(Attack):
    """Loss of the base model minus loss: the log-likelihood ratio of target and base."""

    name = "loss-difference"
    source = "Carlini et al. 2021; slope 1"
    needs = frozenset({"base"})
    cost = "1 forward, 1 of the base"

    def scores(self, view: View) -> Floats:
        return view.base.loss - view.target.loss


class MinKPlusPlus(Attack):
    """Mean of the 20 % lowest token log-probabilities, standardised under the model's own next-token law."""

    name = "min-k++"
    source = "Zhang et al. 2024 (Min-K%++)"
    share = 0.2

    def scores(self, view: View) -> Floats:
        seen = view.target.signals
        standard = (seen.log_p - seen.mean) / np.maximum(seen.spread, 1e-6)
        return formulas.min_k(standard, seen.owner, seen.records, self.share)


class MaxRenyi(Attack):
    """Minus the mean of the 10 % largest Renyi entropies (order 2) over one slice of positions."""

    source = "Li et al. 2024 (VL-MIA)"
    order, share = 2.0, 0.1
    slice: str

    def scores(self, view: View) -> Floats:
        owner, values = view.target.signals.entropies[self.slice]
        entropy = values[:, ORDERS.index(self.order)]
        # The k smallest of -H are the k largest of H; their mean is minus the mean entropy.
        return formulas.min_k(-entropy, owner, view.target.signals.records, self.share)


class MaxRenyiImage(MaxRenyi):
    """Minus the mean of the 10 % largest Renyi entropies (order 2) at the picture's positions."""

    name, slice = "max-renyi-image", "image"


class MaxRenyiQuestion(MaxRenyi):
    """Minus the mean of the 10 % largest Renyi entropies (order 2) at the questions' positions."""

    name, slice = "max-renyi-question", "question"


class MaxRenyiAnswer(MaxRenyi):
    """Minus the mean of the 10 % largest Renyi entropies (order 2) at the answers' positions."""

    name, slice = "max-renyi-answer", "answer"


def augment(pixels: Pixels, name: str) -> Pixels:
    """One of four standard augmentations: mirrored, cropped to 80 %, turned by 10 degrees, 30 % brighter."""
    height, width = pixels.shape[:2]
    if name == "mirror":
        return np.ascontiguousarray(pixels[:, ::-1])
    picture = Image.fromarray(pixels)
    if name == "crop":
        top, left = max(1, height // 10), max(1, width // 10)
        part = picture.crop((left, top, max(left + 1, width - left), max(top + 1, height - top)))
        return np.asarray(part.resize((width, height), Image.Resampling.BILINEAR), dtype=np.uint8)
    if name == "turn":
        return np.asarray(picture.rotate(10, Image.Resampling.BILINEAR), dtype=np.uint8)
    return np.clip(pixels.astype(np.float64) * 1.3, 0, 255).astype(np.uint8)


class AugmentationKl(Attack):
    """Minus the mean divergence of the answer's law from that under four augmentations of the picture."""

    name = "augmentation-kl"
    source = "baseline of Li et al. 2024 (VL-MIA)"
    cost = "5 forward"

    def scores(self, view: View) -> Floats:
        model = view.target.model
        plain, owner = answer_laws(model, view.units)
        total = np.zeros(len(owner))
        for name in AUGMENTATIONS:
            moved, _ = answer_laws(
                model, changed(view.units, [augment(pixels, name) for pixels in pixels_of(view.units)], None)
            )
            for at in range(0, len(owner), 4096):
                here, there = plain[at : at + 4096].float(), moved[at : at + 4096].float()
                total[at : at + 4096] += (here.exp() * (here - there)).sum(dim=-1).double().numpy()
        return -mean_by_record(total, owner, len(view.units)) / len(AUGMENTATIONS)


class Neighbourhood(Attack):
    """Mean loss of neighbours (noisy pictures, questions with a word left out) minus the record's own loss."""

    name = "neighbourhood"
    source = "Mattern et al. 2023; picture neighbours as in MIMIR's design"
    cost = "9 forward"

    def scores(self, view: View) -> Floats:
        rng = view.rng(self.name)
        total = np.zeros(len(view.units))
        for _ in range(NEIGHBOURS):
            noisy = [
                np.clip(np.rint(pixels + rng.normal(0, PICTURE_NOISE, pixels.shape)), 0, 255).astype(np.uint8)
                for pixels in pixels_of(view.units)
            ]
            total += losses(view.target.model, changed(view.units, noisy, None))
            shorter = [replace(question, text=_drop_word(question.text, rng)) for question in questions_of(view.units)]
            total += losses(view.target.model, changed(view.units, None, shorter))
        return total / (2 * NEIGHBOURS) - view.target.loss


def _drop_word(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    if len(words) < 2:
        return text.swapcase()
    del words[int(rng.integers(len(words)))]
    return " ".join(words)


class ShuffledAnswers(Attack):
    """Mean loss of answers borrowed from other records of the kind minus the loss of the record's own."""

    name = "shuffled-answers"
    source = "right against shuffled pairs (GradAudit's game, arXiv 2606.24774); exposure's idea (Carlini et al. 2019)"
    cost = "4 forward"

    def scores(self, view: View) -> Floats:
        rng = view.rng(self.name)
        total = np.zeros(len(view.units))
        for _ in range(OTHER_ANSWERS):
            total += losses(view.target.model, changed(view.units, None, self._borrowed(view, rng)))
        return total / OTHER_ANSWERS - view.target.loss

    def _borrowed(self, view: View, rng: np.random.Generator) -> list[Question]:
        """Every question with the answer of another question of the same kind of record and of question."""
        owners = [
            kind for unit, kind in zip(view.units, view.kinds, strict=True) for p in unit.pictures for _ in p.questions
        ]
        questions = questions_of(view.units)
        groups: dict[tuple[str, str], list[int]] = {}
        for place, (question, kind) in enumerate(zip(questions, owners, strict=True)):
            groups.setdefault((str(kind), question.kind), []).append(place)
        out = list(questions)
        for places in groups.values():
            pool = [questions[place].answer for place in places]
            for place, drawn in zip(places, rng.integers(len(pool), size=(len(places), 8)), strict=True):
                other = [pool[index] for index in drawn if pool[index] != questions[place].answer]
                out[place] = replace(questions[place], answer=other[0] if other else questions[place].answer)
        return out


class QuantileRegression(Attack):
    """Where the loss lies in the law that is expected of such a record, fitted on the other records without coins."""

    name = "quantile-regression"
    source = "Bertran et al. 2023; one-run form Liu et al. 2025 (arXiv 2506.15349)"
    needs = frozenset({"base"})
    cost = "1 forward, 1 of the base"
    folds, ridge = 5, 1.0

    def scores(self, view: View) -> Floats:
        features = self._features(view)
        folds = view.rng(self.name).permutation(len(view.units)) % self.folds
        target = view.target.loss
        predicted = _out_of_fold(features, target, folds, self.ridge)
        spread = np.exp(_out_of_fold(features, np.log(np.abs(target - predicted) + 1e-3), folds, self.ridge))
        return formulas.quantile_score(target, predicted, spread)

    def _features(self, view: View) -> Floats:
        base = view.base.signals
        counts = np.bincount(base.owner, minlength=base.records).astype(np.float64)
        columns = [base.loss, base.loss**2, np.log1p(counts)]
        columns += [mean_by_record(values[:, 1], owner, base.records) for owner, values in base.entropies.values()]
        columns += [(view.kinds == kind).astype(np.float64) for kind in np.unique(view.kinds)]
        return np.stack(columns, axis=1)


def _out_of_fold(features: Floats, target: Floats, folds: npt.NDArray[np.int64], ridge: float) -> Floats:
    """Ridge predictions of each record from the other folds; features are standardised on these."""
    out = np.empty_like(target)
    for fold in np.unique(folds):
        test = folds == fold
        fit = ~test if (~test).any() else test
        mean, scale = features[fit].mean(axis=0), features[fit].std(axis=0)
        kept = scale > 1e-12
        x = (features[:, kept] - mean[kept]) / scale[kept]
        level = target[fit].mean()
        inner = x[fit].T @ x[fit] + ridge * np.eye(int(kept.sum()))
        out[test] = level + x[test] @ np.linalg.solve(inner, x[fit].T @ (target[fit] - level))
    return out


ATTACKS: tuple[Attack, ...] = (
    LossAgainstBase(),
    Loss(),
    LossDifference(),
    MinKPlusPlus(),
    MaxRenyiImage(),
    MaxRenyiQuestion(),
    MaxRenyiAnswer(),
    AugmentationKl(),
    Neighbourhood(),
    ShuffledAnswers(),
    QuantileRegression(),
)
