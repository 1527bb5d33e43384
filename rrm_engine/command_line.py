"""The parser of every command line: errors of one sentence, a hint where a flag was misspelt, ``--version``."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import rrm_engine
from rrm_engine.legible import legible

ALIKE = 0.75  # of difflib's ratio: below, a hint misleads


def as_called(text: str) -> str:
    """``text`` with its commands named as the user called this one."""
    return text.replace("python -m rrm_engine.", "rrm ") if Path(sys.argv[0]).name in ("rrm", "rrm.exe") else text


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Says the default of every flag that has one, unless its help does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        if "default" in told or action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS, []):
            return told
        default = ",".join(action.default) if isinstance(action.default, list) else action.default
        return f"{told} (default: {str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """As argparse's, without abbreviations. ``extra`` says what one positional argument too many would be."""

    def __init__(self, extra: str = "argument", **options: Any) -> None:
        for name, value in options.items():
            options[name] = as_called(value) if isinstance(value, str) else value
        super().__init__(**{"formatter_class": Formatter, **options}, allow_abbrev=False)
        self.extra = extra
        version = f"rrm-engine {rrm_engine.__version__}"
        self.add_argument("--version", action="version", version=version, help="show the version and exit")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; unknown flags are what is complained about first."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"there is no flag {legible(name, 40)}{self._hint(name)}")
        known, unknown = self.parse_known_args(words, namespace)
        for word in unknown:
            what = "flag" if word.startswith("-") else self.extra
            self.error(f"there is no {what} '{legible(word, 40)}'")
        return known

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one sentence, and exit with 2."""
        message = message.removeprefix("argument ").replace(": takes", " takes", 1)
        self.exit(2, f"error: {message}\nSee {self.prog} --help\n")

    def _hint(self, name: str) -> str:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        longer = [flag for flag in flags if flag.startswith(name) or name.startswith(f"{flag}-")]
        close = longer or difflib.get_close_matches(name[2:], [flag[2:] for flag in flags], n=1, cutoff=ALIKE)
        return f"; did you mean --{close[0].removeprefix('--')}?" if close else ""
