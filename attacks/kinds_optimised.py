"""Pictures optimised so that a training step tells who took part (metagradient canaries, in small).

Boglioni et al. 2025 (arXiv 2507.15836) differentiate the gap between members and non-members through a whole training
with respect to the canaries' pixels, on a small model without privacy, and find that such canaries transfer to larger
models and to DP-SGD. Here one clipped step of the package's own reference model is unrolled: candidates are split at
random, the halves' clipped gradients move a fresh adapter, and the pixels follow the gradient of

    mean loss of those left out - mean loss of those taken, after the step and against before it,

with new halves each round, taken both ways round. What can change of a picture is the sign of each of 8 x 8 x 3 coarse
cells, so the result is one number of 192 bits a candidate, which is stored with the coins: the same pictures come back
on every machine, whatever its rounding. Proxy and ingredients are public; nothing depends on the data or on a coin.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.kinds import Draft, Materials, single
from attacks.kinds_drawn import RARE_ANSWER
from dpaudit.config import LoraConfig
from dpaudit.errors import UsageError
from trainers.gradients import clip_factors
from trainers.records import Pixels, Unit

CELLS = 8  # a side; three colours each
BITS = 3 * CELLS**2
AMPLITUDE = 48.0  # grey levels around the drawn picture, which is dimmed to leave room
ROUNDS = 8
AT_ONCE = 24  # candidates that share an unrolled step
RATE = 0.3  # of the unrolled step, over the clipped mean

Signs = npt.NDArray[np.int8]


class Optimised:
    """Noise pictures with rare answers, optimised through an unrolled step of the small reference model."""

    name = "optimised"
    description = (
        "A noise picture whose coarse cells are optimised, through an unrolled training step of the small reference "
        "model, so that taking part shows; a rare word as its answer."
    )
    synthetic = True

    def draw(self, count: int, materials: Materials, rng: np.random.Generator) -> list[Draft]:
        """`count` candidates; the optimised signs are taken from `materials.chosen`, or found now and left there."""
        drafts = RARE_ANSWER.draw(count, materials, rng)
        start = np.where(rng.random((count, CELLS, CELLS, 3)) < 0.5, -1, 1).astype(np.int8)
        seed = int(rng.integers(2**31))
        chosen = materials.chosen.get(self.name)
        if chosen is None:
            chosen = tuple(pack(signs) for signs in optimise([draft.unit for draft in drafts], start, seed))
            materials.chosen[self.name] = chosen
        if len(chosen) != count or not all(0 <= number < 2**BITS for number in chosen):
            raise UsageError("coins: the optimised pictures stored in them do not fit this run's kinds and count")
        return [
            Draft(with_signs(draft.unit, unpack(number)), "noise, cells optimised through a training step")
            for draft, number in zip(drafts, chosen, strict=True)
        ]


def pack(signs: Signs) -> int:
    """(8, 8, 3) signs as one number."""
    return int("".join("1" if sign > 0 else "0" for sign in signs.ravel()), 2)


def unpack(number: int) -> Signs:
    """Inverse of `pack`."""
    bits = [1 if digit == "1" else -1 for digit in f"{number:0{BITS}b}"]
    return np.array(bits, dtype=np.int8).reshape(CELLS, CELLS, 3)


def painted(pixels: Pixels, cells: npt.NDArray[np.float64]) -> Pixels:
    """The picture dimmed to half its contrast plus (8, 8, 3) cells in [-1, 1] times AMPLITUDE."""
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) * CELLS // height, np.arange(width) * CELLS // width
    dimmed = 127.5 + 0.5 * (pixels.astype(np.float64) - 127.5)
    out: Pixels = np.clip(np.rint(dimmed + AMPLITUDE * cells[rows][:, columns]), 0, 255).astype(np.uint8)
    return out


def with_signs(unit: Unit, signs: Signs) -> Unit:
    """The unit with its picture painted."""
    picture = unit.pictures[0]
    question = picture.questions[0]
    return single(painted(picture.pixels, signs.astype(np.float64)), question.text, question.answer, question.kind)


def optimise(units: Sequence[Unit], start: Signs, seed: int) -> Signs:
    """(n, 8, 8, 3) signs after ROUNDS rounds of sign ascent, AT_ONCE candidates sharing each unrolled step."""
    proxy = Proxy()
    rng = np.random.default_rng(seed)
    cells = 0.25 * start.astype(np.float64)
    for at in range(0, len(units), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        for _ in range(ROUNDS):
            inside = rng.permutation(len(units[part])) < max(1, len(units[part]) // 2)
            # Both ways round: which half is the easier one cancels.
            slope = proxy.gap(units[part], cells[part], inside)[1] + proxy.gap(units[part], cells[part], ~inside)[1]
            cells[part] = np.clip(cells[part] + 0.25 * np.sign(slope), -1, 1)
    return np.where(cells >= 0, 1, -1).astype(np.int8)


class Proxy:
    """The package's reference model with a fresh public adapter, differentiable from cells to losses."""

    def __init__(self) -> None:
        from trainers.rows import RowModel, _scale
        from trainers.vlm import VisionLanguageModel

        self.model = VisionLanguageModel.load(None, device="cpu")
        parameters = self.model.attach_lora(LoraConfig(rank=4, alpha=8.0), generator=np.random.default_rng(0))
        self.adapter = {name: value.detach().clone() for name, value in parameters.items()}
        scale = _scale(self.model)
        assert scale is not None
        self.rows = RowModel(self.model, scale)

    def gap(
        self, units: Sequence[Unit], cells: npt.NDArray[np.float64], inside: npt.NDArray[np.bool_]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """How much better those taken come out of the step than those left out, and its gradient by cells (n, 8, 8, 3).

        units: of one picture with one question each.
        """
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
            return self._gap(units, cells, inside)

    def _gap(
        self, units: Sequence[Unit], cells: npt.NDArray[np.float64], inside: npt.NDArray[np.bool_]
    ) -> tuple[float, npt.NDArray[np.float64]]:
        from trainers.inputs import UnitInputs

        shown = [painted(unit.pictures[0].pixels, cell) for unit, cell in zip(units, cells, strict=True)]
        repainted = [
            single(pixels, unit.pictures[0].questions[0].text, unit.pictures[0].questions[0].answer, "")
            for pixels, unit in zip(shown, units, strict=True)
        ]
        rows = UnitInputs(self.model, repainted).select(range(len(units)))
        family = self.model.family
        prepared = family.prepare(shown)
        values = torch.stack([picture.values for picture in prepared]).float().requires_grad_()
        visual = family.encode(
            [replace(picture, values=value) for picture, value in zip(prepared, values, strict=True)],
            self.model.layers,
        )
        rows = replace(rows, tokens=self.model.reduce(visual).tokens.to(self.model.dtype))
        count, taken = len(units), torch.from_numpy(inside)
        own = {name: value.expand(count, *value.shape).contiguous() for name, value in self.adapter.items()}
        moving = {name: value.requires_grad_() for name, value in own.items() if "lora_B" in name}
        before = self.rows.losses(rows, own)
        gradients = torch.autograd.grad(before.sum(), list(moving.values()), create_graph=True)
        norms = torch.stack([value.flatten(1).square().sum(dim=1) for value in gradients]).sum(dim=0).sqrt()
        weights = clip_factors(norms, 1.0) * taken / max(1, int(taken.sum()))
        stepped = dict(own)
        for name, value in zip(moving, gradients, strict=True):
            update = torch.einsum("n,n...->...", weights, value)
            stepped[name] = own[name].detach() - RATE * update.expand_as(own[name])
        fall = before - self.rows.losses(rows, stepped)
        gap = fall[taken].mean() - fall[~taken].mean() if bool((~taken).any()) else fall.mean()
        (slope,) = torch.autograd.grad(gap, values)
        return float(gap.detach()), self._by_cell(slope, count)

    def _by_cell(self, slope: Tensor, count: int) -> npt.NDArray[np.float64]:
        """Total slope of every cell; slope: (n, 3, h, w) by the tower's own input."""
        height, width = slope.shape[2:]
        rows, columns = (torch.arange(size) * CELLS // size for size in (height, width))
        by_row = torch.zeros(count, 3, CELLS, width).index_add_(2, rows, slope.float())
        by_cell = torch.zeros(count, 3, CELLS, CELLS).index_add_(3, columns, by_row)
        found: npt.NDArray[np.float64] = by_cell.permute(0, 2, 3, 1).double().numpy()
        return found
