"""The stage of best-of-n: the reward model chooses among responses to a prompt, given or sampled from a policy.

Owns which responses are taken and what is written; the curve is `rm.forecast`'s, pairs are
`rubric_data.formats.preferences`'. The run folder: config.json, scores.jsonl (as `score` writes it), best.jsonl,
accepted.jsonl, pairs.jsonl, report.json, bon.png; of a policy samples.jsonl, which grows as it samples, and
responses.jsonl as well.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from policy.config import BonConfig
from policy.prompts import require_pad, warn_if_code_answers_all
from rm import forecast, metrics, report
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype
from rm.page import short, with_interval
from rm.sampling import sample
from rm.scorer import RubricScorer, Scored
from rm.scores import write_scores
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, json_number, start_run, write_json, write_text
from rubric_data.formats.base import assistant_message, prompt_messages
from rubric_data.formats.preferences import pair_row, pair_up
from rubric_data.io import load_prompts_and_responses, write_judged
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.programmatic import answer_by_code, coded_in_rewards, is_programmatic
from rubric_data.records import JudgedResponse, PromptRecord
from rubric_data.refine import best_first
from rubric_data.reward import rubric_reward
from rubric_data.tables import print_table
from rubric_data.verifiers import prepare
from rubric_data.versions import Journal

logger = logging.getLogger(__name__)
FLAWS = ("unrewarded", "empty", "cut_off", "repeated")  # why a response is neither accepted nor part of a pair
_SHARE = 0.25  # accepted of each prompt's responses, if nothing else is asked for
_AT_ONCE = 96  # responses sampled between two looks at the disk


@dataclass(frozen=True)
class Candidate:
    """A response with its rewards in [0, 1]: ``proxy`` by the model, ``gold`` by its verdicts, NaN where there is none.

    ``finished``: whether the policy ended it itself; None if nobody knows.
    """

    record: JudgedResponse
    proxy: float
    gold: float
    finished: bool | None = None

    @property
    def flaw(self) -> str | None:
        """Why nothing should be trained on it, if so."""
        if math.isnan(self.proxy):
            return "unrewarded"
        if not self.record.response.strip():
            return "empty"
        return "cut_off" if self.finished is False else None


def run_bon(config: BonConfig) -> dict[str, Any]:
    """Choose among the responses, sampled first with ``config.policy``; write the run folder, show the curve.

    Returns what report.json holds (docs/bon.md names every key). Raises UserError on bad input, before anything is
    written, and if no response has a reward.
    """
    _check(config)
    prompts, records = _load(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = RubricScorer.from_pretrained(
        config.reward_model,
        device=device,
        tokens_per_batch=config.tokens_per_batch,
        use_verifiers=coded_in_rewards(config.use_verifiers),
        reward=config.reward,
    )
    scorer.check(prompt.rubric for prompt in prompts if prompt.rubric)
    if config.policy is not None:
        _check_policy(config.policy)
    folder = start_run(config.output, asdict(config), resume=config.resume)  # last of what bad input can stop

    finished: dict[str, bool] = {}
    if config.policy is not None:
        records, finished = sample_responses(config, config.policy, prompts, Journal(folder / "samples.jsonl"), device)
    records = judge_by_code(records)
    if config.policy is not None:
        write_judged(folder / "responses.jsonl", records)
    scored = scorer.score_records(records, progress=True)
    write_scores(folder / "scores.jsonl", records, scored)
    found = ranked(records, [one.reward for one in scored], finished, config.seed)
    result = _report(config, found, scored, _write(config, folder, found))
    write_json(folder / "report.json", result)
    plot(folder / "bon.png", result["curve"]["rows"])
    _show(result, folder)
    return result


def ranked(
    records: Sequence[JudgedResponse], proxies: Sequence[float], finished: dict[str, bool], seed: int
) -> list[list[Candidate]]:
    """The candidates of each prompt, in order of appearance: best first, ties by ``seed``, unrewarded last.

    ``finished`` by response id. Rewards are rounded, so that the order of a sum decides no rank.
    """
    by_prompt: dict[str, list[Candidate]] = {}
    for record, proxy in zip(records, proxies, strict=True):
        gold = round(rubric_reward(record.rubric, record.values()), REWARD_DECIMALS)
        one = Candidate(record, round(proxy, REWARD_DECIMALS), gold, finished.get(record.response_id))
        by_prompt.setdefault(record.prompt_id, []).append(one)
    found = []
    for members in by_prompt.values():
        order = best_first([one.record for one in members], [one.proxy for one in members], seed)
        unrewarded = [one for one in members if math.isnan(one.proxy)]
        found.append([members[place] for place in order] + unrewarded)
    return found


def trainable(candidates: Sequence[Candidate]) -> tuple[list[Candidate], Counter[str]]:
    """The candidates of one prompt that may be trained on, each text once; how many others, by their flaw.

    An empty response teaches nothing, and one that was cut at the token limit teaches never to end.
    """
    kept: dict[str, Candidate] = {}
    left_out = Counter[str]()
    for one in candidates:
        flaw = one.flaw or ("repeated" if one.record.response in kept else None)
        if flaw is None:
            kept[one.record.response] = one
        else:
            left_out[flaw] += 1
    return list(kept.values()), left_out


def accept(candidates: Sequence[Candidate], *, threshold: float | None, share: float | None) -> list[Candidate]:
    """Those of ``candidates``, best first, of at least ``threshold``; without one, the best ``share``, at least one."""
    if threshold is not None:
        return [one for one in candidates if one.proxy >= threshold]
    wanted = (_SHARE if share is None else share) * len(candidates)
    return list(candidates[: max(1, math.ceil(wanted - 1e-9))])  # 0.07 * 100 is a little above 7


def tied_best(candidates: Sequence[Candidate]) -> int:
    """How many different texts earn as much as the best of ``candidates``, itself included; 0 without a reward."""
    best = candidates[0].proxy
    return len({one.record.response for one in candidates if one.proxy == best})


def judge_by_code(records: Sequence[JudgedResponse]) -> list[JudgedResponse]:
    """``records`` with code's verdicts on those that nobody judged, where code can answer the whole rubric."""
    unjudged = [
        record for record in records if not record.verdicts and all(map(is_programmatic, record.rubric.criteria))
    ]
    answered, _ = answer_by_code(unjudged)
    by_id = {record.response_id: record for record in answered}
    return [by_id.get(record.response_id, record) for record in records]


def sample_responses(
    config: BonConfig, policy: str, prompts: Sequence[PromptRecord], journal: Journal, device: str
) -> tuple[list[JudgedResponse], dict[str, bool]]:
    """``config.samples`` responses of ``policy`` to each prompt, and by their ids whether it ended them itself.

    What ``journal`` holds is not sampled again. Prompts of one text share their samples.
    """
    _sample_texts(config, policy, {prompt.prompt for prompt in prompts}, journal, device)
    told = {line["prompt"]: line["completions"] for line in journal.lines()}
    records, finished = [], {}
    for prompt in prompts:
        for place, completion in enumerate(told[prompt.prompt]):
            record = JudgedResponse(
                **{key: getattr(prompt, key) for key in PromptRecord.model_fields},
                response_id=f"{prompt.prompt_id}-s{place}",
                response=completion["text"],
                generator=policy,
            )
            records.append(record)
            finished[record.response_id] = completion["finished"]
    return records, finished


def _sample_texts(config: BonConfig, policy: str, prompts: set[str], journal: Journal, device: str) -> None:
    """Sample responses to the ``prompts`` that ``journal`` lacks, and append them to it."""
    told = {line["prompt"] for line in journal.lines()}
    if prompts <= told:
        return
    model = load_causal_lm(policy, dtype=native_dtype(device)).to(device)
    tokenizer = load_tokenizer(policy)
    texts = sorted(prompts, key=lambda text: (len(text), text))  # so that like lengths share a batch
    at_once = max(1, _AT_ONCE // config.samples)
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        for start in bar.track(range(0, len(texts), at_once), description="sampling"):
            if not (part := [text for text in texts[start : start + at_once] if text not in told]):
                continue
            rows = sample(
                model,
                tokenizer,
                part,
                samples=config.samples,
                max_new_tokens=config.response_length,
                temperature=config.temperature,
                seed=config.seed,
            )
            for text, completions in zip(part, rows, strict=True):
                journal.append({"prompt": text, "completions": [asdict(one) for one in completions]})


def curve(found: Sequence[Sequence[Candidate]], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """Expected rewards of the best of n = 1, 2, 4 ... with intervals over prompts (`rm.forecast.best_of_n_section`)."""
    rewarded = [[one for one in candidates if not math.isnan(one.proxy)] for candidates in found]
    counts_RP = metrics.resample_counts(len(rewarded), bootstrap, seed)
    rows = forecast.best_of_n_section(
        np.array([one.gold for candidates in rewarded for one in candidates]),
        np.array([one.proxy for candidates in rewarded for one in candidates]),
        np.repeat(np.arange(len(rewarded)), [len(candidates) for candidates in rewarded]),
        len(rewarded),
        lambda statistic: metrics.estimate(statistic, counts_RP).as_dict(),
    )
    longest = rows["rows"][-1]["n"] if rows["rows"] else math.inf
    judged = sum(
        len(candidates) >= longest and not any(math.isnan(one.gold) for one in candidates) for candidates in rewarded
    )
    return {"prompts": rows["prompts"], "judged_prompts": judged, "rows": rows["rows"]}


def plot(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Expected rewards of the best of n against n, and against the KL it costs, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    by_size, by_kl = figure.subplots(1, 2, sharey=True)
    if rows:
        report.draw_best_of_n(by_size, rows)
        no_rival = {"best_gold": {"value": math.nan}}  # the judge's own choice costs another KL
        report.draw_best_of_n(by_kl, [row | {"n": row["kl"]["value"]} | no_rival for row in rows])
        by_size.set_xscale("log", base=2)
        by_size.set_xticks([row["n"] for row in rows], [str(row["n"]) for row in rows])
        by_size.minorticks_off()
        by_kl.set(xlabel="KL from the sampled policy, nats a response", ylabel="")
        by_kl.get_legend().remove()
    for axes in (by_size, by_kl):
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _check(config: BonConfig) -> None:
    for name in ("samples", "response_length", "bootstrap", "tokens_per_batch"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}; raise it")
    if config.threshold is not None and config.share is not None:
        raise UserError("threshold, share: give one of them; the other rule would decide nothing")
    if config.threshold is not None and not 0 <= config.threshold <= 1:
        raise UserError(f"threshold: must lie in [0, 1], as rewards do, got {config.threshold}")
    if config.share is not None and not 0 < config.share <= 1:
        raise UserError(f"share: must lie in (0, 1], got {config.share}; 0.25 is each prompt's best quarter")
    if not 0 <= config.margin <= 1:
        raise UserError(f"margin: must lie in [0, 1], as rewards do, got {config.margin}")
    if config.temperature <= 0:
        raise UserError(f"temperature: must be positive, got {config.temperature}; the samples must differ")


def _check_policy(name: str) -> None:
    tokenizer = load_tokenizer(name)
    require_pad(tokenizer)
    if not tokenizer.chat_template:
        raise UserError(f"policy {name!r}: its tokenizer has no chat template; set one and save it")


def _load(config: BonConfig) -> tuple[list[PromptRecord], list[JudgedResponse]]:
    """Prompts with rubrics, and the responses to choose from: none if a policy is to write them."""
    prompts, records = load_prompts_and_responses(config.data)
    if config.split != "all":
        prompts = [prompt for prompt in prompts if prompt.split == config.split]
        records = [record for record in records if record.split == config.split]
        if not prompts:
            raise UserError(f"{config.data}: has no prompts in split {config.split}; choose another --split")
    if without := [prompt.prompt_id for prompt in prompts if prompt.rubric is None]:
        raise UserError(
            f"{config.data}: {len(without)} of {len(prompts)} prompts have no rubric, {without[0]!r} first; write them "
            "by 'rubric-rm rubric generate'"
        )
    if config.policy is not None:
        records = []
    elif not records:
        raise UserError(f"{config.data}: holds prompts and no responses; give --policy to sample some")
    criteria = [(prompt, criterion) for prompt in prompts if prompt.rubric for criterion in prompt.rubric.criteria]
    for prompt, criterion in criteria:  # code gives gold rewards too, whoever gives the others
        try:
            if criterion.verifier is not None:
                prepare(criterion.verifier)
        except UserError as error:
            raise UserError(f"prompt {prompt.prompt_id!r}, criterion {criterion.id!r}: {error}") from None
    if config.use_verifiers:
        warn_if_code_answers_all(config.data, [criterion for _, criterion in criteria])
    return prompts, records


# --- what is written -------------------------------------------------------------------------------------------------


def _write(config: BonConfig, folder: Path, found: Sequence[Sequence[Candidate]]) -> dict[str, Any]:
    """best.jsonl, accepted.jsonl and pairs.jsonl; the parts of the report that tell of them."""
    accepted: list[Candidate] = []
    pairs: list[dict[str, Any]] = []
    flaws, pairless = Counter[str](), Counter[str]()
    for candidates in found:
        usable, flawed = trainable(candidates)
        flaws.update(flawed)
        accepted += accept(usable, threshold=config.threshold, share=config.share)
        drawn, left_out = pair_up([(one.proxy, one.record) for one in usable], config.pairs, config.margin)
        pairless.update(left_out)
        pairs += [
            _origin(better[1])
            | {"chosen_id": better[1].response_id, "rejected_id": worse[1].response_id}
            | pair_row(better[1].prompt, better, worse)
            for better, worse in drawn
        ]
    best = [candidates for candidates in found if not math.isnan(candidates[0].proxy)]
    if not best:
        raise UserError(f"{config.data}: no response has a reward; check the rubrics and the model's calibration")
    _write_rows(folder / "best.jsonl", map(_best_row, best))
    _write_rows(folder / "accepted.jsonl", map(_accepted_row, accepted))
    _write_rows(folder / "pairs.jsonl", pairs)
    for name, rows in (("accepted.jsonl", accepted), ("pairs.jsonl", pairs)):
        if not rows:
            logger.warning("%s: is empty; report.json says what was left out", folder / name)
    return {
        "left_out": {flaw: flaws[flaw] for flaw in FLAWS},
        "best": {
            "prompts": len(best),
            "tied": sum(tied_best(candidates) > 1 for candidates in best),
            "mean_reward": _mean([candidates[0].proxy for candidates in best]),
            "mean_gold": _mean([candidates[0].gold for candidates in best]),
        },
        "accepted": {
            "responses": len(accepted),
            "prompts": len({one.record.prompt_id for one in accepted}),
            "mean_reward": _mean([one.proxy for one in accepted]),
            "mean_gold": _mean([one.gold for one in accepted]),
        },
        "pairs": {
            "pairs": len(pairs),
            "prompts": len({row["prompt_id"] for row in pairs}),
            "mean_margin": _mean([row["score_chosen"] - row["score_rejected"] for row in pairs]),
            "left_out": {reason: count for reason, count in sorted(pairless.items()) if count},
        },
    }


def _origin(record: JudgedResponse) -> dict[str, Any]:
    return {key: getattr(record, key) for key in ("prompt_id", "split", "source", "licence")}


def _best_row(candidates: Sequence[Candidate]) -> dict[str, Any]:
    best = candidates[0]
    return _origin(best.record) | {
        "prompt": best.record.prompt,
        "response_id": best.record.response_id,
        "generator": best.record.generator,
        "response": best.record.response,
        "finished": best.finished,
        "reward": best.proxy,
        "gold": json_number(best.gold),
        "among": sum(not math.isnan(one.proxy) for one in candidates),
        "tied": tied_best(candidates),
    }


def _accepted_row(one: Candidate) -> dict[str, Any]:
    return _origin(one.record) | {
        "response_id": one.record.response_id,
        "generator": one.record.generator,
        "reward": one.proxy,
        "gold": json_number(one.gold),
        "messages": prompt_messages(one.record.prompt) + assistant_message(one.record.response),
    }


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _mean(values: Sequence[float]) -> float | None:
    """Mean of what is not NaN; None if nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return json_number(sum(known) / len(known)) if known else None


def _report(
    config: BonConfig, found: Sequence[Sequence[Candidate]], scored: Sequence[Scored], written: dict[str, Any]
) -> dict[str, Any]:
    threshold, share = config.threshold, config.share
    return {
        "data": config.data,
        "split": config.split,
        "reward_model": config.reward_model,
        "reward": config.reward,
        "policy": config.policy,
        "licences": dict(Counter(candidates[0].record.licence or "unknown" for candidates in found)),
        "prompts": len(found),
        "responses": {
            "all": len(scored),
            "judged": sum(not math.isnan(one.gold) for candidates in found for one in candidates),
            "truncated": sum(one.truncated > 0 for one in scored),
        },
        "criteria": {
            "all": sum(len(one.probs) for one in scored),
            "by_code": int(sum(one.by_code.sum() for one in scored)),
        },
        "rules": {
            "threshold": threshold,
            "share": None if threshold is not None else _SHARE if share is None else share,
            "pairs": config.pairs,
            "margin": config.margin,
        },
        **written,
        "curve": curve(found, bootstrap=config.bootstrap, seed=config.seed),
    }


def _show(result: dict[str, Any], folder: Path) -> None:
    found, best, accepted, pairs = (result[key] for key in ("curve", "best", "accepted", "pairs"))
    rows = [
        [str(row["n"]), *(with_interval(row[key]) for key in ("proxy", "gold")), short(row["kl"]["value"], 2)]
        for row in found["rows"]
    ]
    left_out = ", ".join(f"{count} {reason}" for reason, count in pairs["left_out"].items())
    notes = (
        f"[low high]: {metrics.LEVEL:.0%} interval, resamples of prompts; gold over {found['judged_prompts']} prompts",
        f"best.jsonl: {best['prompts']} prompts, of which {best['tied']} tie at the top",
        f"accepted.jsonl: {accepted['responses']} responses to {accepted['prompts']} prompts",
        f"pairs.jsonl: {pairs['pairs']} pairs of {pairs['prompts']} prompts; left out: {left_out or 'nothing'}",
        f"plot: {folder / 'bon.png'}",
    )
    columns = ("best of n", "reward model", "judge", "KL, nats")
    print_table(f"expected reward of the best of n, over {found['prompts']} prompts", columns, rows, "\n".join(notes))
