"""The machine and its packages."""

from typing import Literal

from dpaudit.documents.base import Document
from dpaudit.documents.games import Check


class EnvironmentDocument(Document):
    """`release/environment.json`."""

    kind: Literal["environment"] = "environment"
    dpaudit: str
    python: str
    platform: str
    device: str
    packages: dict[str, str]
    command: str | None = None


class DoctorDocument(Document):
    """What `dpaudit doctor --json` prints."""

    kind: Literal["doctor"] = "doctor"
    healthy: bool
    checks: tuple[Check, ...]
