"""The labelling stage: build the judge a configuration names, label the data, write the run folder.

Owns which judge and which engine a name means; asking and resuming is `rubric_data.labelling`.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from rubric_data.agreement import agreement_table
from rubric_data.batch import URL, ResultFiles, remove_requests, write_requests
from rubric_data.config import EMBEDDED, JudgeConfig
from rubric_data.endpoint import FREE, Account, limits_of, open_endpoint, place_of
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_json
from rubric_data.io import load_data, write_judged
from rubric_data.judges import Judge
from rubric_data.labelling import WAITING, Engine, InProcess, Only, Question, cut, label_by, open_questions
from rubric_data.ledger import Ledger, check_folder
from rubric_data.openai_judge import ChatForm, OpenAIJudge
from rubric_data.programmatic import answer_by_code, is_for_judge
from rubric_data.records import JudgedResponse
from rubric_data.split import SPLITS, assign_splits, check_leaks, prompt_groups
from rubric_data.verifiers import VerifierJudge, check_verifiers

logger = logging.getLogger(__name__)
SERVERS = ("openai", "systemone")  # judges that are asked over HTTP
# what a resumed run may change, as no answer depends on it
_FREE = FREE | {"max_masked", "engine", "workers", "ray_address", "batch_results"}


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
    records = _with_splits(load_data(config.data))[: config.limit]
    if config.judge == "verifier" or config.use_verifiers:
        check_verifiers(records)
    only = is_for_judge if config.use_verifiers and config.judge != "verifier" else None
    by_code, batch = None, {}
    with _engine(config, records, only) as engine:
        folder = start_run(config.output, asdict(config), resume=config.resume, free=_FREE)
        with Ledger(config.ledger or folder / "ledger.sqlite") as ledger:
            if only:
                records, by_code = answer_by_code(records, ledger=ledger)
            if config.batch_results:
                remove_requests(folder)  # some of what they ask is answered from here on
            judged, counts = label_by(
                records,
                engine,
                ledger=ledger,
                votes=config.votes,
                max_masked=config.max_masked,
                only=only,
                progress=True,
            )
            spent = engine.spent
            if isinstance(engine, ResultFiles):
                left = open_questions(records, engine, ledger, votes=config.votes, only=only)
                batch = _leave_requests(engine, folder, left)
    report = {
        "judge": engine.name,
        "template": engine.template,
        "data": str(config.data),
        "splits": dict(Counter(record.split or "none" for record in judged)),
        **counts.to_dict(),
        "by_code": by_code and asdict(by_code),
        "spent": None if spent is None else asdict(spent),
        **batch,
    }
    if WAITING not in counts.masked:
        write_judged(folder / "judged.jsonl", judged)
        write_json(folder / "report.json", report)
        if counts.agreement is not None:
            Console().print(agreement_table(counts.agreement))
    return report


@contextmanager
def _engine(config: JudgeConfig, records: Sequence[JudgedResponse], only: Only | None) -> Iterator[Engine]:
    """What carries the questions to the judge, until the block ends. Raises UserError if it cannot be had."""
    if config.batch_results is not None and config.engine != "batch":
        raise UserError("batch_results: only the engine 'batch' reads them; add --engine batch")
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

    Raises UserError if it cannot be had.
    """
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


def _check_server(config: JudgeConfig) -> None:
    if config.judge not in SERVERS:
        raise UserError(f"judge: unknown judge {config.judge!r}; use verifier, local, openai or systemone")
    if config.model == EMBEDDED:
        raise UserError(f"model: the {config.judge} judge needs the model's name at the endpoint; set it")


def _result_files(config: JudgeConfig, records: Sequence[JudgedResponse], only: Only | None) -> ResultFiles:
    if config.judge != "openai":
        raise UserError(f"engine: batch files are for the openai judge, got {config.judge}; set --judge openai")
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
    return ResultFiles(form, paths, asked, limits_of(config))


def _leave_requests(engine: ResultFiles, folder: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Write requests for ``questions``; the batch's part of the report."""
    calls = list(cut(questions, engine.form.most_criteria))
    files = [str(path) for path in write_requests(folder, engine.form, calls)]
    batch = {"batch": {**asdict(engine.ingested), "requests": len(calls), "files": files}}
    if not files:
        return batch
    step = (
        f"send {', '.join(files)} to a batch API ({URL}) unless that is done, fetch its output and error files, and "
        "run the same command with --resume true --batch_results OUTPUT,ERRORS"
    )
    return batch | {"next": step}


def _with_splits(records: list[JudgedResponse]) -> list[JudgedResponse]:
    if not any(record.split for record in records) and len(prompt_groups(records)) < len(SPLITS):
        logger.warning(
            "data: fewer than %d groups of prompts share no text or rubric, so no splits are assigned; "
            "set 'split' on every response before training",
            len(SPLITS),
        )
        return records
    check_leaks(records, shared_rubrics=True)  # before anybody is paid
    return assign_splits(records)
