"""Gradients of single records, for attackers who hold the weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpaudit.config import RunConfig
from trainers.gradients import MicroBatch
from trainers.inputs import UnitInputs
from trainers.records import Unit
from trainers.rows import RowModel, row_gradients
from trainers.vlm import VisionLanguageModel

Floats = npt.NDArray[np.float64]
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class UnitGradients:
    """norm (U,): of the gradient over the adapter. alignment (U,): -d loss / d lambda at lambda = 1 when the adapter's
    change of the weights is scaled by lambda, start (U,): the same at lambda = 0, the base model."""

    norm: Floats
    alignment: Floats
    start: Floats


def unit_gradients(model: VisionLanguageModel, units: Sequence[Unit], inputs: UnitInputs) -> UnitGradients:
    """One backward pass a record at the released weights and one at the base.

    A LoRA module adds s B A to its weight, which is linear in B: hence d loss / d lambda = <d loss / d B, B>, and at
    lambda = 0 the same inner product with the gradient taken at B = 0.
    """
    adapter = {name: value.detach().clone() for name, value in model.adapter_parameters().items()}
    ups = [name for name in adapter if "lora_B" in name]
    without = {name: torch.zeros_like(value) if name in ups else value for name, value in adapter.items()}
    norm, alignment, start = (np.zeros(len(units)) for _ in range(3))
    for index, gradient in gradients_of(model, inputs, range(len(units)), adapter):
        norm[index] = float(torch.stack([value.square().sum() for value in gradient.values()]).sum().sqrt())
        alignment[index] = -sum(float((gradient[name] * adapter[name]).sum()) for name in ups)
    for index, gradient in gradients_of(model, inputs, range(len(units)), without):
        start[index] = -sum(float((gradient[name] * adapter[name]).sum()) for name in ups)
    return UnitGradients(norm, alignment, start)


def gradients_of(
    model: VisionLanguageModel, inputs: UnitInputs, units: Sequence[int], adapter: dict[str, Tensor]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(unit, its gradient over the adapter's parameters) at the adapter given; the model keeps its own."""
    fast = RowModel.of(model, inputs)
    if fast is not None:
        for chunk in inputs.chunks(units, ROWS_AT_ONCE):
            rows = inputs.select(chunk)
            many = {name: value.expand(rows.packed.rows, *value.shape).contiguous() for name, value in adapter.items()}
            found, _ = row_gradients(rows, fast, many)
            share = {name: value * rows.weight.view(-1, *[1] * (value.dim() - 1)) for name, value in found.items()}
            for place, unit in enumerate(chunk):
                mine = rows.owner == place
                yield unit, {name: value[mine].sum(dim=0) for name, value in share.items()}
        return
    parameters = model.adapter_parameters()
    before = {name: value.detach().clone() for name, value in parameters.items()}
    slow = MicroBatch(model, parameters)
    try:
        _set(parameters, adapter)
        for unit in units:
            gradient, _ = slow.gradient(inputs.select([unit]))
            yield unit, gradient
    finally:
        _set(parameters, before)


def _set(parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


class Fold:
    """Gradients of `long` values as rows of at most `most`: as they are, or hashed (count sketch), which keeps inner
    products to about one part in the square root of `most`. always: hashed to `most` even where they would fit."""

    def __init__(self, long: int, most: int, *, always: bool = False) -> None:
        self.where: Tensor | None = None
        self.width = most if always else min(long, most)
        if always or long > most:
            draw = torch.Generator().manual_seed(0)
            self.where = torch.randint(most, (long,), generator=draw)
            self.sign = torch.randint(2, (long,), generator=draw, dtype=torch.int8)

    def __call__(self, parts: Iterable[Tensor]) -> npt.NDArray[np.float32]:
        """The row of one gradient, given block by block."""
        flat = torch.cat([part.detach().float().flatten().cpu() for part in parts])
        if self.where is not None:
            flat = torch.zeros(self.width).index_add_(0, self.where, flat * (self.sign * 2.0 - 1.0))
        out: npt.NDArray[np.float32] = flat.numpy()
        return out


SKETCH = 4096  # columns that gradients are hashed into: cosines keep to about 1 / sqrt(4096)


def base_gradients(config: RunConfig) -> Callable[[Sequence[Unit]], npt.NDArray[np.float32]]:
    """A function from units to sketched gradients (n, SKETCH) at the public base model of a configuration.

    The adapter is a public one of the configured rank at its start, where the gradient of B is all there is. They are
    hashed whatever their size (`Fold`).
    """

    def gradients(units: Sequence[Unit]) -> npt.NDArray[np.float32]:
        chosen = config.model
        model = VisionLanguageModel.load(chosen.path, device=chosen.device, precision=chosen.precision)
        model.set_reducer(config.reducer)
        model.attach_lora(chosen.lora, generator=np.random.default_rng(0))
        adapter = {name: value.detach().clone() for name, value in model.adapter_parameters().items()}
        ups = [name for name in sorted(adapter) if "lora_B" in name]
        fold = Fold(sum(adapter[name].numel() for name in ups), SKETCH, always=True)
        out = np.zeros((len(units), SKETCH), dtype=np.float32)
        for index, gradient in gradients_of(model, UnitInputs(model, units), range(len(units)), adapter):
            out[index] = fold(gradient[name] for name in ups)
        return out

    return gradients
