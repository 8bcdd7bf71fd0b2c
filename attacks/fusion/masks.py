"""What the positions of the kept patches tell by themselves.

A mask is a noiseless, discrete function of the picture: two pictures with different masks are told apart with
certainty, whatever noise lies on the token values. Measured on one-patch neighbours (which a small change of a picture
makes) and on different pictures. Each picture has one neighbour, so the share has an exact binomial interval.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from attacks.fusion.standins import one_patch
from dpaudit.bounds.roc import clopper_pearson_interval
from dpaudit.config import RunConfig
from dpaudit.documents import MaskLeak
from trainers.records import Pixels
from trainers.vlm import VisionLanguageModel

SELECTING = ("visionzip", "cls-topk")  # reducers that keep patches by attention
CELLS = 8  # the grid that a changed patch is one cell of


def masks(model: VisionLanguageModel, pictures: Sequence[Pixels]) -> npt.NDArray[np.bool_]:
    """(n, patches) which patches the model's reducer keeps of pictures of one size."""
    visual = model.visual_tokens(pictures)
    kept = model.reduce(visual).kept.cpu().numpy()
    out = np.zeros((len(pictures), visual.importance.shape[1]), dtype=bool)
    np.put_along_axis(out, kept, True, axis=1)
    return out


def selection_of(config: RunConfig) -> Callable[[Sequence[Pixels]], npt.NDArray[np.bool_]] | None:
    """`masks` under the base model and reducer of a configuration, loaded at the first call; None: selects nothing."""
    if config.reducer.name not in SELECTING:
        return None
    loaded: list[VisionLanguageModel] = []

    def selection(pictures: Sequence[Pixels]) -> npt.NDArray[np.bool_]:
        if not loaded:
            chosen = config.model
            loaded.append(VisionLanguageModel.load(chosen.path, device="cpu", precision=chosen.precision))
            loaded[0].set_reducer(config.reducer)
        return masks(loaded[0], pictures)

    return selection


def mask_leak(model: VisionLanguageModel, pictures: Sequence[Pixels], *, rng: np.random.Generator) -> MaskLeak:
    """Masks of pictures of one size and of their one-patch neighbours."""
    neighbours = [
        one_patch(pixels, row=int(rng.integers(CELLS)), column=int(rng.integers(CELLS)), cells=CELLS)
        for pixels in pictures
    ]
    own, changed = masks(model, pictures), masks(model, neighbours)
    flipped = int((own != changed).any(axis=1).sum())
    low, high = clopper_pearson_interval(flipped, len(pictures), 0.95)
    upper = np.triu_indices(len(pictures), 1)
    apart = (own[:, None] != own[None, :]).sum(axis=2)
    distance = (changed[:, None] != own[None, :]).sum(axis=2)
    right = distance[np.arange(len(pictures)), np.arange(len(pictures))]
    # A tie with another picture counts as a miss: the mask does not say which it was.
    np.fill_diagonal(distance, distance.max() + 1)
    return MaskLeak(
        neighbours=len(pictures),
        flipped=flipped,
        low=low,
        high=high,
        pairs=len(upper[0]),
        different=int((apart[upper] > 0).sum()),
        identified=int((right < distance.min(axis=1)).sum()),
    )
