"""What the owner of the data should know of it: merged files, transparency, pictures in both splits, near-duplicates.

Lines for a screen, with counts and names of private pictures, and the facts behind them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpaudit.config import DataConfig
from trainers.data import near
from trainers.data.formats import many
from trainers.records import Facts

if TYPE_CHECKING:
    from trainers.data.local import Split

EXAMPLES = 3  # names of files in a note


def merged(split: "Split") -> Iterator[str]:
    """Pictures that several files hold: they are one, which changes what a record is."""
    same = [names for names in split.names.values() if len(names) > 1]
    if same:
        shown = "; ".join(" = ".join(names[:EXAMPLES]) for names in same[:EXAMPLES])
        more = "; …" if len(same) > EXAMPLES else ""
        count = sum(map(len, same))
        yield f"{split.label}: {count} files show {many(len(same), 'picture')}, each one record now ({shown}{more})"


def on_pixels(split: "Split", config: DataConfig) -> Iterator[str]:
    seen = list(split.pictures.values())
    laid = sum(item.composited for item in seen)
    if laid:
        yield f"{split.label}: {many(laid, 'picture')} with transparency on {config.background} (data.background)"
    blank = sum(item.blank for item in seen)
    if blank:
        yield f"{split.label}: {blank} of them show nothing but one colour on it; choose another data.background"
    partial = sum(item.partial for item in seen)
    if partial:
        yield f"{split.label}: of {partial} files with several frames or pages the first is used (data.frames=first)"


def facts_of(train: "Split", test: "Split") -> Facts:
    """Pictures in both splits, and those that only look alike: counted, so that figures are read with care."""
    shared = set(train.pictures) & set(test.pictures)
    merged_in_train = sum(len(names) > 1 for names in train.names.values())
    one, two = list(train.pictures.items()), list(test.pictures.items())
    if len(one) + len(two) > near.MOST:
        return Facts(len(test.pictures), len(shared), None, None, train.format, test.format, merged_in_train)
    marks = [[item.mark for _, item in part] for part in (one, two)]
    owner = {item: train.root(owner) for owner, contents in train.rows if contents for item in contents}
    alike = near.pairs(marks[0])
    within = {index for pair in alike if owner[one[pair[0]][0]] != owner[one[pair[1]][0]] for index in pair}
    across = {j for i, j in near.pairs(*marks) if one[i][0] != two[j][0] and two[j][0] not in shared}
    return Facts(len(test.pictures), len(shared), len(within), len(across), train.format, test.format, merged_in_train)


def warnings(facts: Facts, train: "Split", test: "Split", unit: str | None) -> Iterator[str]:
    if facts.shared_pictures:
        yield (
            f"{many(facts.shared_pictures, 'picture')} in both train and test (same content): accuracy on them is not "
            "held out"
        )
    units = {train.root(owner) for owner, _ in train.rows} & {test.root(owner) for owner, _ in test.rows}
    if unit and units:
        yield f"{many(len(units), 'unit')} (column {unit!r}) in both train and test"
    if facts.near_train is None:
        yield f"near-duplicates were not looked for: more than {near.MOST} pictures"
    if facts.near_train:
        yield (
            f"{many(facts.near_train, 'picture')} of train like another of train (saved again?): different units, so "
            "whoever is in several is protected less than the claim says; remove them, or give data.unit"
        )
    if facts.near_test:
        yield (
            f"{many(facts.near_test, 'picture')} of test like one of train (saved again?): accuracy on them is not "
            "held out"
        )


def joined(split: "Split") -> Iterator[str]:
    """Units that grew because one row shows several pictures."""
    merged = len({owner for owner in split.links if split.root(owner) != owner})
    if merged:
        largest = max(len(unit.pictures) for unit in split.units("x").values())
        yield (
            f"{split.label}: rows with several pictures make {many(merged, 'picture')} part of another's unit (the "
            f"largest has {many(largest, 'row')})"
        )
