"""SARIF 2.1.0, for code scanning: one result for each finding that failed or deserves a look.

GitHub shows a result at a file and a line, so a result points to the document that holds the evidence, a check of a
trainer to its factory's source line. A waived failure is a suppressed result with its reason. The fingerprint
is made of subject, rule and name alone: the same finding keeps its alert from one upload to the next.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from dpaudit import __version__
from reports.formats.findings import RULES, Finding, slug

LEVELS = {"fail": "error", "warn": "warning"}
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(found: Sequence[Finding]) -> str:
    """The JSON text."""
    shown = [finding for finding in found if finding.outcome in LEVELS or finding.waived is not None]
    rules = list(dict.fromkeys(finding.rule for finding in found))
    run = {
        "tool": {
            "driver": {
                "name": "dpaudit",
                "version": __version__,
                "rules": [
                    {
                        "id": rule,
                        "name": "".join(part.capitalize() for part in rule.split("-")),
                        "shortDescription": {"text": RULES[rule]},
                        "properties": {"tags": ["privacy", "differential-privacy"]},
                    }
                    for rule in rules
                ],
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": [
            _result(finding, rules.index(finding.rule), shown[:place].count(finding))
            for place, finding in enumerate(shown)
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=True) + "\n"


def _result(finding: Finding, rule: int, earlier: int) -> dict[str, Any]:
    message = f"{finding.subject}: {finding.name}. {finding.message}"
    if finding.help:
        message += f" {finding.help}"
    key = "\0".join((finding.subject, finding.rule, finding.name, *(["again"] * earlier)))
    waived = {"suppressions": [{"kind": "external", "justification": finding.waived}]} if finding.waived else {}
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule,
        "level": LEVELS.get(finding.outcome, "error"),
        **waived,
        "message": {"text": message},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": quote(finding.place or "dpaudit", safe="/.-_")},
                    "region": {"startLine": finding.line},
                },
                "logicalLocations": [
                    {"name": finding.name, "fullyQualifiedName": f"{slug(finding.subject)}::{slug(finding.name)}"}
                ],
            }
        ],
        "partialFingerprints": {"dpaudit/v1": hashlib.sha256(key.encode()).hexdigest()},
    }
