"""Where private data flows, drawn from the ledger: one vertical path from the private records to the release.

Each arrow carries the status of the ledger row behind it, as a line style and in words (never by colour alone). A
private path that is not accounted for and has no arrow of its own goes around the noise, at the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dpaudit.config import RunConfig
from dpaudit.documents import Claim, LedgerRow, Stage
from reports.text import clean, number

WIDTH, BOX_X, BOX_WIDTH, BOX_HEIGHT, TOP = 336, 46, 258, 40, 8
GAP, SHORT_GAP = 34, 18  # an arrow with a status needs room for two lines
STATUS_CLASS = {
    "accounted": "accounted",
    "post-processing": "post",
    "per-example preprocessing": "example",
    "UNACCOUNTED": "unaccounted",
}
_SEVERITY = ("UNACCOUNTED", "accounted", "per-example preprocessing", "post-processing")
# Which arrow stands for a stage; 'other': none. Canaries travel like any record.
_ARROWS: dict[Stage | None, str] = {
    "token reduction": "fusion",
    "fusion noise": "fusion",
    "released tokens": "fusion",
    "gradient pruning": "update",
    "gradients": "gradients",
    "canaries": "gradients",
}


@dataclass(frozen=True)
class Box:
    """A station of the path: a name, what is set there, and the ledger's word on the arrow that leaves it."""

    name: str
    detail: str
    status: str | None  # a ledger status, or None where the ledger has no row and needs none
    private: bool  # True: still depends on private records without protection


def stage_rows(ledger: Sequence[LedgerRow]) -> dict[str, tuple[LedgerRow, ...]]:
    """Ledger rows by stage of the path; 'other' holds the rows that no arrow stands for."""
    stages: dict[str, list[LedgerRow]] = {name: [] for name in ("fusion", "update", "gradients", "other")}
    for row in ledger:
        stages[_ARROWS.get(row.stage, "other")].append(row)
    return {name: tuple(rows) for name, rows in stages.items()}


def worst(rows: Sequence[LedgerRow]) -> str | None:
    """The status that matters most to a reader."""
    found = {row.status for row in rows}
    return next((status for status in _SEVERITY if status in found), None)


def boxes(config: RunConfig | None, claim: Claim | None, ledger: Sequence[LedgerRow]) -> tuple[Box, ...]:
    """The stations of the path for this run."""
    rows = stage_rows(ledger)
    noisy = claim is not None and claim.noise_multiplier is not None
    gradients = worst(rows["gradients"]) or ("missing" if ledger else None)
    fusion = worst(rows["fusion"]) or ("missing" if config is not None and config.reducer.name != "none" else None)
    sampled = f"each drawn with probability q = {number(claim.sample_rate)}" if claim and claim.sample_rate else ""
    clip = number(claim.max_grad_norm if claim else None)
    sigma = number(claim.noise_multiplier if claim else None)
    return (
        Box("Private records", sampled or "all their pictures, questions, answers", None, True),
        Box("Vision tower", "pictures become tokens, one picture at a time", None, True),
        Box("Token reduction", _reducer(config), fusion, True),
        Box("Language model with adapter", "questions answered, loss of one record", None, True),
        Box(
            "Gradient of one record",
            f"clipped to norm C = {clip}" if claim and claim.max_grad_norm else "not clipped",
            gradients,
            True,
        ),
        Box(
            "Sum over the batch",
            f"plus Gaussian noise, std {sigma} × C" if noisy else "no noise is added",
            worst(rows["update"]) or ("post-processing" if noisy else gradients),
            not noisy,
        ),
        Box("Weight update", _pruning(config), "post-processing" if noisy else gradients, not noisy),
        Box("Release", clean(claim.release, 40) if claim else "weights", None, not noisy),
    )


def _reducer(config: RunConfig | None) -> str:
    if config is None:
        return "not stated"
    reducer = config.reducer
    if reducer.name == "none":
        return "none: all tokens are kept"
    kept, merged = ("K" if reducer.keep is None else reducer.keep, "k" if reducer.fuse is None else reducer.fuse)
    fused = f", {merged} fused" if reducer.name == "visionzip" else ""
    noise = {"none": "", "sum": ", noise σC", "mean": ", noise σC/B"}.get(str(reducer.noise))
    noise = f", noise {number(float(reducer.noise))}" if noise is None else noise
    return f"{reducer.name}: {kept} kept{fused}{noise}"


def _pruning(config: RunConfig | None) -> str:
    if config is None:
        return "optimiser step"
    keep = config.pruning.keep
    return "all blocks" if keep >= 1 else f"{number(100 * keep)} % of the blocks, by {config.pruning.by}"


_LABELS = {
    "accounted": ("accounted", "covered by the stated eps"),
    "post-processing": ("post-processing", "works on noisy values only"),
    "per-example preprocessing": ("per-example", "each record on its own"),
    "UNACCOUNTED": ("UNACCOUNTED", "no noise covers this"),
    "missing": ("not in the ledger", "no statement is made"),
}


def diagram(config: RunConfig | None, claim: Claim | None, ledger: Sequence[LedgerRow], *, key: str) -> Markup:
    """The drawing as inline SVG with title and description."""
    path = boxes(config, claim, ledger)
    around = [row for row in stage_rows(ledger)["other"] if row.status == "UNACCOUNTED"]
    tops = _tops(path)
    height = tops[-1] + BOX_HEIGHT + 8
    parts = [
        f'<svg role="img" class="figure diagram" aria-labelledby="{key}-t {key}-d" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}"><title id="{key}-t">Where private data flows</title>'
        f'<desc id="{key}-d">{escape(_description(path, around))}</desc>'
    ]
    middle = BOX_X + BOX_WIDTH // 2
    private = sum(box.private for box in path)
    if private < len(path):
        bottom = tops[private] - GAP / 2
        left = BOX_X - (8 if around else 38)  # clear of the words beside the arrow around
        parts.append(
            f'<path class="boundary" d="M{left} {bottom:g}H{middle - 12}M{middle + 112} {bottom:g}H{WIDTH - 4}"/>'
        )
    for index, box in enumerate(path):
        parts.append(_box(box, tops[index], tops[index + 1] if index + 1 < len(path) else None))
    if around:
        parts.append(_bypass(around, tops))
    return Markup("".join(parts) + "</svg>")


def _tops(path: Sequence[Box]) -> list[int]:
    """Where each box begins."""
    tops = [TOP]
    for box in path[:-1]:
        tops.append(tops[-1] + BOX_HEIGHT + (SHORT_GAP if box.status is None else GAP))
    return tops


def _box(box: Box, y: int, end: int | None) -> str:
    """A station and the arrow to the next one, which begins at `end`."""
    kind = "private" if box.private else "protected"
    x, middle = BOX_X + 12, BOX_X + BOX_WIDTH // 2
    drawn = (
        f'<rect class="box {kind}" x="{BOX_X}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="3"/>'
        f'<text class="name" x="{x}" y="{y + 17}">{escape(box.name)}</text>'
        f'<text class="detail" x="{x}" y="{y + 32}">{escape(box.detail)}</text>'
    )
    if end is None:
        return drawn
    top = y + BOX_HEIGHT
    style = STATUS_CLASS.get(box.status or "", "plain")
    drawn += (
        f'<path class="flow {style}" d="M{middle} {top}V{end - 7}"/>'
        f'<path class="tip {style}" d="M{middle - 5} {end - 8}H{middle + 5}L{middle} {end}Z"/>'
    )
    if box.status is not None:
        label, meaning = _LABELS[box.status]
        drawn += (
            f'<text class="status {style}" x="{middle + 14}" y="{top + 15}">{label}</text>'
            f'<text class="detail" x="{middle + 14}" y="{top + 28}">{meaning}</text>'
        )
    return drawn


def _bypass(rows: Sequence[LedgerRow], tops: Sequence[int]) -> str:
    """One arrow around the noise for all unaccounted paths, named at its side."""
    start, end = tops[0] + BOX_HEIGHT // 2, tops[-1] + BOX_HEIGHT // 2
    x = BOX_X - 26
    names = clean(", ".join(row.path for row in rows), 60)
    return (
        f'<path class="flow unaccounted" d="M{BOX_X} {start}H{x}V{end}H{BOX_X - 8}"/>'
        f'<path class="tip unaccounted" d="M{BOX_X - 8} {end - 5}V{end + 5}L{BOX_X} {end}Z"/>'
        f'<text class="status unaccounted" transform="translate({x - 7} {(start + end) // 2}) rotate(-90)" '
        f'text-anchor="middle">UNACCOUNTED: {escape(names)}</text>'
    )


def _description(path: Sequence[Box], around: Sequence[LedgerRow]) -> str:
    steps = []
    for index, box in enumerate(path[:-1]):
        label = f" ({_LABELS[box.status][0]})" if box.status is not None else ""
        steps.append(f"{box.name}, {box.detail}{label}, to {path[index + 1].name}")
    text = "; ".join(steps) + "."
    if around:
        text += " Around the noise, unaccounted: " + clean(", ".join(row.path for row in around), 200) + "."
    return text
