"""The command line."""

from vitguard.cli.main import main

__all__ = ["main"]
