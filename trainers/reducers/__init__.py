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
    "split_by_importance",
    "tome",
    "visionzip",
]


def make_reducer(config: ReducerConfig, *, patches: int, drop_cls: bool) -> Reducer:
    """The reducer of a configuration for an encoder with `patches` patch tokens; raises UsageError on bad sizes."""
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
    return visionzip(config.keep, config.fuse)
