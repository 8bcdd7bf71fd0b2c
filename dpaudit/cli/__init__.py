"""The command line: one module per command, thin over the Python API. Nothing imports this package."""

from dpaudit.cli.app import main

__all__ = ["main"]
