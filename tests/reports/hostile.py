"""Text that tries to break out of a page."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dpaudit.documents import (
    AuditDocument,
    BenchmarkDocument,
    EnvironmentDocument,
    Gap,
    LedgerDocument,
    LedgerRow,
    TaskAbout,
)
from tests.reports import fixtures

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "\"'><svg onload=document.title='owned'>",
    "{{ 7*7 }} {% for x in y %} $x^2$ \\(a\\) &lt;b&gt; &amp;",
    "אבג \u202egnp.exe \u2066 العربية \u200f",
    "🙂👩‍👩‍👧 " * 10,
    "x" * 10_000,
    "a\x00b\x07c\x1b[31m\x9bd\ufffe\u2028e",
    "--><!-- ]]> <![CDATA[ </style><style>*{display:none}</style>",
)


FEW = (HOSTILE[3], HOSTILE[6], HOSTILE[7])  # each task draws a figure

KEPT = ("png_base64", "config_sha256", "coins_sha256", "sha256", "method")


def tainted(document: Any, index: int = 0) -> Any:
    """The same document with hostile text in every free text field (enumerations and hashes stay)."""
    place = [index]

    def text() -> str:
        place[0] += 1
        return HOSTILE[place[0] % len(HOSTILE)]

    def walk(value: Any, free: bool) -> Any:
        if isinstance(value, BaseModel):
            changed = {}
            for name, field in type(value).model_fields.items():
                open_text = name not in KEPT and "Literal" not in str(field.annotation)
                changed[name] = walk(getattr(value, name), open_text)
            return value.model_copy(update=changed)
        if isinstance(value, dict):
            return {key: walk(item, free) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return tuple(walk(item, free) for item in value)
        return text() if free and isinstance(value, str) else value

    found = type(document).model_validate(walk(document, False).model_dump())
    assert found != document
    return found


def write_hostile_run(parent: Path, name: str) -> Path:
    """A dual-priv run whose every free text is hostile, its name included."""
    run = fixtures.write_run(parent, "dual-priv", name=name)
    release = run / "release"
    played = [tainted(game) for game in fixtures.games("dual-priv")]
    document: AuditDocument = tainted(fixtures.write_audit(run, "dual-priv", played))
    places = [entry.model_copy(update={"name": game.name}) for entry, game in zip(document.games, played, strict=True)]
    (release / "audit.json").write_text(document.model_copy(update={"games": tuple(places)}).to_json())
    environment: EnvironmentDocument = tainted(fixtures.environment("dual-priv"))
    (release / "environment.json").write_text(environment.to_json())
    rows = [LedgerRow(path=text, status="UNACCOUNTED", explanation=text, evidence=text) for text in HOSTILE]
    (release / "ledger.json").write_text(LedgerDocument(coins_sha256=None, rows=tuple(rows), spent=None).to_json())
    document = fixtures.benchmark(0.8)
    metrics = document.tasks["dpaudit_vqa"]
    kinds = {f"exact_match/{text}": metrics["exact_match/digit"] for text in HOSTILE}
    tasks = {HOSTILE[0]: {**metrics, **kinds}}
    # Tasks whose names, measures, prompts and origins come from somebody else's file.
    tasks |= {f"{text[:300]} task": {text: metrics["exact_match"], f"{text}/x": metrics["exact_match"]} for text in FEW}
    numbers = {"max_new_tokens": 12, "batch_size": 1, "questions": 1, "pictures": 1, "limit": None}
    words = ("data", "scored_by", "prompt", "precision", "device", "lmms_eval_version")
    about = {
        f"{text[:300]} task": TaskAbout.model_validate({"headline": text, **dict.fromkeys(words, text), **numbers})
        for text in FEW
    }
    gaps = [
        Gap(task=text, metric=text, grouping=text, best=text, worst=text, value=0.5, low=None, high=None)
        for text in HOSTILE
    ]
    raw = document.model_copy(
        update={
            "tasks": tasks,
            "prompt": HOSTILE[1],
            "sample_sha256": {HOSTILE[0]: "ab"},
            "about": about,
            "gaps": tuple(gaps),
        }
    )
    (release / "benchmark.json").write_text(BenchmarkDocument.model_validate(raw.model_dump()).to_json())
    assert isinstance(AuditDocument.read(release / "audit.json"), AuditDocument)
    return run
