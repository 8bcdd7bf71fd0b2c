"""`dpaudit verify`: whether a key vouches for a release as it is."""

from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its release/ alone.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The signer's public key, from the signer.")],
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Check release/signature.json against the files, their claim and their verdict, and against a key that you trust.

    Exit code 0: this key signed exactly these files. 1: no signature, one by another key, or files that changed.
    A signature says who vouches for a release, not that its claim is true.
    """
    from dpaudit.printable import field
    from dpaudit.signing import PublicKey
    from reports.inputs import load_runs
    from reports.vouched import verify

    signer = PublicKey.load(key)
    (loaded,) = load_runs([run])
    document = verify(loaded, signer)
    if as_json:
        console.emit(document)
    elif document.valid:
        console.say(f"valid: signed on {document.signed_on} with the key of SHA-256 {document.key_sha256}")
        console.say(f"signer    {field(document.signer or 'no name is stated')} (by their own account)")
        console.say(f"claim     {field(document.claim or '', 900)}")
        console.say(f"verdict   {document.verdict}")
        console.say(f"A signature says who vouches for these files. {console.LIMIT_SENTENCE}")
    else:
        for reason in document.reasons:
            console.say(f"not valid: {field(reason, 600)}")
    console.finish(console.DONE if document.valid else console.REFUTED)
