"""Commands of ours as benchmarks give them: in this process, and with it over if one fails. Knows no command."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policy.cli import main


def call(*words: Any) -> None:
    """Run one command. Ends the process with its exit code if it fails."""
    if code := main([str(word) for word in words]):
        sys.exit(code)


def options(settings: Mapping[str, Any]) -> list[str]:
    """``settings`` as a command line has them."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def run(folder: Path, *words: Any) -> None:
    """Run one command that writes ``folder``, or go on with it."""
    call(*words, "--output", folder, *(("--resume", "true") if folder.exists() else ()))
