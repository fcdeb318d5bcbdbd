"""Run folders as `ppo`, `grpo` and `rloo` leave them, without a run."""

import json
import math

import numpy as np

from policy.rollouts import JUDGED, SCORES
from policy.run_folder import METRICS, RESULT, SAMPLES
from rubric_data.files import CONFIG_NAME, ORIGIN_NAME, write_json, write_text
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

OWN = {"PPO": {"ppo_epochs": 2}, "GRPO": {"scale_rewards": "group"}, "RLOO": {"normalise": False}}


def write_run(folder, *, method="PPO", steps=6, done=None, text="plain", tags=2, seed=0, judged=2, **config):
    """A run whose proxy rises and whose gold falls from the middle on; every free text holds ``text``.

    It goes on still where ``done`` updates are fewer than ``steps``. ``judged``: rollouts of each update.
    """
    chance = np.random.default_rng(seed)
    done = steps if done is None else done
    folder.mkdir(parents=True)
    options = {"reward_model": text, "policy": text, "data": text, "judge": "local", "judge_model": text}
    options |= {"output": str(folder), "steps": steps, "batch_size": 8, "on_alarm": "warn", "seed": seed}
    write_json(folder / CONFIG_NAME, options | OWN[method] | config)
    write_json(folder / ORIGIN_NAME, {"command": ["rubric-rm", text], "commit": "0123456789abcdef", "dirty": True})
    rows = [row(step, steps, tags, text, chance) for step in range(1, done + 1)]
    write_lines(folder / METRICS, rows)
    rollouts = [rollout(step, place, text, steps) for step in range(1, done + 1) for place in range(1, judged + 1)]
    write_lines(folder / JUDGED, [record.model_dump(mode="json") for record, _ in rollouts])
    write_lines(folder / SCORES, [scores for _, scores in rollouts])
    if done == steps:
        write_lines(folder / SAMPLES, [sample(number, text) for number in range(3)])
        write_json(folder / RESULT, result(rows))
    return folder


def row(step, steps, tags, text, chance):
    gone, noise = step / steps, chance.normal() if step > 3 else 0.0
    proxy, gold = 0.4 + 0.4 * gone, 0.4 + 0.3 * math.sin(1.35 * math.pi * gone) + 0.02 * noise
    metrics = {f"criteria/{text} {tag}": min(0.4 + 0.05 * tag * gone, 1.0) for tag in range(tags)}
    return {
        "step": step,
        "episode": 8 * step,
        "reward/proxy": proxy,
        "reward/paid": proxy + 0.05,
        "reward/masked": 0,
        "reward/gold": gold,
        "reward/gold_low": gold - 0.08,
        "reward/gold_high": gold + 0.08,
        "reward/divergence": proxy - gold,
        "reward/judged": 4,
        "reward/judge_failed": 0,
        "best_step": min(step, steps // 2),
        "alarm": "decline" if step == steps and steps > 4 else None,
        "response_tokens": 40 - 15 * gone,
        "finished_share": gone,
        "kl": 6 * gone**1.5,
        **metrics,
        "seconds": 2.0,
    }


def rollout(step, place, text, steps):
    rubric = Rubric(criteria=tuple(Criterion(id=f"c{k}", text=f"{text} {k}", weight=1 + k) for k in range(2)))
    record = JudgedResponse(
        prompt_id=f"p{place} {text}",
        prompt=f"{place} {text}",
        response_id=f"update-{step}-{place}",
        response=f"{step} {text}",
        rubric=rubric,
        generator="policy",
        verdicts=(Verdict(criterion_id="c0", value=1.0), Verdict(criterion_id="c1", value=0.0)),
        split="train",
    )
    reward = 1 / 3 + 0.5 * step / steps
    answers = [
        {"criterion_id": "c0", "probability": 0.9},
        {"criterion_id": "c1", "probability": (3 * reward - 0.9) / 2},
    ]
    return record, {
        "prompt_id": record.prompt_id,
        "response_id": record.response_id,
        "reward": reward,
        "criteria": answers,
    }


def sample(number, text):
    def response(when, gold, proxy):
        return {"text": f"{when} {number} {text}", "finished": when == "after", "gold": gold, "proxy": proxy}

    return {
        "prompt_id": f"q{number} {text}",
        "prompt": f"held out {number} {text}",
        "before": [response("before", 0.25, 0.5), response("before", 0.5, None)],
        "after": [response("after", 0.25 * number, 0.75), response("after", None, 0.5)],
    }


def result(rows):
    return {
        "prompts_trained": 9,
        "prompts_evaluated": 3,
        "responses_per_prompt": 2,
        "criteria": 24,
        "criteria_by_code": 6,
        "gold_before": {"value": 0.4, "low": 0.35, "high": 0.45},
        "gold_after": {"value": 0.5, "low": 0.45, "high": 0.55},
        "gold_gain": {"value": 0.1, "low": 0.05, "high": 0.15},
        "proxy_before": {"value": 0.4, "low": 0.35, "high": 0.45},
        "proxy_after": {"value": 0.7, "low": 0.65, "high": 0.75},
        "proxy_gain": {"value": 0.3, "low": 0.25, "high": 0.35},
        "gain_gap": {"value": 0.2, "low": 0.1, "high": 0.3},
        "finished_share_before": 0.5,
        "finished_share_after": 0.9,
        "mean_tokens_before": 35.0,
        "mean_tokens_after": 21.5,
        "kl_final": rows[-1]["kl"],
        "best_step": rows[-1]["best_step"],
        "alarm_step": next((one["step"] for one in rows if one["alarm"]), None),
        "rolled_back": False,
        "steps": len(rows),
        "seconds": 100.0,
        "seconds_per_step": 2.0,
    }


def write_lines(path, values):
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
