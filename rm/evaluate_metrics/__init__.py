"""The audit's numbers as local modules of the evaluate library: `evaluate.load(metric_path("verdict_agreement"))`.

Nothing is fetched to load them. The arithmetic is `rm.metrics`; the modules take lists and return floats, NaN where a
number is undefined, and have no intervals.
"""

from pathlib import Path


def metric_path(name: str) -> str:
    """The folder of the module ``name``, for `evaluate.load`. Raises ValueError if there is none of that name."""
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*/*.py") if path.stem == path.parent.name)
    if name not in names:
        raise ValueError(f"metric {name!r}: no such module; choose one of {', '.join(names)}")
    return str(folder / name)
