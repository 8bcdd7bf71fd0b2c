"""Subgroups of questions: by question kind, by kind of answer, by group of units."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

QUESTION, ANSWER, UNIT = "question kind", "answer kind", "unit group"
MOST_GROUPS = 40  # of one grouping, the largest; more are no table
FEWEST_PICTURES = 5  # of a group whose gap is worth stating
# Columns of public VQA sets that say of what kind a question is, in the order in which they are tried.
QUESTION_COLUMNS = ("kind", "question_type", "content_type", "category", "subject")
UNIT_COLUMNS = ("group", "modality")
NUMBERS = frozenset(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
)


def key(metric: str, grouping: str, group: str) -> str:
    """The name of a subgroup's metric in `benchmark.json`."""
    return f"{metric}/{group}" if grouping == QUESTION else f"{metric}/{grouping}: {group}"


def of(metric: str, grouping: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one grouping by group, from all metrics of a task."""
    found = {}
    others = tuple(f"{metric}/{other}: " for other in (ANSWER, UNIT))
    prefix = f"{metric}/" if grouping == QUESTION else f"{metric}/{grouping}: "
    for name, value in metrics.items():
        if name.startswith(prefix) and (grouping != QUESTION or not name.startswith(others)):
            found[name.removeprefix(prefix)] = value
    return found


def groupings(docs: Sequence[Mapping[str, Any]], targets: Sequence[str | None]) -> dict[str, list[str | None]]:
    """For each grouping, the group of every question; None: in no group. Groupings with fewer than two are left out."""
    found = {
        QUESTION: _column(docs, QUESTION_COLUMNS),
        ANSWER: [_answer_kind(doc, target) for doc, target in zip(docs, targets, strict=True)],
        UNIT: _column(docs, UNIT_COLUMNS),
    }
    kept = {}
    for grouping, groups in found.items():
        counts = Counter(group for group in groups if group is not None)
        largest = {name for name, _ in counts.most_common(MOST_GROUPS)}
        # A kind that holds every question is still named: the contract of exact_match/KIND.
        if len(largest) > 1 or (grouping == QUESTION and largest and "kind" in docs[0]):
            kept[grouping] = [group if group in largest else None for group in groups]
    return kept


def _column(docs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str | None]:
    """The first of these columns that holds text, as short labels."""
    for name in names:
        values = [doc.get(name) for doc in docs]
        if any(isinstance(value, str) and value.strip() for value in values):
            return [" ".join(v.split())[:80] if isinstance(v, str) and v.strip() else None for v in values]
    return [None] * len(docs)


def target(doc: Mapping[str, Any]) -> str | None:
    """The answer that stands for a question: `answer`, or the most common of its annotators' `answers`."""
    answers = doc.get("answers")
    if isinstance(answers, Sequence) and not isinstance(answers, str) and len(answers):
        texts = [str(item.get("answer")) if isinstance(item, Mapping) else str(item) for item in answers]
        counts = Counter(texts)
        return min(counts, key=lambda text: (-counts[text], text))
    answer = doc.get("answer")
    return answer if isinstance(answer, str) else None


def _answer_kind(doc: Mapping[str, Any], answer: str | None) -> str | None:
    """The set's own word (open, closed, …) or, as in VQA v2: yes/no, number, other."""
    stated = doc.get("answer_type")
    if isinstance(stated, str) and stated.strip():
        return stated.strip().lower()[:80]
    if answer is None:
        return None
    plain = answer.strip().casefold().rstrip(".")
    if plain in ("yes", "no"):
        return "yes/no"
    if plain in NUMBERS or plain.replace(",", "").replace(".", "", 1).removeprefix("-").isdigit():
        return "number"
    return "other"
