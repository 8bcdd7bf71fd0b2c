"""`dpaudit keygen`: a key pair to sign releases with."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The private key; the public one becomes FILE.pub.")],
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Make an Ed25519 key pair: the private key FILE (mode 0600, outside of any run) and the public key FILE.pub.

    Publish the fingerprint where readers of your reports can find it: nothing else tells them whose key it is.
    """
    from dpaudit import signing
    from dpaudit.documents import KeyDocument

    made = signing.generate(file)
    document = KeyDocument(private_key=str(file), public_key=f"{file}.pub", key_sha256=made.public.sha256)
    if as_json:
        return console.emit(document)
    console.say(f"{document.private_key}: private, mode 0600; whoever has it signs in your name")
    console.say(f"{document.public_key}: public; its SHA-256 is {document.key_sha256}")
