"""JUnit XML, as Jenkins, GitLab and GitHub's test reporters read it: one suite a subject, one case a finding.

A failing finding is a failed case. JUnit knows no warnings, and a passed case would be green: an inconclusive audit, an
unfinished cell, a bound above the claim are skipped cases whose message starts with WARNING. So is what could not be
decided or was waived, without that word. Times are those that a document holds; no time stamps: the same page gives the
same bytes.
"""

from collections.abc import Sequence
from xml.etree import ElementTree

from reports.formats.findings import Finding, counts


def junit(found: Sequence[Finding]) -> str:
    """The XML text."""
    root = ElementTree.Element("testsuites", _numbers(found, name="dpaudit"))
    for subject in dict.fromkeys(finding.subject for finding in found):
        mine = [finding for finding in found if finding.subject == subject]
        suite = ElementTree.SubElement(root, "testsuite", _numbers(mine, name=subject))
        for finding in mine:
            _case(suite, finding)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _numbers(found: Sequence[Finding], *, name: str) -> dict[str, str]:
    number = counts(found)
    return {
        "name": name,
        "tests": str(len(found)),
        "failures": str(number["fail"]),
        "errors": "0",
        "skipped": str(number["skip"] + number["warn"]),
        "time": _seconds(sum(finding.seconds for finding in found)),
    }


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"


def _place(finding: Finding) -> str:
    return f"{finding.place}:{finding.line}" if finding.line > 1 else finding.place


def _case(suite: ElementTree.Element, finding: Finding) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {"classname": f"dpaudit.{finding.rule}", "name": finding.name, "time": _seconds(finding.seconds)},
    )
    if finding.outcome == "fail":
        failure = ElementTree.SubElement(case, "failure", {"message": finding.message, "type": finding.rule})
        failure.text = "\n".join(part for part in (finding.message, finding.help, _place(finding)) if part)
    elif finding.outcome == "skip":
        ElementTree.SubElement(case, "skipped", {"message": finding.message})
    elif finding.outcome == "warn":
        ElementTree.SubElement(case, "skipped", {"message": f"WARNING: {finding.message}"})
