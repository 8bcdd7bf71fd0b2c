"""`dpaudit features`: what a project's folder of encoded pictures holds, and its end."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder that DPAUDIT_FEATURES names, or SWEEP/features.")
    ],
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the encoded pictures; later runs encode them again.")
    ] = False,
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Show how many encoded pictures runs share and how large they are, or delete them with --delete.

    They are computed from private pictures without any noise: protect them as you protect the pictures.
    """
    from dpaudit.documents import FeaturesDocument
    from dpaudit.errors import UsageError
    from trainers import feature_folder

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    held = feature_folder.delete(folder) if delete else feature_folder.parts(folder)
    document = FeaturesDocument(
        folder=str(folder),
        deleted=delete,
        settings=len(held),
        pictures=sum(part.pictures for part in held),
        bytes=sum(part.size for part in held),
    )
    if as_json:
        return console.emit(document)
    what = f"{document.pictures:,} encoded pictures, {document.bytes / 2**20:,.1f} MiB, {document.settings} settings"
    console.say(f"{folder}: {what}{'; removed' if delete else ''}")
