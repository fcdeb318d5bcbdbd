"""Other predictors beside the audited model: the folders of models and the files of scores that `--others` names.

How far each is from the judge is told by `rm.audit`, as of any predictor.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rm.scores import SUFFIXES, read_any_scores
from rm.sides import Answers
from rubric_data.errors import UserError
from rubric_data.records import JudgedResponse

if TYPE_CHECKING:
    from rm.scorer import RubricScorer


def named(given: Sequence[str], taken: Collection[str]) -> dict[str, Path]:
    """The paths of entries NAME=PATH by their names. Raises UserError on any other entry, or a name that is taken."""
    found: dict[str, Path] = {}
    for entry in given:
        name, _, path = (part.strip() for part in entry.partition("="))
        if not name or not path:
            raise UserError(f"others: {entry!r} is not NAME=PATH; write it as in [plain=runs/plain/model]")
        if name in taken or name in found:
            raise UserError(f"others: the name {name!r} is taken by another predictor; choose a new one")
        found[name] = Path(path)
    return found


def prepare(
    sources: Mapping[str, Path], records: Sequence[JudgedResponse], *, tokens_per_batch: int
) -> dict[str, Callable[[], Answers]]:
    """By name, what gives a predictor's answers on ``records``: a call, for a model is yet to be asked.

    Raises UserError on a path that is neither model nor scores, and on scores that do not fit the records.
    """
    from rm.scorer import RubricScorer  # here, for it brings torch

    ready: dict[str, Callable[[], Answers]] = {}
    for name, path in sources.items():
        if path.suffix in SUFFIXES:
            read = read_any_scores(path, records)
            ready[name] = partial(lambda answers: answers, read)
        elif path.is_file():
            raise UserError(f"{path}: is no file of scores; give a .jsonl or .parquet, or the folder of a model")
        else:
            scorer = RubricScorer.from_pretrained(path, tokens_per_batch=tokens_per_batch, use_verifiers=False)
            ready[name] = partial(_ask, scorer, records)
    return ready


def _ask(scorer: "RubricScorer", records: Sequence[JudgedResponse]) -> Answers:
    return [one.probs for one in scorer.score_records(records, progress=True)]
