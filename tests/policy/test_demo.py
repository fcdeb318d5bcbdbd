"""The demo's wiring, speed comparison and summary, with stages that record instead of work."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

import configs
from policy import demo
from policy.config import DEMO_SETS, DemoConfig
from policy.options import options_of
from rubric_data.errors import UserError


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def predictor(accuracy, auroc, tail, brier=0.2):
    return {
        "criterion": {"accuracy": estimate(accuracy), "auroc": estimate(auroc), "brier": estimate(brier)},
        "reward": {"tail_pair_accuracy": {"half": estimate(tail), "win": estimate(0.0)}},
    }


AUDIT = {
    "prompts": 24,
    "responses": 190,
    "verdicts": 1300,
    "tail": 0.25,
    "predictors": {
        "model": predictor(0.81, 0.86, 0.71, 0.14),
        "model (raw)": predictor(0.79, 0.86, 0.69, 0.18),
        "majority": predictor(0.6, 0.5, None),
    },
    "reward_level": {
        "error": {"raw": {"proxy_tail": estimate(0.21)}, "calibrated": {"proxy_tail": estimate(0.12, 0.1, 0.14)}},
        "bias": {"raw": {"proxy_tail": estimate(0.18)}, "calibrated": {"proxy_tail": estimate(-0.01)}},
        "coverage": {"lower_bound": {"tilted": estimate(0.91, 0.85, 0.96)}},
    },
    "model_minus": {
        "majority": {"auroc": estimate(0.36, 0.3, 0.42)},
        "model (raw)": {"auroc": estimate(0.0, -0.01, 0.01)},
    },
}
SPEED = {
    "prompts": 5,
    "responses": 40,
    "criteria": 280,
    "reward_model_per_second": 120.0,
    "local_judge_per_second": 10.0,
    "ratio": 12.0,
}
PPO = {
    "gold_before": estimate(0.5, 0.45, 0.55),
    "gold_after": estimate(0.6, 0.55, 0.65),
    "gold_gain": estimate(0.1, 0.04, 0.16),
    "proxy_before": estimate(0.4),
    "proxy_after": estimate(0.7),
    "proxy_gain": estimate(0.3),
    "prompts_evaluated": 24,
    "responses_per_prompt": 2,
    "kl_final": 6.25,
    "steps": 14,
}


@pytest.fixture
def stages(monkeypatch):
    """Every stage replaced by one that records its config; the reports above come out of them."""
    calls = []
    reports = {"rm.audit:run_audit": AUDIT, "policy.ppo:run_ppo": PPO}

    def resolve(target):
        def run(config):
            calls.append((target, config))
            return reports.get(target, {})

        return run

    def speed(config):
        calls.append(("speed", config))
        return SPEED

    monkeypatch.setattr(demo, "resolve_name", resolve)
    monkeypatch.setattr(demo, "_speed", speed)
    return calls


def test_stages_run_in_order_and_each_reads_what_the_one_before_wrote(stages, tmp_path):
    config = DemoConfig(output=str(tmp_path / "run"))
    config.train.max_steps = 3
    demo.run_demo(config)
    assert [name for name, _ in stages] == [
        "rm.judging:run_judge",
        "rm.train:run_train",
        "rm.calibrating:run_calibrate",
        "rm.audit:run_audit",
        "speed",
        "policy.ppo:run_ppo",
    ]
    judge, train, calibrate, audit, _, ppo = (config for _, config in stages)
    judged, model = f"{judge.output}/judged.jsonl", f"{train.output}/model"
    assert judge.output == str(tmp_path / "run" / "judge")
    assert [train.data, calibrate.data, audit.data, ppo.data] == [judged] * 4
    assert [calibrate.model, audit.model, ppo.reward_model] == [model] * 3
    assert len({judge.output, train.output, audit.output, ppo.output}) == 4
    assert train.max_steps == 3


def test_the_demo_sets_every_path_but_the_user_s_own_data():
    left = {option.key for option in options_of(DemoConfig, DEMO_SETS)}
    paths = {"output", "data", "resume", "reward_model", "overwrite"}
    assert {key for key in left if key.rpartition(".")[2] in paths} == {"output", "judge.data"}
    assert "calibrate.model" not in left and "audit.model" not in left


def test_a_used_folder_is_refused_before_any_stage_runs(stages, tmp_path):
    demo.run_demo(DemoConfig(output=str(tmp_path / "run")))
    done = len(stages)
    with pytest.raises(UserError, match="holds a run already"):
        demo.run_demo(DemoConfig(output=str(tmp_path / "run")))
    assert len(stages) == done


def test_the_summary_is_written_and_shows_the_stages_numbers(stages, tmp_path, capsys):
    summary = demo.run_demo(DemoConfig(output=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["calibration"]["tail_pair_accuracy_before"]["value"] == 0.69
    assert summary["calibration"]["tail_pair_accuracy_after"]["value"] == 0.71
    assert summary["seconds"].keys() == {"judge", "train", "calibrate", "audit", "speed", "ppo", "total"}
    text = (tmp_path / "run" / "summary.md").read_text()
    assert "| majority | .600 | .500 | +.360 [+.30 +.42] |" in text
    assert "| model | .810 | .860 | – |" in text
    assert "| tail pair accuracy | .690 | .710 |" in text
    assert "| reward error, model's top | .210 | .120 [.10 .14] |" in text
    assert "| reward bias, model's top | .180 | -.010 |" in text
    assert "| lower bound holds | – | .910 [.85 .96] |" in text
    assert "| ratio | 12.0 |" in text
    assert "| gold (the judge) | .500 [.45 .55] | .600 [.55 .65] | +.100 [+.04 +.16] |" in text
    printed = capsys.readouterr().out
    assert "majority" in printed and "12.0" in printed and "[low high]" in printed


def test_a_model_without_a_reward_level_leaves_its_rows_empty():
    few = {key: value for key, value in AUDIT.items() if key != "reward_level"}
    text = demo.markdown(demo.tabulate(demo.summarise(few, SPEED, PPO, {"judge": 1.0})))
    assert "| reward error, model's top | – | – |" in text and "| lower bound holds | – | – |" in text


def test_the_tables_fit_eighty_columns_without_cutting_a_number():
    wide = estimate(-0.123, -0.456, -0.789)
    summary = demo.summarise(AUDIT, SPEED, PPO, {"judge": 3.0, "train": 600.0, "ppo": 300.0})
    for one in summary["held_out"]["predictors"].values():
        one.update(dict.fromkeys(one, wide))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.render(demo.tabulate(summary)))
    text = console.export_text()
    assert "…" not in text
    assert text.count("-.123 [-.46 -.79]") == 9  # three predictors, three columns


def test_short_numbers():
    assert [demo._short(v, 3, False) for v in (0.8534, 1.0, -0.25, 0.0, 10.5, 0.9996)] == [
        ".853",
        "1.000",
        "-.250",
        ".000",
        "10.500",
        "1.000",
    ]
    assert [demo._short(v, 2, True) for v in (0.1, -0.1, -1.5)] == ["+.10", "-.10", "-1.50"]


def test_minutes_are_minutes_and_seconds():
    assert [demo._minutes(value) for value in (0.4, 59.9, 60, 754.2)] == ["0:00", "0:59", "1:00", "12:34"]


class Clock:
    """Time that passes only when someone works."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_speed_counts_criteria_per_second_without_the_warm_up(judged, monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr(demo, "time", clock)

    class Scorer:
        def score(self, prompts, responses, rubrics):
            clock.now += 0.5 * len(prompts) if len(prompts) > 1 else 1000  # the warm-up is slow
            return [np.zeros(len(rubric.criteria)) for rubric in rubrics]

    class Judge:
        def judge(self, requests):
            asked.append([request.response for request in requests])
            clock.now += 4 * sum(len(request.criteria) for request in requests) if len(requests) > 1 else 1000

    # 12 responses of 2 criteria: 24 criteria in 6 s, against 24 in 96 s
    assert demo.compare_speed(judged, Scorer(), Judge()) == {
        "prompts": 6,
        "responses": 12,
        "criteria": 24,
        "reward_model_per_second": 4.0,
        "local_judge_per_second": 0.25,
        "ratio": 16.0,
    }
    assert asked[-1] == [record.response for record in judged]


def test_the_demo_measures_the_model_though_code_could_answer_every_embedded_criterion():
    assert demo.connect(DemoConfig()).policy.use_verifiers is False
    assert "use_verifiers" not in configs.recipe_path("quickstart").read_text()
