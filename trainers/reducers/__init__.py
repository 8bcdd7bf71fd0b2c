"""Visual token reducers: tokens in, fewer tokens out, example by example.

A reducer may look at one example only: `reduce(a ++ b) == reduce(a) ++ reduce(b)` bit for bit. That property is what
keeps token pruning and fusion inside the sensitivity of DP-SGD (each clipped gradient still depends on one unit);
`attacks.fusion` tests it on the real model. The number of tokens that come out is fixed by the configuration: a number
that followed the picture would be a release of its own.
"""

from dpaudit.config import ReducerConfig
from dpaudit.errors import rejected
from trainers.reducers.merging import tome, visionzip
from trainers.reducers.pruning import cls_topk, divprune, keep_all, random_positions
from trainers.reducers.tokens import Reduced, Reducer, VisualTokens, split_by_importance

__all__ = [
    "Reduced",
    "Reducer",
    "VisualTokens",
    "cls_topk",
    "divprune",
    "keep_all",
    "make_reducer",
    "random_positions",
    "sized",
    "split_by_importance",
    "tome",
    "visionzip",
]


# VisionZip's tokens for LLaVA-1.5, which Dual-Priv takes over: 54 dominant and 10 contextual ones of 576 patches.
PATCHES, DOMINANT, CONTEXTUAL = 576, 54, 10


def sized(config: ReducerConfig, patches: int | None) -> ReducerConfig:
    """`config` with K and k as numbers: what it says itself, else 54 and 10 in proportion to `patches` of 576.

    patches None (pictures differ in their number): 54 and 10 for every picture, since K must not follow a picture.
    """

    def share(count: int) -> int:
        return count if patches is None else max(1, round(count * patches / PATCHES))

    keep = share(DOMINANT) if config.keep is None else config.keep
    fuse = share(CONTEXTUAL) if config.fuse is None else config.fuse
    return config.model_copy(update={"keep": keep, "fuse": fuse})


def make_reducer(config: ReducerConfig, *, patches: int, drop_cls: bool) -> Reducer:
    """The reducer of a configuration for an encoder with `patches` patch tokens; raises UsageError on bad sizes."""
    config = sized(config, patches)
    assert config.keep is not None and config.fuse is not None
    if config.name == "none":
        return keep_all(drop_cls=drop_cls)
    if config.keep >= patches:
        raise rejected("reducer.keep", config.keep, f"1 to {patches - 1} (the encoder has {patches} patches)")
    if config.name == "random":
        return random_positions(config.keep)
    if config.name == "cls-topk":
        return cls_topk(config.keep)
    if config.name == "divprune":
        return divprune(config.keep)
    if config.name == "tome":
        return tome(config.keep)
    if config.keep + config.fuse > patches:
        raise rejected("reducer.fuse", config.fuse, f"at most {patches - config.keep} (patches - reducer.keep)")
    return visionzip(config.keep, config.fuse, config.assign)
