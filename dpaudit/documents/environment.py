"""The machine and its packages."""

from typing import Literal

from pydantic import Field

from dpaudit.documents.base import Document
from dpaudit.documents.games import Check

GradientPathName = Literal["hooks", "ghost", "micro-batch", "rows", "plain"]


class EnvironmentDocument(Document):
    """`release/environment.json`."""

    kind: Literal["environment"] = "environment"
    dpaudit: str
    python: str
    platform: str
    device: str
    packages: dict[str, str]
    command: str | None = None
    gradient_paths: tuple[GradientPathName, ...] | None = Field(
        default=None,
        max_length=5,
        description="How steps of this training computed their sum of gradients, which `training.gradient-path=auto` "
        "decides by the machine: more than one where it was resumed on another kind of machine, none for method dp-zo. "
        "Null: not recorded (an earlier dpaudit).",
    )


class DoctorDocument(Document):
    """What `dpaudit doctor --json` prints."""

    kind: Literal["doctor"] = "doctor"
    healthy: bool
    checks: tuple[Check, ...]


class FeaturesDocument(Document):
    """What `dpaudit features --json` prints."""

    kind: Literal["features"] = "features"
    folder: str
    deleted: bool = Field(description="Whether what is counted here was removed.")
    settings: int = Field(description="Towers, reducers and other settings that pictures were encoded with.")
    pictures: int = Field(description="Encoded pictures, each once for each settings.")
    bytes: int
