"""Reading files that somebody else may have made: ordinary files of a sensible size, and nothing is ever executed.

A configuration, a document or a score file comes from a colleague, a download or a CI job. A device or a pipe in its
place would be read for ever, a file of gigabytes would fill the memory before its first line is looked at.
"""

import stat
from pathlib import Path

from dpaudit.errors import UsageError

MOST_CONFIGURATION = 1 << 20  # bytes of a YAML file: a long one has ten thousand
MOST_DOCUMENT = 1 << 26  # bytes of a JSON document: the largest of ours, a planted-bug table, has a hundred thousand


def read_bytes(path: Path, most: int) -> bytes:
    """The content of an ordinary file of at most `most` bytes.

    Raises UsageError for anything else that exists, OSError where there is nothing to read. The size is checked again
    while reading, since a file may grow.
    """
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"{path}: is no ordinary file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UsageError(f"{path}: larger than {most >> 20} MB, which no such file is")
    return content
