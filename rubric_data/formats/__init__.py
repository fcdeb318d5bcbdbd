"""Other projects' formats by name: how their rows become our records, and back. The registry; each has a module.

Files and commands are `rubric_data.formats.source` and `rubric_data.formats.commands`. Our own format is not here,
it needs no conversion: `rubric_data.io`.
"""

from rubric_data.formats import (
    autorubric,
    chasing_tail,
    healthbench,
    openrubrics,
    preferences,
    rar,
    verifiers,
    wildchecklists,
)
from rubric_data.formats.base import Format

OWN = "rubric-rm"  # our own format
FORMATS: dict[str, Format] = {
    "autorubric": autorubric.FORMAT,
    "chasing-tail": chasing_tail.FORMAT,
    "healthbench": healthbench.FORMAT,
    "openrubrics": openrubrics.FORMAT,
    "preferences": preferences.FORMAT,
    "rar": rar.FORMAT,
    "verifiers": verifiers.FORMAT,
    "wildchecklists": wildchecklists.FORMAT,
}
