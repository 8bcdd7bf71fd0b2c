"""Functions of dpaudit_vqa.yaml: one picture, the question as it is, exact match."""

from typing import Any

from reports.metrics import exact_match


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The picture of a question."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question itself; the model's own prompt template goes around it."""
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match of the one answer."""
    return {"exact_match": exact_match(results[0], doc["answer"])}
