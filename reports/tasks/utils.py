"""Functions of dpaudit's own tasks: one picture, the question as it is, and how answers are counted."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from reports.metrics import exact_match, token_f1, words, yes_no

Result = dict[str, Any]
ANNOTATORS = 10  # of VQA v2, TextVQA, VizWiz and OK-VQA


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The pictures of a question."""
    return [item.convert("RGB") for item in (doc["image"], *(doc.get("beside") or ()))]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question itself; the model's own prompt template goes around it."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match of the answer. With a list of accepted answers: of ten annotators, VQA's min(1, agreeing / 3); of any
    other number, 1 where one of them is met."""
    accepted = json.loads(doc["answers"]) if doc.get("answers") else [doc["answer"]]
    agreeing = sum(exact_match(results[0], answer) for answer in accepted)
    return {"exact_match": min(1.0, agreeing / (3 if len(accepted) == ANNOTATORS else 1))}


# -- open and closed questions ---------------------------------------------------------------------------------------


def open_closed(doc: dict[str, Any], results: list[str]) -> Result:
    """Equal words (no case, punctuation or articles) and token F1, with the question's kind for the aggregates."""
    right = float(words(results[0]) == words(doc["answer"]))
    overlap = token_f1(results[0], doc["answer"])
    part = {"closed": _closed(doc), "right": right, "overlap": overlap}
    return {
        "exact_match": right,
        "token_f1": overlap,
        "closed_accuracy": part,
        "open_accuracy": part,
        "open_token_f1": part,
    }


def _closed(doc: dict[str, Any]) -> bool:
    stated = str(doc.get("answer_type") or "").strip().casefold()
    if stated in ("open", "closed"):
        return stated == "closed"
    return words(doc["answer"]) in ("yes", "no")


def closed_accuracy(results: Sequence[Result]) -> float:
    """Share of closed questions answered right; NaN without one."""
    return _mean(part["right"] for part in results if part["closed"])


def open_accuracy(results: Sequence[Result]) -> float:
    """Share of open questions answered word for word; NaN without one."""
    return _mean(part["right"] for part in results if not part["closed"])


def open_token_f1(results: Sequence[Result]) -> float:
    """Mean token F1 of open questions; NaN without one."""
    return _mean(part["overlap"] for part in results if not part["closed"])


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


# -- yes or no -------------------------------------------------------------------------------------------------------


def yes_no_results(doc: dict[str, Any], results: list[str]) -> Result:
    """The first word of the answer decides; an answer that is neither yes nor no is wrong, and neither of them."""
    said, wanted = yes_no(results[0]), yes_no(doc["answer"])
    pair = {"said": said, "wanted": wanted}
    return {
        "accuracy": float(said == wanted),
        "precision": pair,
        "recall": pair,
        "f1": pair,
        "yes_rate": float(said == "yes"),
        "unreadable_rate": float(said is None),
    }


def precision(results: Sequence[Result]) -> float:
    """Of the answers 'yes', the share that is right; NaN without one."""
    return _mean(float(pair["wanted"] == "yes") for pair in results if pair["said"] == "yes")


def recall(results: Sequence[Result]) -> float:
    """Of the questions whose answer is yes, the share answered 'yes'; NaN without one."""
    return _mean(float(pair["said"] == "yes") for pair in results if pair["wanted"] == "yes")


def f1(results: Sequence[Result]) -> float:
    """2 TP / (2 TP + FP + FN); NaN where neither a question nor an answer is yes."""
    both = sum(pair["said"] == pair["wanted"] == "yes" for pair in results)
    either = sum((pair["said"] == "yes") + (pair["wanted"] == "yes") for pair in results)
    return 2 * both / either if either else math.nan
