"""The refinement stage: build the ranker a configuration names, run the rounds, write the run folder.

Owns files, resuming, the table and the plot; what a round does is `rubric_data.refine`.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm.config import REFINE_SETS, RefineConfig
from rm.judging import build_judge
from rubric_data.attaching import attach_rubrics, with_rubrics
from rubric_data.endpoint import FREE, open_endpoint
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, start_run, without, write_json
from rubric_data.generate import PROMPTS, REPORT, VERSIONS, check_shares
from rubric_data.io import write_judged, write_prompts
from rubric_data.judges import Judge, spent_by
from rubric_data.labelling import label
from rubric_data.ledger import FILES, LEDGER, Ledger
from rubric_data.programmatic import answer_by_code, is_for_judge
from rubric_data.proposer import JOURNAL, Proposer
from rubric_data.records import JudgedResponse
from rubric_data.refine import (
    Ranker,
    Round,
    Settings,
    Subject,
    first_subjects,
    replayed,
    run_round,
    summary,
)
from rubric_data.reward import rubric_reward
from rubric_data.spending import read_spent, tallied
from rubric_data.split import names_of
from rubric_data.verifiers import check_verifiers
from rubric_data.versions import Version, read_versions, write_versions

RESPONSES, PLOT = "responses.jsonl", "rounds.png"
# further rounds may follow later; no reply and no verdict depends on the others
_FREE = FREE | {"rounds", "max_failed", "judge.max_masked"} | {f"judge.{name}" for name in FREE}

logger = logging.getLogger(__name__)


def run_refine(config: RefineConfig) -> dict[str, Any]:
    """Refine the rubrics of ``config.data``; write prompts.jsonl, responses.jsonl, versions.jsonl, report.json and
    rounds.png into ``config.output``.

    Returns the report: the numbers of every round, and what was spent. Raises UserError on bad input and on a spent
    budget; report.json then says which rounds are left, --resume true goes on, and no reply or verdict is paid twice.
    """
    settings = _settings(config)
    attached = attach_rubrics(config.data, config.rubrics, limit=config.limit)
    records = attached.records
    check_verifiers(records)
    judge = build_judge(config.judge) if config.ranker == "judge" else None
    endpoint = open_endpoint(config)
    folder = start_run(config.output, without(asdict(config), REFINE_SETS), resume=config.resume, free=_FREE)
    # what a local judge said took long, so that its ledger is worth keeping
    void = {JOURNAL, VERSIONS, REPORT, *(() if config.judge.judge == "local" else FILES)}
    paid = {"proposer": lambda: endpoint.spent, "judge": lambda: spent_by(judge)}
    with _told_if_unfinished(folder), tallied(folder, void=void, **paid) as tally:
        ranker = _ranker(config, judge, folder)
        proposer = Proposer.of(config, endpoint, folder, task="refine")
        rounds, versions, done = _before_rounds(folder, records, ranker, settings, config.rounds)
        for number in range(len(rounds), config.rounds + 1):
            done = run_round(
                number, done.subjects, ranker, proposer, settings, max_failed=config.max_failed, progress=True
            )
            versions += done.versions
            rounds.append(summary(number, done, settings))
            _keep(folder, versions, rounds, config.rounds)
        spent, bill = {name: tally.report(name) for name in paid}, tally.lines()
    final = {subject.prompt_id: subject.rubric for subject in done.subjects}
    prompts = [
        record.model_copy(update={"rubric": final.get(record.prompt_id, record.rubric)}) for record in attached.prompts
    ]
    write_prompts(folder / PROMPTS, prompts)
    write_judged(folder / RESPONSES, with_rubrics(records, final))
    report = {
        "finished": True,
        "proposer": proposer.name,
        "template": proposer.template,
        "ranker": ranker.name,
        "data": str(config.data),
        "own_rubric": attached.own,
        "without_rubric": attached.without,  # prompts, which are left out
        "without_pool": len(prompts) - attached.without - len(done.subjects),
        "rounds": rounds,
        "masked": dict(ranker.masked),  # verdicts, each time that a response was scored
        "spent": spent,
    }
    write_json(folder / REPORT, report)
    plot(folder / PLOT, rounds)
    _tell(rounds, notes(report) + bill)
    return report


def _settings(config: RefineConfig) -> Settings:
    check_shares(max_failed=config.max_failed, tie=config.tie)
    if not 0 < config.top <= 1:
        raise UserError(f"top: must be a share in (0, 1], got {config.top}; correct it")
    for name, value in (("rounds", config.rounds), ("limit", config.limit)):
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}; raise it")
    if (config.ranker == "model") != (config.reward_model is not None):
        raise UserError("reward_model: goes with --ranker model, and with no other; give both or neither")
    if config.ranker == "judge" and config.judge.judge == "verifier" and not config.checks:
        raise UserError(
            "judge.judge: verifier answers criteria with a programmatic check only, and the proposer is not told of "
            "any; add --checks true, or choose another --judge.judge"
        )
    return Settings(config.pool, config.top, names_of(config.generators), config.tie, config.seed)


def _before_rounds(
    folder: Path, records: list[JudgedResponse], rank: Ranker, settings: Settings, wanted: int
) -> tuple[list[dict[str, Any]], list[Version], Round]:
    """Rows, versions and subjects of all that is complete: nothing but the start in a new run."""
    rounds = _kept(folder)["rounds"]
    versions = read_versions(folder / VERSIONS) if rounds else []
    # versions are written first, so those of a round that has no row yet are made again from the journal
    versions = [version for version in versions if version.round < len(rounds)]
    if len(rounds) <= wanted:
        _keep(folder, versions, rounds, wanted)  # a finished run that goes on for more rounds is finished no longer
    subjects = first_subjects(records, rank, settings)
    _check_pools(subjects, settings)
    if rounds:
        return rounds, versions, Round(replayed(subjects, versions, rank))
    versions, rounds = [_given(subject) for subject in subjects], [summary(0, Round(subjects), settings)]
    _keep(folder, versions, rounds, wanted)
    return rounds, versions, Round(subjects)


def _check_pools(subjects: Sequence[Subject], settings: Settings) -> None:
    if not any(len(subject.pool) > 1 for subject in subjects):
        among = f" by {', '.join(sorted(settings.generators))}" if settings.generators else ""
        raise UserError(
            f"pool: no prompt has two scored responses{among} that differ in the pool '{settings.pool}'; "
            "give more responses, another --pool, --top or --generators, or a ranker that can score them"
        )


def _given(subject: Subject) -> Version:
    rubric = subject.rubric
    return Version(prompt_id=subject.prompt_id, id=rubric.id, round=0, accepted=True, proposer="given", rubric=rubric)


def _keep(folder: Path, versions: Sequence[Version], rounds: Sequence[dict[str, Any]], wanted: int) -> None:
    write_versions(folder / VERSIONS, versions)
    left = list(range(len(rounds), wanted + 1))
    write_json(folder / REPORT, {"finished": False, "rounds_left": left, "rounds": rounds})


def _kept(folder: Path) -> dict[str, Any]:
    """What report.json holds so far; a report without rounds if there is none."""
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rounds": []}


@contextmanager
def _told_if_unfinished(folder: Path) -> Iterator[None]:
    """When the block fails or is interrupted, print how far the run has come and what was spent on it."""
    try:
        yield
    except BaseException:
        report = _kept(folder)
        if "rounds_left" in report:
            spent = [f"spent on the {name} so far: {spent}" for name, spent in read_spent(folder).items()]
            _tell(report["rounds"], [*spent, _unfinished(report["rounds_left"])])
        raise


def _unfinished(rounds_left: Sequence[int]) -> str:
    left = f"rounds left: {', '.join(map(str, rounds_left))}" if rounds_left else "no round is left"
    return f"unfinished ({left}), and report.json says so; the same command with --resume true goes on"


# --- rankers ---------------------------------------------------------------------------------------------------------


@dataclass
class JudgeRanker:
    """Rewards from a judge's verdicts, and with ``use_verifiers`` from code's, both of which go into a ledger.

    ``masked`` counts the verdicts it could not give, by kind, each time that a response was scored.
    """

    judge: Judge
    ledger: str | Path
    max_masked: float
    use_verifiers: bool
    masked: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """The judge's."""
        return self.judge.name

    def __call__(self, records: Sequence[JudgedResponse]) -> list[float]:
        """One reward for each record, NaN where no positively weighted verdict came."""
        with Ledger(self.ledger) as ledger:
            if self.use_verifiers:
                records, _ = answer_by_code(records, ledger=ledger)
            labelled, counts = label(
                records,
                self.judge,
                ledger=ledger,
                only=is_for_judge if self.use_verifiers else None,
                max_masked=self.max_masked,
                progress=True,
            )
        self.masked.update(counts.masked)
        return [rubric_reward(record.rubric, record.values()) for record in labelled]


class ModelRanker:
    """Rewards from a trained reward model; a response keeps its place in the cache while rubrics change."""

    def __init__(self, path: str, tokens_per_batch: int) -> None:
        from rm.scorer import RubricScorer  # imports torch

        self.name = f"reward model {path}"
        self.masked: Counter[str] = Counter()
        self._scorer = RubricScorer.from_pretrained(path, tokens_per_batch=tokens_per_batch)

    def __call__(self, records: Sequence[JudgedResponse]) -> list[float]:
        """One reward for each record."""
        if not records:
            return []
        return [scored.reward for scored in self._scorer.score_records(records, progress=True)]


def _ranker(config: RefineConfig, judge: Judge | None, folder: Path) -> JudgeRanker | ModelRanker:
    if judge is None:
        assert config.reward_model is not None  # `_settings` saw to it
        return ModelRanker(config.reward_model, config.tokens_per_batch)
    ledger = config.judge.ledger or folder / LEDGER
    by_code = config.judge.use_verifiers and config.judge.judge != "verifier"
    return JudgeRanker(judge, ledger, config.judge.max_masked, by_code)


# --- what it looks like ----------------------------------------------------------------------------------------------


def _tell(rounds: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    console = Console()
    if rounds:
        console.print(table(rounds))
    for line in lines:
        console.print(Text(line))


def table(rounds: Sequence[dict[str, Any]]) -> Table:
    """One line a round, for the terminal; `gap` is the discrimination between the two best."""
    found = Table(box=box.SIMPLE_HEAD)
    for title in ("round", "ties", "gap", "accepted"):
        found.add_column(title, justify="right", no_wrap=True, min_width=max(len(title), 5))
    found.add_column("refused", no_wrap=True, min_width=16)
    found.add_column("two best mostly by", no_wrap=True)
    for row in rounds:
        cells = (
            str(row["round"]),
            "–" if row["ties"] is None else f"{row['ties']:.0%}",
            "–" if row["discrimination"] is None else f"{row['discrimination']:.3f}",
            f"{row['accepted']} of {row['asked']}" if row["round"] else "",
            "\n".join(f"{count} {kind}" for kind, count in row["refused"].items()),
            _most(row["best"]),
        )
        found.add_row(*map(Text, cells))
    return found


def _most(best: Mapping[str, int]) -> str:
    """Who supplied most of the two best, several at the same count."""
    most = max(best.values(), default=0)
    return f"{most} {', '.join(name for name, count in best.items() if count == most)}" if most else ""


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the table does not tell: prompts that took no part, and those that ran out of responses to show."""
    found = []
    if report["without_rubric"]:
        found.append(f"prompts left out, as they have no rubric to start from: {report['without_rubric']}")
    if report["without_pool"]:
        found.append(f"prompts left out, as their pool has no response with a reward: {report['without_pool']}")
    rounds = report["rounds"][1:]
    if out := [row for row in rounds if row["ran_out"]]:
        when = ", ".join(f"{row['ran_out']} of {row['prompts']} prompts in round {row['round']}" for row in out)
        found.append(
            f"fewer than two responses left to show: {when}. {len(rounds)} rounds want {2 * len(rounds)} different "
            "responses in a prompt's pool: give more responses, raise --top, or ask for fewer --rounds"
        )
    return found


def plot(path: Path, rounds: Sequence[dict[str, Any]]) -> None:
    """Ties and discrimination over the rounds, and what became of the proposals, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    numbers = [row["round"] for row in rounds]
    for axes, key, title in (
        (panels[0], "ties", "share of prompts with a tie at the top"),
        (panels[1], "discrimination", "mean gap between the two best"),
    ):
        heights = [float("nan") if row[key] is None else row[key] for row in rounds]
        axes.plot(numbers, heights, marker="o", markersize=4, clip_on=False, zorder=3)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, max([0.1, *(1.15 * height for height in heights if height == height)]))
    kinds = ["accepted", *sorted({kind for row in rounds for kind in row["refused"]})]
    below = [0] * len(rounds)
    for kind in kinds:
        counts = [row["accepted"] if kind == "accepted" else row["refused"].get(kind, 0) for row in rounds]
        panels[2].bar(numbers[1:], counts[1:], bottom=below[1:], width=0.6, label=kind)
        below = [low + count for low, count in zip(below, counts, strict=True)]
    panels[2].set_title("proposals", fontsize=10)
    panels[2].yaxis.get_major_locator().set_params(integer=True)
    panels[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in panels:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
