"""`dpaudit sign`: vouch for the release of a run."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from dpaudit.cli import console


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its release/ alone.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Your private key, as dpaudit keygen writes it.")],
    name: Annotated[str, typer.Option("--name", help="Your name, for readers; it is signed, but not proven.")] = "",
    as_json: Annotated[bool, console.JSON_OPTION] = False,
) -> None:
    """Sign all files under release/ together with their claim and verdict: writes release/signature.json.

    The verdict is computed again from the recorded games. Files that contradict each other are not signed. Any later
    change of a file (another audit, a benchmark) makes the signature invalid, so sign last. A new signature replaces
    the earlier one.
    """
    import datetime

    from dpaudit.atomic import write_document
    from dpaudit.errors import UsageError, rejected
    from dpaudit.folders import require_plain
    from dpaudit.printable import field
    from dpaudit.runs import RunFolder
    from dpaudit.signing import PrivateKey
    from reports import card
    from reports.inputs import load_runs, release_of
    from reports.vouched import SIGNATURE, sign

    if field(name) != name:
        raise rejected("--name", name, "at most 200 visible characters on one line")
    release = release_of(run)
    if key.resolve().is_relative_to(run.resolve()):
        raise UsageError(f"--key {key}: lies in {run}; keep a private key out of what is handed over")
    signer = PrivateKey.load(key)
    require_plain(release)  # before anything is locked: a linked release/ is somebody else's folder
    folder = RunFolder(release.parent)
    whole = release.name == "release" and folder.private.is_dir()
    with folder.lock() if whole else contextlib.nullcontext():
        (loaded,) = load_runs([run])
        wrong = card.problem(release, loaded)
        if wrong is not None:
            raise UsageError(f"run {loaded.name}: not signed: {wrong}")
        document = sign(loaded, signer, name=name, today=datetime.datetime.now(datetime.UTC).date())
        write_document(release / SIGNATURE, document)
    if as_json:
        return console.emit(document)
    console.say(f"{release / SIGNATURE}: {len(loaded.files)} files, verdict {loaded.verdict or 'not audited'}")
    console.say(f"signed with the key of SHA-256 {signer.public.sha256}")
    console.say(console.LIMIT_SENTENCE)
