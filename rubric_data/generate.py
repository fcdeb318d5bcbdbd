"""Initial rubrics: one proposal for every prompt, from the prompt alone, and the files of such a run.

The proposer is `rubric_data.proposer`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rubric_data.config import GenerateConfig
from rubric_data.endpoint import FREE, open_endpoint
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_json
from rubric_data.io import load_prompts, write_prompts
from rubric_data.judges import reason_kind
from rubric_data.lint import lint_prompts
from rubric_data.proposer import JOURNAL, Proposal, Proposer, Request, generate_prompt
from rubric_data.records import PromptRecord
from rubric_data.spending import tallied
from rubric_data.versions import Version, write_versions

VERSIONS, PROMPTS, REPORT = "versions.jsonl", "prompts.jsonl", "report.json"


def run_generate(config: GenerateConfig) -> dict[str, Any]:
    """Propose a rubric for every prompt of ``config.data``; write prompts.jsonl, versions.jsonl and report.json.

    A prompt whose proposal fails keeps the rubric it came with, if any, and the reason is in versions.jsonl. Returns
    the report. Raises UserError on bad input, on a spent budget, and when too many proposals fail.
    """
    check_shares(max_failed=config.max_failed)
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit: must be at least 1, got {config.limit}; raise it or leave it out")
    prompts = load_prompts(config.data)[: config.limit]
    endpoint = open_endpoint(config)
    folder = start_run(config.output, asdict(config), resume=config.resume, free=FREE | {"max_failed", "retry"})
    with tallied(folder, void={JOURNAL}, proposer=lambda: endpoint.spent) as tally:
        proposer = Proposer.of(config, endpoint, folder, task="generate", retry=config.retry)
        requests = [Request(generate_prompt(record.prompt, proposer.checks)) for record in prompts]
        proposals = proposer.propose(requests, max_failed=config.max_failed, progress="writing rubrics")
        spent = tally.report("proposer")
    rubrics = [
        record if proposal.rubric is None else record.model_copy(update={"rubric": proposal.rubric})
        for record, proposal in zip(prompts, proposals, strict=True)
    ]
    report = {
        "proposer": proposer.name,
        "template": proposer.template,
        "data": str(config.data),
        **_counts(prompts, proposals),
        "findings": dict(Counter(finding.rule for finding in lint_prompts(rubrics))),
        "spent": spent,
    }
    _write(folder, rubrics, _versions(prompts, proposals, proposer), report)
    return report


def check_shares(**shares: float) -> None:
    """Raise UserError if one of ``shares`` is not in [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}: must be a share in [0, 1], got {value}; correct it")


def _counts(prompts: Sequence[PromptRecord], proposals: Sequence[Proposal]) -> dict[str, Any]:
    failed = [record for record, proposal in zip(prompts, proposals, strict=True) if proposal.failure]
    kinds = Counter(reason_kind(proposal.failure) for proposal in proposals if proposal.failure)
    return {
        "prompts": len(prompts),
        "proposed": len(prompts) - len(failed),
        "reused": sum(proposal.reused for proposal in proposals),
        "failed": dict(sorted(kinds.items())),
        "kept_rubric": sum(record.rubric is not None for record in failed),
        "without_rubric": sum(record.rubric is None for record in failed),
    }


def _versions(prompts: Sequence[PromptRecord], proposals: Sequence[Proposal], proposer: Proposer) -> list[Version]:
    return [
        Version(
            prompt_id=record.prompt_id,
            id=proposal.rubric.id if proposal.rubric else None,
            round=0,
            accepted=proposal.rubric is not None,
            reason=proposal.failure,
            proposer=proposer.name,
            template=proposer.template,
            reply=proposal.reply_hash,
            rubric=proposal.rubric,
        )
        for record, proposal in zip(prompts, proposals, strict=True)
    ]


def _write(folder: Path, prompts: Sequence[PromptRecord], versions: Sequence[Version], report: dict[str, Any]) -> None:
    write_versions(folder / VERSIONS, versions)
    write_prompts(folder / PROMPTS, prompts)
    write_json(folder / REPORT, report)
