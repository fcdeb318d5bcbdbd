"""The packaged recipes: one YAML file per job, each runnable. Knows where they are, not what they mean."""

from pathlib import Path

from rubric_data.errors import UserError

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted: 'audit', 'calibrate', ..."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of the packaged recipe ``name``, given with or without '.yaml'. Raises UserError if there is none."""
    path = _FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if path.stem not in recipe_names():
        raise UserError(f"recipe {name!r}: there is none; the packaged recipes are {', '.join(recipe_names())}")
    return path
