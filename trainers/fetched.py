"""Models by their name on the hub: from the local cache, or fetched where the user said so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpaudit.errors import EnvironmentFailure, UsageError


def model(source: str, flag: str, wanted: Sequence[str], fetch: bool) -> Path:
    """The folder in the local cache of `owner/name` or `owner/name@revision`.

    wanted: patterns of the files that are fetched. fetch: ask the hub. Raises UsageError (no such model, none in the
    cache) or EnvironmentFailure, one line that begins with `flag`; a token is never part of it.
    """
    name, _, revision = source.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        given: dict[str, Any] = {
            "revision": revision or None,
            "allow_patterns": list(wanted),
            "local_files_only": not fetch,
        }
        return Path(snapshot_download(name, **given))
    except LocalEntryNotFoundError:
        if fetch:
            raise EnvironmentFailure(
                f"{flag}: got {source!r}, which is no folder here and not in the local cache; the hub is out of reach"
            ) from None
        raise UsageError(f"{flag}: got {source!r}, which is not in the local cache; --online fetches it") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UsageError(
            f"{flag}: got {source!r}: the hub has no such model or revision, or it is private: hf auth login, or "
            "HF_TOKEN in the environment, with a token that may read it"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{flag}: got {source!r}, no name of the hub ({_first(error)})") from None
    except Exception as error:  # whatever the network, a proxy or the disk of the cache makes of it
        raise EnvironmentFailure(
            f"{flag}: {source!r} can't be fetched from the hub ({_first(error)}); try again: "
            "files that came whole are kept"
        ) from None


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
