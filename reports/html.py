"""One self-contained HTML page over runs, sweeps and bare documents.

No external request, no inline style attribute, and one short script that only sorts tables: the page's own CSP allows
that script and the style sheet by their hashes and pictures from data: addresses, nothing else. Without JavaScript
nothing is missing but the sorting. The same files give the same bytes.
"""

import base64
import binascii
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpaudit import __version__
from dpaudit.documents import ABOUT, Thumbnail
from dpaudit.errors import UsageError
from reports import allowed, figures, games, prose, text, utility
from reports.checklist import checklist
from reports.diagram import boxes
from reports.drawings import MOST_GAMES, Drawings, draw
from reports.embedded import Change, embed
from reports.evidence import factor
from reports.glance import Glance, glances
from reports.inputs import RunReport
from reports.meaning import Meaning, meanings
from reports.plot import shared_frames
from reports.subjects import Page

TEMPLATES = Path(__file__).parent / "templates"
SIZE_LIMIT = 500_000  # bytes; contract: a page that mail systems and reviewers accept
PICTURE_PIXELS = 1 << 20
PICTURE_BYTES = 12_000
STRIP_BYTES = 60_000
SIZE_WANTED = 400_000  # bytes up to which details stay; a page whose least is larger may still be up to the limit
CONTENTS = (
    ("glance", "At a glance"),
    ("meaning", "What an attacker could tell"),
    ("limits", "Limits"),
    ("audit", "What the audit found"),
    ("claims", "What is claimed"),
    ("utility", "What privacy cost in accuracy"),
    ("frontier", "Privacy against accuracy"),
    ("ledger", "Where private data is touched"),
    ("checklist", "An evaluator's checklist"),
    ("curves", "Training curves"),
    ("gallery", "Canaries"),
    ("environment", "Environment and reproduction"),
)


@dataclass(frozen=True)
class Detail:
    """How much of a page is written; less of it when many runs would make it too large.

    cells: configurations of sweeps whose claim and ledger are described. games: score figures per run, the one
    that says most first. informative: also tests that decide nothing, and configurations in full.
    """

    scores_embedded: bool = True
    documents_embedded: bool = True
    pictures: int = 24
    table_points: int = 40
    games: int = MOST_GAMES
    histograms: bool = True
    cells: int = 12
    informative: bool = True

    @property
    def left_out(self) -> tuple[str, ...]:
        if not self.documents_embedded:
            small = ["everything but the summary of each run", "cases of the token path that don't apply"]
            small += ["histograms"] if not self.histograms else []
            small += ["tests that decide nothing"] if not self.informative else []
            return (", ".join(small) + ", to keep the page small",)
        notes = ["the pictures of canaries"]
        return (
            (*notes, "histograms and ROC points, to keep the page small") if not self.scores_embedded else tuple(notes)
        )


DETAILS = (
    Detail(),
    Detail(scores_embedded=False, pictures=12, table_points=20, games=2),
    Detail(scores_embedded=False, pictures=3, table_points=10, games=1, cells=6),
    Detail(scores_embedded=False, pictures=0, table_points=5, games=1, cells=3),
    Detail(scores_embedded=False, documents_embedded=False, pictures=0, table_points=3, games=1, cells=1),
    Detail(False, False, pictures=0, table_points=0, games=1, histograms=False, cells=1),
    # the figures of the game that decides always stay
    Detail(False, False, pictures=0, table_points=0, games=1, histograms=False, cells=1, informative=False),
)


def render(
    page: Page, *, title: str, show_examples: bool = False, changes: Sequence[Change] | None = None, against: str = ""
) -> tuple[str, Detail]:
    """The page as text, with as much detail as fits into `SIZE_WANTED`; UsageError if the least is over `SIZE_LIMIT`.

    The documents are left out only where they would go beyond `SIZE_LIMIT`.

    changes: what is different from the page called `against`; None when no comparison was asked for.
    """
    size = 0
    tables = utility.tables(page.runs)
    drawn = draw(page, tables)
    first = glances(page.runs, tables[0] if tables else None)
    meant = meanings(page.runs)
    for detail in DETAILS:
        made = _render(
            page,
            tables,
            drawn,
            first,
            meant,
            title=text.clean(title, 160),
            show_examples=show_examples,
            detail=detail,
            changes=changes,
            against=text.clean(against, 80),
        )
        size = len(made.encode())
        if size < (SIZE_LIMIT if detail is DETAILS[-1] else SIZE_WANTED):
            return made, detail
    raise UsageError(
        f"SUBJECT: what was given makes a page of {text.file_size(size)}; accepted: under "
        f"{text.file_size(SIZE_LIMIT)}, so give less"
    )


def _render(
    page: Page,
    tables: Sequence[utility.TaskTable],
    drawn: Drawings,
    first: Sequence[Glance],
    meant: Sequence[Meaning],
    *,
    title: str,
    show_examples: bool,
    detail: Detail,
    changes: Sequence[Change] | None,
    against: str,
) -> str:
    described, silent = _described(page, detail.cells)
    contents = [(anchor, title) for anchor, title in CONTENTS if anchor not in _absent(page)]
    style = re.sub(r"\s*([{};])\s*", r"\1", (TEMPLATES / "style.css").read_text(encoding="utf-8"))
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return shared_frames(
        environment()
        .get_template("report.html.j2")
        .render(
            version=__version__,
            title=title,
            policy=Markup(policy),  # made here from base64 digests; quotes must stay quotes inside the attribute
            style=Markup(style),
            script=Markup(script),
            limit_sentence=prose.LIMIT,
            contents=contents,
            number_of={anchor: place for place, (anchor, _) in enumerate(contents, 1)},
            page=page,
            runs=page.runs,
            described=described,
            silent=silent,
            changes=changes,
            against=against,
            glances=first,
            meanings=meant,
            fprs=allowed.FPRS,
            claim_groups=_claim_groups(described),
            ledger_groups=_ledger_groups(described),
            checklist=[(group, list(lines)) for group, lines in groupby(checklist(described), lambda line: line.group)],
            key_ranges=_key_ranges,
            ceiling_note=prose.ceiling_note,
            power=prose.power,
            about=ABOUT,
            game_rows=games.game_rows,
            test_groups=games.test_groups,
            score_summaries=games.score_summaries,
            factor=factor,
            log_threshold=games.log_threshold,
            picture=lambda encoded: _picture(encoded, STRIP_BYTES),
            limits=[*prose.limits(described), *prose.sweep_limits(page.sweeps)],
            figures=drawn,
            detail=detail,
            tables=tables,
            measured=utility.measured(described),
            gap_rows=_gap_rows(page.runs),
            question_count=_question_count,
            galleries=_galleries(page.runs, detail.pictures),
            environments=_environments(described),
            show_examples=show_examples,
            command=_command(page, title=title, show_examples=show_examples, against=against),
            base_mark=figures.BASE_MARK,
            embedded=embed(page, scores=detail.scores_embedded, documents=detail.documents_embedded, changes=changes),
            left_out=", without " + " and ".join(detail.left_out),
        )
    )


def _source(content: str) -> str:
    """The CSP source of an inline element: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The template environment: everything is escaped, an unknown name is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        number=text.number,
        percent=text.percent,
        confidence=text.confidence,
        p_value=text.p_value,
        clean=text.clean,
        clean_lines=lambda value: "\n".join(
            line[: len(line) - len(line.lstrip(" "))] + text.clean(line, 400) for line in str(value).split("\n")
        ),
        plural=text.plural,
        file_size=text.file_size,
        points=text.points,
        signed=text.signed,
        meaning=utility.meaning,
    )
    return env


def _described(page: Page, cells: int) -> tuple[tuple[RunReport, ...], int]:
    """Runs whose claim and ledger are written out, and how many configurations of sweeps are not.

    When not all configurations have room, the first of each method come first.
    """
    own = [run for run in page.described if run.cell_of is not None]
    firsts = {(run.cell_of, run.method): run.key for run in reversed(own)}
    wanted = sorted(own, key=lambda run: run.key != firsts[run.cell_of, run.method])[:cells]
    kept = {run.key for run in wanted}
    return tuple(run for run in page.described if run.cell_of is None or run.key in kept), len(own) - len(wanted)


def _claim_groups(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Runs that make word for word the same statement share it: readers compare what differs."""
    groups: list[dict[str, Any]] = []
    for run in runs:
        paragraphs, open_items = prose.claim_paragraphs(run), prose.not_covered(run)
        curve = run.claim.curve if run.claim is not None else ()
        said = (paragraphs, open_items, curve)
        same = next((g for g in groups if (g["paragraphs"], g["open_items"], g["curve"]) == said), None)
        if same is None:
            groups.append({"runs": [run], "paragraphs": paragraphs, "open_items": open_items, "curve": curve})
        else:
            same["runs"].append(run)
    return groups


def _ledger_groups(runs: Sequence[RunReport]) -> list[list[RunReport]]:
    """Runs by ledger: those that say word for word the same share it, and configurations of a sweep that go the same
    path share a drawing."""
    groups: dict[tuple[object, ...], list[RunReport]] = {}
    for run in runs:
        path: tuple[object, ...] = tuple((row.path, row.status) for row in run.ledger)
        if run.cell_of is None:
            path = (run.ledger, run.ledger_document.spent if run.ledger_document is not None else None)
            path = (*path, boxes(run.config, run.claim, run.ledger))
        groups.setdefault((run.cell_of, run.method, path), []).append(run)
    return list(groups.values())


def _absent(page: Page) -> set[str]:
    """Sections that would be empty."""
    absent = set() if any(run.curves for run in page.runs) else {"curves"}
    return absent if any(run.gallery for run in page.runs) else absent | {"gallery"}


def _command(page: Page, *, title: str, show_examples: bool, against: str) -> str:
    """The command that writes this page again, in the folder that holds the subjects."""
    subjects = [run.typed for run in page.runs] + [sweep.typed for sweep in page.sweeps]
    subjects += [check.typed for check in page.checks] + [bugs.typed for bugs in page.bugs]
    words = ["dpaudit", "report", *subjects, "--title", title]
    words += ["--include-private"] if any(run.curves for run in page.runs) else []
    words += ["--show-examples"] if show_examples else []
    words += ["--against", against] if against else []
    return shlex.join([*words, "-o", "report.html"])


def _key_ranges(keys: Sequence[str], runs: Sequence[RunReport]) -> list[str]:
    """Letters of runs, three and more that follow each other on the page as one range: A–D, F."""
    order = [run.key for run in runs]
    places = [order.index(key) for key in keys]
    ranges: list[list[int]] = []
    for place in places:
        if ranges and place == ranges[-1][-1] + 1:
            ranges[-1].append(place)
        else:
            ranges.append([place])
    shown = []
    for found in ranges:
        ends = [order[found[0]], order[found[-1]]]
        shown += [f"{ends[0]}–{ends[1]}"] if len(found) > 2 else [order[place] for place in found]
    return shown


def _gap_rows(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Gaps between subgroups of each run, beside the non-private run's between the same two groups."""
    plain = next((run for run in runs if run.method == "non-private" and run.benchmark is not None), None)
    rows = []
    for run in runs:
        for gap in utility.gaps(run.benchmark):
            other = plain.benchmark if plain is not None and plain is not run else None
            assert run.benchmark is not None
            same = other is not None and other.sample_sha256.get(gap.task) == run.benchmark.sample_sha256.get(gap.task)
            rows.append({"run": run, "gap": gap, "plain": utility.same_gap(gap, other) if same else None})
    return rows


def _question_count(table: utility.TaskTable, metric: str) -> str:
    counts = {column.metrics[metric].n for column in table.columns if metric in column.metrics}
    return " / ".join(f"{count:,}" for count in sorted(counts)) or "–"


def _environments(runs: Sequence[RunReport]) -> list[list[RunReport]]:
    """Runs by equal software and machine."""
    groups: dict[str, list[RunReport]] = {}
    for run in runs:
        environment = run.environment
        same = environment.model_copy(update={"command": None}).to_json() if environment is not None else ""
        groups.setdefault(same, []).append(run)
    return list(groups.values())


def _galleries(runs: Sequence[RunReport], limit: int) -> list[tuple[list[RunReport], list[dict[str, Any]], int]]:
    """Canary pictures by runs that share them: runs of one seed have the same candidates."""
    shared: dict[tuple[Thumbnail, ...], list[RunReport]] = {}
    for run in runs:
        if run.gallery:
            shared.setdefault(run.gallery, []).append(run)
    found = []
    for gallery, owners in shared.items():
        shown = [{**item.model_dump(), "source": _picture(item.png_base64)} for item in gallery[:limit]]
        found.append((owners, shown, len(gallery) - len(shown)))
    return found


def _picture(encoded: str | None, limit: int = PICTURE_BYTES) -> str | None:
    """A data: address for a PNG of at most `limit` bytes and PICTURE_PIXELS; None when the bytes are anything else.

    A solid picture of 9000 x 9000 has a hundred kilobytes as PNG and takes 300 megabytes of whoever reads the page.
    """
    try:
        data = base64.b64decode(encoded or "", validate=True)
    except (binascii.Error, ValueError):
        return None
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) > limit:
        return None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # of the first chunk, the header
    if data[12:16] != b"IHDR" or not 0 < width * height <= PICTURE_PIXELS:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
