"""The defence stage: find the exploiting rollouts, describe them, try vetoes on history, extend the rubrics.

Owns reading and writing, who answers vetoes, and the numbers of the report. Who exploits is `rubric_data.exploits`,
what tells them apart `rubric_data.traits`, which vetoes are taken `rubric_data.vetoes`. docs/hacks.md has the method.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rm.config import DEFEND_SETS, DefendConfig
from rm.defence_report import (
    EXAMPLES,
    TRAITS_TOLD,
    History,
    Measured,
    Mined,
    cluster_rows,
    half_row,
    of_cluster,
    print_report,
    trait_row,
    veto_row,
    wrongly_loved,
    wrongly_met,
)
from rm.judging import build_judge
from rm.scores import read_scores
from rubric_data.endpoint import FREE, Endpoint, open_endpoint
from rubric_data.errors import UserError
from rubric_data.exploits import Roles, halves, roles
from rubric_data.files import start_run, without, write_json
from rubric_data.generate import PROMPTS, REPORT, VERSIONS, check_shares
from rubric_data.io import load_prompts, read_judged, write_judged, write_prompts
from rubric_data.judges import Judge, reason_kind, spent_by
from rubric_data.labelling import label
from rubric_data.ledger import FILES, LEDGER, Ledger
from rubric_data.lint import lint_rubric
from rubric_data.programmatic import load_verdicts
from rubric_data.proposer import JOURNAL, Proposer, Request, veto_prompt
from rubric_data.records import JudgedResponse, PromptRecord, Rubric, Verdict
from rubric_data.spending import tallied
from rubric_data.traits import cluster, compare, traits_of
from rubric_data.verifiers import check_verifiers, prepare
from rubric_data.versions import Journal, Version, write_versions
from rubric_data.vetoes import TEMPLATE, Limits, Veto, extended, from_traits, refusals

if TYPE_CHECKING:
    from rm.scorer import RubricScorer

JUDGED, SCORES = "judged.jsonl", "scores.jsonl"  # of an RL run, and the first of our own
_HELD_OUT = "test"
_FREE = FREE | {"judge.max_masked"} | {f"judge.{name}" for name in FREE}
_LEAST_UNEXPLAINED = 3  # exploiting rollouts without a cluster that a proposer is asked about
_SHARED_TOLD = 3  # traits that the good have as well
_EXAMPLE = 1500  # characters of prompt and of response that a proposer is shown


def run_defend(config: DefendConfig) -> dict[str, Any]:
    """Mine ``config.runs`` or ``config.data``; write prompts.jsonl, judged.jsonl, versions.jsonl and report.json.

    Returns the report. Raises UserError on bad input, and on a spent budget; --resume true then goes on.
    """
    _check(config)
    records, probs, scorer = _read(config)
    prompts = _latest(records) if config.prompts is None else load_prompts(config.prompts)
    judge = build_judge(config.judge) if config.model and config.answers == "judge" else None
    endpoint = open_endpoint(config) if config.model else None
    mined_from = [place for place, record in enumerate(records) if record.split != _HELD_OUT]
    history = History.of([records[place] for place in mined_from], [probs[place] for place in mined_from])
    if history.table.prompts < 2:
        raise UserError(
            f"{config.data or config.runs}: {history.table.prompts} prompts outside the test split have a rollout with "
            "a reward, and two are needed, one to choose on and one to judge on; judge more"
        )
    folder = start_run(config.output, without(asdict(config), DEFEND_SETS), resume=config.resume, free=_FREE)
    void = {JOURNAL, *(() if config.judge.judge == "local" else FILES)}
    with tallied(
        folder,
        void=void,
        proposer=lambda: None if endpoint is None else endpoint.spent,
        judge=lambda: spent_by(judge),
    ) as tally:
        proposer = _proposer(config, endpoint, folder)
        found = defend(history, config, folder, proposer, judge, scorer)
        spent = {name: tally.report(name) for name in ("proposer", "judge")}
    after = [_extended(record, found.taken) for record in prompts]
    write_prompts(folder / PROMPTS, after)
    write_versions(folder / VERSIONS, _versions(prompts, after, found.report["proposer"]))
    write_judged(folder / JUDGED, found.judged)
    report = {
        "from": config.runs or config.data,
        "held_out": len(records) - len(mined_from),
        "unrewarded": len(mined_from) - len(history.records),
        **found.report,
        "prompts_extended": sum(one.rubric != other.rubric for one, other in zip(prompts, after, strict=True)),
        "spent": spent,
    }
    write_json(folder / REPORT, report)
    print_report(report, folder)
    return report


def _proposer(config: DefendConfig, endpoint: Endpoint | None, folder: Path) -> Proposer | None:
    if config.model is None or endpoint is None:
        return None
    return Proposer(
        config.model,
        endpoint,
        Journal(folder / JOURNAL),
        task="veto",
        mode=config.mode,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        checks=config.checks,
    )


def _check(config: DefendConfig) -> None:
    if (config.runs is None) == (config.data is None):
        raise UserError("runs, data: give the folders of RL runs, or a file of judged responses, and not both")
    if config.runs is not None and (not config.runs or config.scores):
        raise UserError("runs: name at least one folder, which brings its own scores; leave out --scores")
    if config.data is not None and config.scores is None and config.reward_model is None:
        raise UserError("data: needs what the reward model says of it; add --scores FILE or --reward_model FOLDER")
    if config.answers == "model" and config.reward_model is None:
        raise UserError("answers: model needs the model; add --reward_model FOLDER")
    for name in ("top", "fdr", "min_recall"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"{name}: must lie between 0 and 1, got {getattr(config, name)}; correct it")
    check_shares(max_false_alarm=config.max_false_alarm)
    for name in ("min_exploits", "bootstrap"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}; raise it")
    if not np.isfinite(config.excess):
        raise UserError(f"excess: must be a number of standard deviations, got {config.excess}; correct it")
    if config.model and config.answers == "judge" and config.judge.judge == "verifier" and not config.checks:
        raise UserError(
            "judge.judge: verifier answers vetoes with a programmatic check only, and the proposer is not told of any; "
            "add --checks true, another --judge.judge, or --answers model"
        )


def _read(config: DefendConfig) -> "tuple[list[JudgedResponse], list[np.ndarray], RubricScorer | None]":
    """All rollouts with P(met) of their criteria, and the reward model if there is work for it."""
    if config.data is not None:
        records = load_verdicts(config.data)
        scored = None if config.scores is None else read_scores(config.scores, records, with_code=True)
    else:
        records, scored = _read_runs(config.runs or [])
    check_verifiers(records)
    scorer = None
    if config.reward_model is not None and (scored is None or config.answers == "model"):
        from rm.scorer import RubricScorer  # imports torch

        scorer = RubricScorer.from_pretrained(
            config.reward_model, tokens_per_batch=config.tokens_per_batch, use_verifiers=config.use_verifiers
        )
    if scored is None:
        assert scorer is not None  # `_check` saw to it
        scored = [one.probs for one in scorer.score_records(records, progress=True)]
    return records, scored, scorer


def _read_runs(folders: Sequence[str]) -> tuple[list[JudgedResponse], list[np.ndarray]]:
    """The judged rollouts of RL runs; those of several get their folder's name before their ids."""
    records: list[JudgedResponse] = []
    probs: list[np.ndarray] = []
    for folder in folders:
        if not (Path(folder) / JUDGED).is_file():
            raise UserError(f"{folder}: has no {JUDGED}; give the folder of an RL run that asked a judge")
        own = read_judged(Path(folder) / JUDGED)
        probs += read_scores(Path(folder) / SCORES, own, with_code=True)
        prefix = f"{folder}/" if len(folders) > 1 else ""
        records += [record.model_copy(update={"response_id": f"{prefix}{record.response_id}"}) for record in own]
    return records, probs


def _latest(records: Sequence[JudgedResponse]) -> list[PromptRecord]:
    """The prompts of ``records``, each with the rubric of its last one: a later run's may have vetoes already."""
    shared = PromptRecord.model_fields
    found = {record.prompt_id: {key: getattr(record, key) for key in shared} for record in records}
    return [PromptRecord(**fields) for fields in found.values()]


# --- from history to vetoes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The report so far, the vetoes that are taken, and the rollouts under rubrics that have them."""

    report: dict[str, Any]
    taken: list[Veto]
    judged: list[JudgedResponse]


def defend(
    history: History,
    config: DefendConfig,
    folder: Path,
    proposer: Proposer | None = None,
    judge: Judge | None = None,
    scorer: "RubricScorer | None" = None,
) -> Found:
    """Mine ``history`` and decide on vetoes; those without a check are answered by ``judge`` or ``scorer``."""
    gold_B, proxy_B, prompt_B = history.table.reward_B, history.proxy.reward_B, history.table.prompt_B
    role = roles(gold_B, proxy_B, prompt_B, top=config.top, excess=config.excess)
    chosen_B = halves(prompt_B, role.exploiting_B, config.seed)
    sizes = {
        name: half_row(history, role, half_B) for name, half_B in (("chosen_on", chosen_B), ("judged_on", ~chosen_B))
    }
    enough = min(half["exploiting"] for half in sizes.values()) >= config.min_exploits
    mined = _mine(history, role, chosen_B, config) if enough else None
    vetoes: list[Veto] = []
    failures: list[str] = []
    if mined is not None:
        good_R = role.good_B[mined.rows]
        vetoes = from_traits(mined.telling, mined.present, mined.cluster, good_R, config.max_false_alarm)
        if proposer is not None:
            proposed, failures = _proposed(proposer, history, role, mined)
            vetoes = list({veto.id: veto for veto in [*proposed, *vetoes]}.values())
            vetoes.sort(key=lambda veto: veto.source != TEMPLATE)  # of equals, what code found is taken
    answerer = _Answerer(history.records, folder, config.judge.max_masked, judge, scorer)
    value_BV, reasons = _tried(vetoes, answerer, history, role, chosen_B, config)
    places = [place for place, reason in enumerate(reasons) if reason is None]
    taken, taken_BV = [vetoes[place] for place in places], value_BV[:, places]
    measured = Measured(history, role, chosen_B, config)
    report = {
        "rollouts": len(history.records),
        "prompts": history.table.prompts,
        "exploiting": int(role.exploiting_B.sum()),
        "good": int(role.good_B.sum()),
        "halves": sizes,
        "proposer": proposer.name if proposer else TEMPLATE,
        "failed_proposals": dict(Counter(failures)),
        "criteria": wrongly_loved(history, role, config),
        "traits": [trait_row(one) for one in (mined.telling if mined else [])[:TRAITS_TOLD]],
        "clusters": cluster_rows(history, mined) if mined else [],
        "unexplained": sizes["chosen_on"]["exploiting"] - (int((mined.cluster >= 0).sum()) if mined else 0),
        "vetoes": [
            veto_row(veto, reason, answerer.name(veto)) | measured.veto(value_BV[:, place])
            for place, (veto, reason) in enumerate(zip(vetoes, reasons, strict=True))
        ],
        "history": measured.rewards(taken, taken_BV),
        "note": _note(mined, config),
    }
    return Found(report, taken, _judged(history.records, taken, taken_BV, answerer))


def _note(mined: Mined | None, config: DefendConfig) -> str | None:
    """Why nothing was tried, or what tells exploiting rollouts apart but would hit too many of the good."""
    if mined is None:
        return f"fewer than min_exploits = {config.min_exploits} exploiting rollouts in a half: nothing is proposed"
    shared = [one for one in mined.telling if one.good > config.max_false_alarm and one.trait.phrase is None]
    told = ", ".join(f"{one.trait.name} ({one.good:.0%})" for one in shared[:_SHARED_TOLD])
    return f"no veto on what too many good rollouts have, unless max_false_alarm lets it: {told}" if told else None


def _tried(
    vetoes: Sequence[Veto],
    answerer: "_Answerer",
    history: History,
    role: Roles,
    chosen_B: np.ndarray,
    config: DefendConfig,
) -> tuple[np.ndarray, list[str | None]]:
    """Verdicts on the vetoes, (B, V), and why each is not taken. No model is asked of all rollouts if it is not."""
    value_BV = np.full((len(history.records), len(vetoes)), np.nan)
    asked_B = role.exploiting_B | role.good_B
    faults = [_fault(veto, history.records) for veto in vetoes]
    answerer.fill(value_BV, vetoes, [place for place, fault in enumerate(faults) if fault is None], asked_B)
    limits = Limits(config.min_recall, config.max_false_alarm)
    decided = refusals(vetoes, value_BV, role.exploiting_B, role.good_B, chosen_B, limits)
    reasons = [fault or reason for fault, reason in zip(faults, decided, strict=True)]
    coded = [place for place, veto in enumerate(vetoes) if faults[place] is None and veto.verifier is not None]
    taken = [place for place, reason in enumerate(reasons) if reason is None]
    answerer.fill(value_BV, vetoes, sorted({*coded, *taken}), ~asked_B)
    return value_BV, reasons


def _mine(history: History, role: Roles, chosen_B: np.ndarray, config: DefendConfig) -> Mined:
    rows = np.flatnonzero(chosen_B)
    exploiting, good, prompt = role.exploiting_B[rows], role.good_B[rows], history.table.prompt_B[rows]
    traits = traits_of([history.records[row] for row in rows], int(exploiting.sum()))
    telling = [one for one in compare(traits, exploiting, good, prompt) if one.q_value <= config.fdr]
    column = {trait.name: place for place, trait in enumerate(traits.traits)}
    present = traits.present_BF[:, [column[one.trait.name] for one in telling]].toarray().astype(bool)
    # a trait that the good have as well names no exploit
    own = [place for place, one in enumerate(telling) if not one.good > config.max_false_alarm]
    label = np.full(len(rows), -1)
    label[exploiting] = cluster(present[exploiting][:, own])
    return Mined(telling, rows, present, label)


def _proposed(proposer: Proposer, history: History, role: Roles, mined: Mined) -> tuple[list[Veto], list[str]]:
    """Vetoes that a model proposes against each cluster, and against what has no cluster; kinds of failures."""
    good, loved = _examples(history, role.good_B, role.excess_B), wrongly_met(history, role)
    requests: dict[int, Request] = {}
    for number in np.unique(mined.cluster[role.exploiting_B[mined.rows]]).tolist():
        rows = mined.rows[(mined.cluster == number) & role.exploiting_B[mined.rows]]
        members_B = np.isin(np.arange(len(history.records)), rows)
        if number < 0 and members_B.sum() < _LEAST_UNEXPLAINED:
            continue
        names = [one.trait.name for one in of_cluster(mined, number)] if number >= 0 else []
        shown_to = _examples(history, members_B, role.excess_B)
        requests[number] = Request(veto_prompt(shown_to, good, names, loved, proposer.checks), prefix="v")
    proposals = proposer.propose(list(requests.values()), progress="proposing vetoes")
    found, failures = [], []
    for number, proposal in zip(requests, proposals, strict=True):
        for criterion in proposal.rubric.criteria if proposal.rubric else ():
            found.append(Veto(criterion.text, criterion.verifier, proposer.name, number))
        failures += [reason_kind(proposal.failure)] if proposal.failure else []
    return found, failures


def _examples(history: History, chosen_B: np.ndarray, excess_B: np.ndarray) -> list[tuple[str, str]]:
    """Prompt and response of the chosen with the largest excess, different texts, cut to what a prompt has room for."""
    texts: dict[str, tuple[str, str]] = {}
    for place in sorted(np.flatnonzero(chosen_B).tolist(), key=lambda place: (-excess_B[place], place)):
        record = history.records[place]
        texts.setdefault(record.response, (record.prompt[:_EXAMPLE], record.response[:_EXAMPLE]))
    return list(texts.values())[:EXAMPLES]


def _fault(veto: Veto, records: Sequence[JudgedResponse]) -> str | None:
    """Why a veto need not be tried, as "kind: detail"; None if it must be."""
    if all(veto.id in {criterion.id for criterion in record.rubric.criteria} for record in records):
        return "known: every rubric has it"
    if veto.source != TEMPLATE:
        for finding in lint_rubric("", Rubric(criteria=(veto.criterion(),))):
            if finding.severity == "error":
                return f"lint: {finding.rule}: {finding.message}"
    return None


class _Answerer:
    """Verdicts on vetoes: code's where there is a check, else the judge's or the reward model's."""

    def __init__(
        self,
        records: Sequence[JudgedResponse],
        folder: Path,
        max_masked: float,
        judge: Judge | None,
        scorer: "RubricScorer | None",
    ) -> None:
        self._records, self._folder, self._max_masked = records, folder, max_masked
        self._judge, self._scorer = judge, scorer

    def name(self, veto: Veto) -> str:
        """Who answers ``veto``."""
        if veto.verifier is not None:
            return "code"
        return self._judge.name if self._judge is not None else "reward model"

    def fill(self, value_BV: np.ndarray, vetoes: Sequence[Veto], places: Sequence[int], wanted_B: np.ndarray) -> None:
        """Write the verdicts of the ``wanted`` responses on the vetoes at ``places`` into ``value``."""
        rows = np.flatnonzero(wanted_B).tolist()
        asked = [place for place in places if vetoes[place].verifier is None]
        for place in places:
            if vetoes[place].verifier is not None:
                value_BV[rows, place] = [self._by_code(vetoes[place], self._records[row]) for row in rows]
        if asked and rows:
            value_BV[np.array(rows)[:, None], asked] = self._by_model([vetoes[place] for place in asked], rows)

    @staticmethod
    def _by_code(veto: Veto, record: JudgedResponse) -> float:
        verifier = veto.criterion(record.rubric).verifier
        assert verifier is not None
        return float(prepare(verifier)(record.response, record.prompt))

    def _by_model(self, vetoes: Sequence[Veto], rows: Sequence[int]) -> np.ndarray:
        rubric = Rubric(criteria=tuple(veto.criterion() for veto in vetoes))
        asked = [self._records[row].model_copy(update={"rubric": rubric, "verdicts": ()}) for row in rows]
        if self._judge is None:
            assert self._scorer is not None  # `_check` saw to it
            return np.array([one.probs for one in self._scorer.score_records(asked, progress=True)])
        with Ledger(self._folder / LEDGER) as ledger:
            labelled, _ = label(asked, self._judge, ledger=ledger, max_masked=self._max_masked, progress=True)
        return np.array([record.values() for record in labelled])


# --- what is written -------------------------------------------------------------------------------------------------


def _extended(record: PromptRecord, taken: Sequence[Veto]) -> PromptRecord:
    """``record`` under a rubric with the vetoes; one of the test split, or without a rubric, as it is."""
    if record.rubric is None or record.split == _HELD_OUT:
        return record
    return record.model_copy(update={"rubric": extended(record.rubric, taken)})


def _judged(
    records: Sequence[JudgedResponse], taken: Sequence[Veto], value_BV: np.ndarray, answerer: _Answerer
) -> list[JudgedResponse]:
    """The rollouts under their rubrics with the vetoes, and the verdicts that these got."""
    found = []
    for record, value_V in zip(records, value_BV, strict=True):
        there = {criterion.id for criterion in record.rubric.criteria}
        added = tuple(
            Verdict(criterion_id=veto.id, judge=answerer.name(veto), **_value_or_reason(value))
            for veto, value in zip(taken, value_V.tolist(), strict=True)
            if veto.id not in there
        )
        change = {"rubric": extended(record.rubric, taken), "verdicts": (*record.verdicts, *added)}
        found.append(record.model_copy(update=change))
    return found


def _value_or_reason(value: float) -> dict[str, Any]:
    return {"masked": "unanswered: see the ledger"} if np.isnan(value) else {"value": value}


def _versions(before: Sequence[PromptRecord], after: Sequence[PromptRecord], proposer: str) -> list[Version]:
    """For each prompt whose rubric grew: the one it had, and the one made of it."""
    found = []
    for old, new in zip(before, after, strict=True):
        if old.rubric is not None and new.rubric is not None and old.rubric is not new.rubric:
            found += [
                Version(
                    prompt_id=old.prompt_id,
                    id=rubric.id,
                    round=number,
                    parents=(old.rubric.id,) if number else (),
                    accepted=True,
                    proposer=proposer if number else "given",
                    rubric=rubric,
                )
                for number, rubric in enumerate((old.rubric, new.rubric))
            ]
    return found
