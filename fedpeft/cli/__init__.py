"""The command line; ``main`` is what the program ``fedpeft`` calls."""

from fedpeft.cli.app import main

__all__ = ["main"]
