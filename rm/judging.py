"""The labelling stage: build the judge a configuration names, label the data, write the run folder.

Owns which judge and which engine a name means; asking and resuming is `rubric_data.labelling`.
"""

import logging
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from rubric_data.agreement import agreement_table
from rubric_data.batch import URL, ResultFiles, write_requests
from rubric_data.config import EMBEDDED, JudgeConfig
from rubric_data.endpoint import FREE, Account, limits_of, open_endpoint, place_of
from rubric_data.errors import UserError
from rubric_data.files import CONFIG_NAME, start_run, write_json
from rubric_data.io import load_data, write_judged
from rubric_data.judges import Judge
from rubric_data.labelling import (
    Engine,
    InProcess,
    Only,
    cut,
    keys_of,
    label_by,
    open_questions,
    unanswered,
)
from rubric_data.ledger import FILES, LEDGER, Ledger, check_folder
from rubric_data.openai_judge import ChatForm, OpenAIJudge
from rubric_data.programmatic import answer_by_code, is_for_judge
from rubric_data.records import JudgedResponse
from rubric_data.spending import tallied
from rubric_data.split import SPLITS, assign_splits, check_leaks, prompt_groups
from rubric_data.verifiers import VerifierJudge, check_verifiers

logger = logging.getLogger(__name__)
RESULTS = "results"  # folder in the run folder where results of a batch are looked for
SERVERS = ("openai", "systemone")  # judges that are asked over HTTP
# what a resumed run may change, as no answer depends on it
_FREE = FREE | {"max_masked", "engine", "workers", "ray_address", "batch_results"}

# options that not everybody reads: what is chosen by another option, and the choices that read them
_READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((*FREE, "base_url"), ("judge", SERVERS)),
    **dict.fromkeys(("mode", "temperature", "max_tokens"), ("judge", ("openai",))),
    "model": ("judge", ("local", *SERVERS)),
    **dict.fromkeys(("workers", "ray_address"), ("engine", ("ray",))),
    "batch_results": ("engine", ("batch",)),
}


def run_judge(config: JudgeConfig) -> dict[str, Any]:
    """Judge the responses of ``config.data``; write judged.jsonl and report.json into ``config.output``.

    Responses without splits get them, unless fewer than three groups of prompts are independent. Criteria
    with a verifier are answered by code, unless ``config.use_verifiers`` is off. Returns the report: judge, template,
    data, responses by split, the judge's counts (`rubric_data.labelling.LabelReport`) and code's (`CodeReport`).
    With several votes, also prints how far they agree. The engine 'batch' leaves requests for what is open, and writes
    the two files once every question had a reply. Raises UserError on bad input.
    """
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit: must be at least 1, got {config.limit}; raise it or leave it out")
    if not 0 <= config.max_masked <= 1:
        raise UserError(f"max_masked: must be a share in [0, 1], got {config.max_masked}; correct it")
    _check_votes(config)
    if config.ledger is not None:
        check_folder(config.ledger)  # before there is a run folder, and before anybody is paid
        if Path(config.ledger).exists():
            Ledger(config.ledger).close()  # whether it is one
    records = load_data(config.data)
    _tell_of_rubrics(records)
    records = _with_splits(config.data, records)[: config.limit]
    if config.judge == "verifier" or config.use_verifiers:
        check_verifiers(records)
    only = is_for_judge if config.use_verifiers and config.judge != "verifier" else None
    by_code = None
    with _engine(config, records, only) as engine:
        folder = start_run(config.output, asdict(config), resume=config.resume, free=_FREE)
        with (
            tallied(folder, void=FILES, judge=lambda: engine.spent) as tally,
            Ledger(config.ledger or folder / LEDGER) as ledger,
        ):
            if only:
                records, by_code = answer_by_code(records, ledger=ledger)
            try:
                judged, counts = label_by(
                    records,
                    engine,
                    ledger=ledger,
                    votes=config.votes,
                    max_masked=config.max_masked,
                    only=only,
                    progress=config.engine != "batch",  # whose answers are there at once, or not at all
                )
            except UserError:
                if isinstance(engine, ResultFiles) and engine.ingested.replies:
                    _leave_requests(engine, folder, ledger)  # those before asked for what is answered now
                raise
            batch = _leave_requests(engine, folder, ledger) if isinstance(engine, ResultFiles) else {}
            spent = tally.report("judge")
    counted = counts.to_dict()
    if waiting := counted.pop("waiting"):
        counted = {"waiting": f"{waiting} of {counts.verdicts} verdicts, for the results of the batch", **counted}
    report = {
        "judge": engine.name,
        "template": engine.template,
        "data": str(config.data),
        "splits": dict(Counter(record.split or "none" for record in judged)),
        **counted,
        "by_code": by_code and asdict(by_code),
        "spent": spent,
        **batch,
    }
    if not counts.waiting:
        write_judged(folder / "judged.jsonl", judged)
        write_json(folder / "report.json", report)
        if counts.agreement is not None:
            Console().print(agreement_table(counts.agreement))
    return report


@contextmanager
def _engine(config: JudgeConfig, records: Sequence[JudgedResponse], only: Only | None) -> Iterator[Engine]:
    """What carries the questions to the judge, until the block ends. Raises UserError if it cannot be had."""
    if config.engine == "ray":
        from rm.ray_engine import ray_judges

        with ray_judges(config) as judges:
            yield judges
    elif config.engine == "batch":
        yield _result_files(config, records, only)
    else:
        yield InProcess(build_judge(config))


def build_judge(config: JudgeConfig, account: Account | None = None) -> Judge:
    """The judge that ``config.judge`` names; a server's calls go on ``account``, None opens one from ``config``.

    Raises UserError if it cannot be had, or if an option is for another.
    """
    _check_options(config)
    if config.judge == "verifier":
        return VerifierJudge()
    if config.judge == "local":
        from rm.local_judge import LocalJudge  # imports torch

        return LocalJudge(config.model)
    _check_server(config)
    endpoint = open_endpoint(config, account)
    if config.judge == "systemone":
        from rubric_data.systemone_judge import SystemOneJudge

        return SystemOneJudge(config.model, endpoint)
    return OpenAIJudge(
        config.model, endpoint, mode=config.mode, temperature=config.temperature, max_tokens=config.max_tokens
    )


def _check_votes(config: JudgeConfig) -> None:
    """Raise UserError on votes of a judge that would say the same every time."""
    if config.votes < 1:
        raise UserError(f"votes: must be at least 1, got {config.votes}; raise it")
    if config.votes == 1:
        return
    if config.judge != "openai":
        raise UserError(f"votes: the {config.judge} judge answers a question the same way every time; leave votes at 1")
    if config.mode == "logprobs":
        raise UserError("votes: mode logprobs tells how likely each answer is in one call; leave votes at 1")
    if config.temperature == 0:
        raise UserError("votes: at temperature 0 every vote is the same; add --temperature 1, or leave votes at 1")


def _check_options(config: JudgeConfig) -> None:
    """Raise UserError at an option that was changed and that nobody will read."""
    for option in fields(config):
        reader, choices = _READ_BY.get(option.name, ("", ()))
        if reader and getattr(config, reader) not in choices and getattr(config, option.name) != option.default:
            raise UserError(
                f"{option.name}: the {getattr(config, reader)} {reader} does not read it; leave it out, or add "
                f"--{reader} {' or '.join(choices)}"
            )


def _check_server(config: JudgeConfig) -> None:
    if config.judge not in SERVERS:
        raise UserError(f"judge: unknown judge {config.judge!r}; use verifier, local, openai or systemone")
    if config.model == EMBEDDED:
        raise UserError(f"model: the {config.judge} judge needs the model's name at the endpoint; set it")


def _result_files(config: JudgeConfig, records: Sequence[JudgedResponse], only: Only | None) -> ResultFiles:
    if config.judge != "openai":
        raise UserError(f"engine: batch files are for the openai judge, got {config.judge}; set --judge openai")
    _check_options(config)
    _check_server(config)
    for budget in ("max_calls", "max_total_tokens", "max_cost"):
        if getattr(config, budget) is not None:
            raise UserError(f"{budget}: a batch is paid where it is sent; leave it out, and bound the run by --limit")
    form = ChatForm(
        config.model,
        place=place_of(config.base_url),
        mode=config.mode,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )
    paths = [Path(name.strip()) for name in (config.batch_results or "").split(",") if name.strip()]
    asked = open_questions(records, form, votes=config.votes, only=only)
    return ResultFiles(form, paths, asked, limits_of(config), Path(config.output))


def _leave_requests(engine: ResultFiles, folder: Path, ledger: Ledger) -> dict[str, Any]:
    """Write requests for what ``ledger`` does not answer; the batch's part of the report."""
    left = unanswered(engine.asked, ledger.get_many(keys_of(engine.asked)))
    calls = list(cut(left, engine.form.most_criteria))
    files = [str(path) for path in write_requests(folder, engine.form, calls)]
    batch = {"batch": {**asdict(engine.ingested), "requests": len(calls), "files": files}}
    if not files:
        return batch
    results = folder / RESULTS
    results.mkdir(exist_ok=True)
    command = ("rubric-rm", "judge", "--config", folder / CONFIG_NAME, "--resume", "true", "--batch_results", results)
    step = (
        f"send {', '.join(files)} to a batch API ({URL}) unless that is done, put its output and error files into "
        f"{results}, and run\n  {shlex.join(map(str, command))}"
    )
    return batch | {"next": step}


def _tell_of_rubrics(records: Sequence[JudgedResponse]) -> None:
    """Warn of prompts with several rubrics: each response can be judged, but later their rewards are compared."""
    rubrics: dict[str, set[str]] = {}
    for record in records:
        rubrics.setdefault(record.prompt_id, set()).add(record.rubric.id)
    mixed = [name for name, found in rubrics.items() if len(found) > 1]
    if mixed:
        logger.warning(
            "data: %d prompt(s) have responses under different rubrics, the first is %r; training and audits compare "
            "the rewards of a prompt, so give all responses of a prompt one rubric",
            len(mixed),
            mixed[0],
        )


def _with_splits(name: str, records: list[JudgedResponse]) -> list[JudgedResponse]:
    """``records`` with splits, where they can have some; where a prompt or two are tried out, nobody misses them."""
    if not any(record.split for record in records) and len(prompt_groups(records)) < len(SPLITS):
        if len(prompt_groups(records, shared_rubrics=True)) >= len(SPLITS):
            logger.warning(
                "data: prompts share their rubrics, so no splits are given; before training, let 'rubric-rm data split "
                "--shared_rubrics true' split judged.jsonl"
            )
        return records
    check_leaks(records, shared_rubrics=True)  # before anybody is paid
    return assign_splits(records, name=name)
