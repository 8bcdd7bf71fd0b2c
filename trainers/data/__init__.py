"""Data sets by configuration: the embedded digits, local files, or a set on the hub."""

from dataclasses import replace

from dpaudit.config import DataConfig
from dpaudit.documents import LedgerRow
from dpaudit.errors import rejected
from trainers.records import Dataset

EMBEDDED = "digits"


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, with `data.limit` and `data.reserve` applied.

    Loading is deterministic. Raises UsageError (files, rows, fields) or EnvironmentFailure (hub out of reach).
    """
    if config.path is not None:
        from trainers.data.local import load_local

        dataset = load_local(config)
    elif config.name in (None, EMBEDDED):
        dataset = _embedded(config)
    else:
        from trainers.data.hub import load_hub

        dataset = load_hub(config)
    if len(dataset.train) < 2:
        raise rejected("data.train", f"{len(dataset.train)} units", "at least 2 units")
    more = (*_size_row(config, dataset), *_limit_row(config), *_together_row(dataset), *_shared_row(dataset))
    return replace(dataset, ledger=(*dataset.ledger, *more))


def _embedded(config: DataConfig) -> Dataset:
    for name in ("subset", "train", "test", "train_images", "test_images", "unit", "post_prompt"):
        if getattr(config, name) is not None:
            field = f"data.{name.replace('_', '-')}"
            raise rejected(field, getattr(config, name), "nothing for the embedded digits; data.path for local files")
    if config.reserve:
        raise rejected("data.reserve", config.reserve, "0 for the embedded digits, which have a reserve of their own")
    from trainers.data.digits import load_digits_vqa

    dataset: Dataset = load_digits_vqa()
    return replace(dataset, train=dataset.train[: config.limit], test=dataset.test[: config.limit])


def _size_row(config: DataConfig, dataset: Dataset) -> tuple[LedgerRow, ...]:
    """The one number about the whole training set that training uses: how many units it has."""
    if config.public_size is not None:
        return ()
    return (
        LedgerRow(
            path="size of the training set",
            stage="data size",
            status="accounted",
            explanation="The exact number of training units sets the sampling rate and the expected batch size. It is "
            "made public by declaration: the claim protects what a unit contains, assuming that this number is public. "
            "Someone who knew all but one unit could tell from the number whether one is missing.",
            evidence=f"data.public-size was not given, so the true size {len(dataset.train)} is the declared one; give "
            "data.public-size to keep the true one private.",
        ),
    )


def _limit_row(config: DataConfig) -> tuple[LedgerRow, ...]:
    if config.limit is None:
        return ()
    return (
        LedgerRow(
            path="limit on the training set",
            stage="data size",
            status="per-example preprocessing",
            explanation="Only the first units of the data take part. The claim is about the set after this cut: a unit "
            "removed before it would let the next one in, which is a replacement and not a removal.",
            evidence=f"data.limit: {config.limit}.",
        ),
    )


def _together_row(dataset: Dataset) -> tuple[LedgerRow, ...]:
    """Files that show one picture, and units that look alike: both change what one record is."""
    facts = dataset.facts
    said = []
    if facts is not None and facts.merged:
        said.append("Several files show the same picture, which is one record with all their questions")
    if facts is not None and facts.near_train:
        said.append(
            "Some pictures of different units look alike (one saved again?): whoever is in several units is protected "
            "less than the claim says"
        )
    if facts is not None and facts.near_train is None:
        said.append("Whether pictures of different units look alike was not checked")
    if not said:
        return ()
    return (
        LedgerRow(
            path="records that belong together",
            stage="preprocessing",
            status="accounted",
            explanation=f"{'. '.join(said)}. That this is so is made public by declaration; how many there are stays "
            "with the owner of the data.",
            evidence="pictures compared by their content, and by how they look (docs/data.md).",
        ),
    )


def _shared_row(dataset: Dataset) -> tuple[LedgerRow, ...]:
    """Test pictures that are also in train: what that makes of figures on them, and that it is said."""
    held_out = dataset.facts.held_out if dataset.facts is not None else "yes"
    if held_out == "yes" or held_out.startswith("no picture"):
        return ()
    return (
        LedgerRow(
            path="test pictures in train",
            status="accounted",
            explanation=f"Are figures on the test split held out? {held_out[0].upper()}{held_out[1:]}. That this is "
            "so is made public by declaration, here and beside the accuracy: it says something of who is in train to "
            "whoever knows the test split. How many there are stays with the owner of the data.",
            evidence="pictures compared by their content, and by how they look (docs/data.md).",
        ),
    )
