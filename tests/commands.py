"""The command line, called in this process."""

from __future__ import annotations

from rtk.cli import main


def call(capsys, *arguments):
    """(exit code, standard output, standard error) of one command."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()
