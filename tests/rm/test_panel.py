"""The panel on simulated checkpoints whose truth is known, and once from training to page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.cli import main
from rm.bench import METRICS, Bench, Run
from rm.checkpoints import average_weights, find
from rm.interventions import filtering
from rm.panel import Scale, panel
from rm.scorer import Scored
from rm.scores import write_scores
from rm.snr_report import render
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict
from tests.rm.test_report import HOSTILE, Page

PROMPTS, RESPONSES, CRITERIA = 20, 3, 4


def records(name=str):
    """20 prompts of three responses and four criteria; criterion i is met by the responses above place i % 3."""
    rubric = Rubric(
        criteria=tuple(Criterion(id=f"c{i}", text=name(f"asks {i}"), tags=(f"t{i % 2}",)) for i in range(CRITERIA))
    )
    return [
        JudgedResponse(
            prompt_id=f"p{number}",
            prompt=f"prompt {number}",
            response_id=f"p{number}-{place}",
            response=f"response {place} to {number}",
            rubric=rubric,
            generator=name(f"g{place}"),
            verdicts=tuple(Verdict(criterion_id=f"c{i}", value=float(place > i % 3)) for i in range(CRITERIA)),
            split="validation",
        )
        for number in range(PROMPTS)
        for place in range(RESPONSES)
    ]


RECORDS = records()
GOLD = np.array([record.values() for record in RECORDS])  # (B, K)
METRICS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def run(name, predict, steps=range(10, 90, 10), **more):
    """A run whose checkpoint at a step predicts ``predict(step)``, (B, K)."""
    return Run(name, list(steps), [list(np.clip(predict(step), 0, 1)) for step in steps], **more)


def towards(gold, strength):
    """Probabilities ``strength`` away from one half, on the judge's side."""
    return 0.5 + strength * (2 * gold - 1)


def flipping(name, strength, seed):
    """Sure of the even criteria by ``strength``; of the odd ones a coin decides, anew at every checkpoint."""
    rng = np.random.default_rng(seed)

    def predict(step):
        sides = towards(GOLD, strength)
        sides[:, 1::2] = 0.5 + 0.001 * rng.choice([-1, 1], size=GOLD[:, 1::2].shape)
        return sides

    return run(name, predict)


@pytest.fixture(scope="module")
def flips():
    runs = [flipping(f"strength {strength}", strength, seed) for seed, strength in enumerate((0.1, 0.2, 0.3))]
    return panel(RECORDS, runs, last=6, average=2, bootstrap=100, min_prompts=5)


def test_a_clean_metric_is_told_from_a_noisy_one(flips):
    ratio = {name: one["snr"]["value"] for name, one in flips["metrics"].items()}
    assert ratio["accuracy"] < flips["noise_floor"]  # all recipes are equally often on the right side
    assert ratio["brier"] > 50 and ratio["log_loss"] > 50
    assert flips["metrics"]["brier"]["decision"]["mean"]["value"] == 1
    advice = flips["recommendation"]
    assert advice["metric"] in ("brier", "log_loss", "reward_mae") and "accuracy" not in advice["equals"]
    assert "accuracy" in advice["text"] or "AUROC" in advice["text"]
    gain = next(row for row in flips["continuous"] if (row["metric"], row["in_place_of"]) == ("brier", "accuracy"))
    assert gain["snr_minus"]["low"] > 0


def test_slices_come_best_told_apart_first(flips):
    ratio = {row["name"]: row["metrics"]["brier"]["snr"]["value"] for row in flips["slices"]["criterion"]["slices"]}
    assert list(ratio) == sorted(ratio, key=lambda name: -(ratio[name] or 0))
    found = flips["filtering"]
    assert (found["by"], found["groups"], found["prompts"]) == ("criterion", 4, [10, 10])
    assert flips["slices"]["tag"]["left_out"] == 0
    assert len(flips["slices"]["generator"]["slices"]) == 3


def graded():
    """The records with responses of one, two and three words, and a first criterion of three levels."""
    levels = tuple(Level(label=name) for name in ("poor", "fair", "good"))
    found = []
    for number, record in enumerate(RECORDS):
        first, *others = record.rubric.criteria
        rubric = Rubric(criteria=(first.model_copy(update={"levels": levels}), *others))
        response = " ".join(["w"] * (1 + number % RESPONSES))
        found.append(record.model_copy(update={"rubric": rubric, "response": response}))
    return found


def test_slices_by_length_and_level_by_hand():
    """Both runs are equally far off on short responses; on those of three words by .1 .3, and by .3 .5."""
    longest_B = np.arange(len(GOLD)) % RESPONSES == 2

    def recipe(name, *gaps):
        def predict(step):
            return GOLD + np.where(longest_B, gaps[step], (0.1, 0.3)[step])[:, None] * (1 - 2 * GOLD)

        return run(name, predict, steps=range(2))

    found = panel(graded(), [recipe("a", 0.1, 0.3), recipe("b", 0.3, 0.5)], last=2, bootstrap=1)["slices"]
    long, *short = found["length"]["slices"]
    assert [row["name"] for row in (long, *short)] == ["3 to 3 words", "1 to 1 words", "2 to 2 words"]
    assert (long["prompts"], long["verdicts"], found["length"]["left_out"]) == (20, 80, 0)
    # Brier .01 .09 against .09 .25: means .12 apart, variances .0032 and .0128
    assert long["metrics"]["brier"]["snr"]["value"] == pytest.approx(0.12 / 0.008**0.5, abs=1e-6)
    # three of four met, so the reward is off by half the gap: means .1 apart, each variance .005
    assert long["metrics"]["reward_mae"]["snr"]["value"] == pytest.approx(0.1 / 0.005**0.5, abs=1e-6)
    assert [row["metrics"]["brier"]["snr"]["value"] for row in short] == [0, 0]
    (level,) = found["level"]["slices"]
    assert (level["name"], level["verdicts"]) == ("3 levels", 60) and "reward_mae" not in level["metrics"]
    # a third of each run's verdicts is in the long responses, the rest is the same: means .04 apart
    apart, variances = 0.12 / 3, (0.08**2 / 2, (0.08 * 2 / 3 + 0.16 / 3) ** 2 / 2)
    assert level["metrics"]["brier"]["snr"]["value"] == pytest.approx(apart / np.mean(variances) ** 0.5, abs=1e-6)


def wobbling(name, strength, noise, seed):
    """Right by ``strength``; even criteria steady, odd ones off by ``noise`` at random."""
    rng = np.random.default_rng(seed)

    def predict(step):
        sides = towards(GOLD, strength) + 0.002 * rng.standard_normal()
        sides[:, 1::2] += noise * rng.standard_normal()  # the same for all, so that it does not average out
        return sides

    return run(name, predict)


def test_filtering_keeps_the_steady_criteria_and_gains_on_the_other_half():
    runs = [wobbling(f"r{seed}", 0.1 + 0.02 * seed, 0.1, seed) for seed in range(3)]
    found = panel(RECORDS, runs, bootstrap=100, min_prompts=5)["filtering"]["metrics"]["brier"]
    assert {"asks 1", "asks 3"} <= {*found["dropped"]}
    assert found["judged_on"]["kept_minus_all"]["low"] > 0


def test_filtering_pure_noise_gains_nothing_on_the_other_half():
    """Recipes that do not differ: the half that chooses sees gains, the half that judges does not."""
    chosen, judged = [], []
    bench = Bench.of(RECORDS, tail=0.25, bootstrap=1, seed=0)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        runs = [run(f"r{i}", lambda step, rng=rng: rng.random(GOLD.shape)) for i in range(3)]
        found = filtering(bench, RECORDS, runs, last=6, min_prompts=5, seed=seed)["metrics"]["brier"]
        chosen.append(found["chosen_on"]["kept"] - found["chosen_on"]["all"])
        judged.append(found["judged_on"]["kept"]["value"] - found["judged_on"]["all"]["value"])
    assert min(chosen) >= 0 and np.mean(chosen) > 0.5
    assert np.mean(judged) < np.mean(chosen) / 3


def test_one_unstable_run_is_told_from_the_others():
    """Brier scores .04 .05 .06, .09 .10 .11 and .12 .16 .20: means .11 apart, deviations .01 .01 .04."""

    def recipe(name, *errors):
        return run(name, lambda step: GOLD + errors[step] ** 0.5 * (1 - 2 * GOLD), steps=range(3))

    runs = [recipe("a", 0.04, 0.05, 0.06), recipe("b", 0.09, 0.1, 0.11), recipe("c", 0.12, 0.16, 0.2)]
    found = panel(RECORDS, runs, last=3, bootstrap=1)
    brier = found["metrics"]["brier"]
    assert [one["snr"]["value"] for one in brier["runs"]] == pytest.approx([11, 11, 2.75])
    assert brier["snr"]["value"] == pytest.approx(0.11 / 0.0006**0.5, abs=1e-6)
    assert re.search(r"noise of one run alone that is from [.\d]+ \(c\) to [.\d]+ times \([ab]\)\.", render(found))


def test_equal_recipes_get_no_advice():
    runs = [flipping(f"seed {seed}", 0.2, seed) for seed in range(3)]
    advice = panel(RECORDS, runs, bootstrap=100, min_prompts=5)["recommendation"]
    assert advice["metric"] is None and "No metric tells these 3 recipes" in advice["text"]


def test_means_of_checkpoints_have_less_noise():
    runs = [wobbling(f"r{seed}", 0.2 + 0.05 * seed, 0.1, seed) for seed in range(3)]
    found = panel(RECORDS, runs, last=8, average=2, bootstrap=50, min_prompts=5)["averaging"]
    assert (found["size"], found["blocks"]) == (2, 4)
    brier = found["metrics"]["brier"]
    assert set(brier) == {"single", "metric", "scores"}  # no weights were given
    assert brier["metric"]["snr"]["value"] > brier["single"]["snr"]["value"]
    assert brier["scores"]["level"] < brier["single"]["level"]  # better than its members
    assert panel(RECORDS, runs, last=3, average=2, bootstrap=1)["averaging"] is None


def test_decisions_by_share_of_training():
    """Until half of the training the order of the recipes is the other way round."""
    rng = np.random.default_rng(0)

    def recipe(place):
        def predict(step):
            return towards(GOLD, (0.4 - 0.1 * place if step < 40 else 0.1 + 0.1 * place) + 0.001 * rng.random())

        return run(f"r{place}", predict, steps=range(10, 90, 10))

    found = panel(RECORDS, [recipe(place) for place in range(3)], last=4, bootstrap=1, min_prompts=5)
    decision = found["metrics"]["brier"]["decision"]
    shares = {row["share"]: row["accuracy"]["value"] for row in decision["early"]}
    assert shares == {0.125: 0.0, 0.25: 0.0, 0.375: 0.0, 0.5: 1.0}
    assert decision["late"]["value"] == 1.0 and decision["mean"]["value"] == 0.25


def test_small_runs_and_a_ladder():
    def recipe(name, gap):
        """A Brier score of ``gap`` squared."""
        return run(name, lambda step: GOLD + gap * (1 - 2 * GOLD), steps=range(1, 3))

    large, small = [recipe(f"l{gap}", gap) for gap in (0.1, 0.2, 0.3)], [recipe(f"s{i}", i) for i in (0.4, 0.3, 0.5)]
    verdicts = (100, 200, 400, 1600)
    ladder = [(recipe(f"v{v}", (0.02 + 0.1 * (v / 100) ** -0.5) ** 0.5), Scale(v, 1e6)) for v in verdicts]
    found = panel(RECORDS, large, small=small, ladder=ladder, last=2, bootstrap=1, min_prompts=5)
    brier = found["metrics"]["brier"]
    assert brier["small"]["value"] == pytest.approx(2 / 3)
    assert brier["ladder"]["averaged"]["observed"] == pytest.approx(0.045)
    assert brier["ladder"]["averaged"]["relative_error"] < 0.01
    assert found["ladder"]["held_out"] == "v1600"
    assert brier["snr"]["value"] is None and found["recommendation"]["metric"] is None  # no checkpoint differs
    assert Page(render(found)).open == []


def test_hostile_names_are_shown_and_never_obeyed():
    given = records(lambda text: f"{text} {HOSTILE}")
    runs = [flipping(f"{HOSTILE} {seed}", 0.1 * seed, seed) for seed in (1, 2)]
    page = Page(render(panel(given, runs, bootstrap=20, min_prompts=5)))
    assert page.open == [] and not {"script", "img"} & {*page.tags}
    assert page.text.count(HOSTILE) > 8
    assert "None" not in page.text and "1337" not in page.text


# --- from training to page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory):
    """Two runs of six checkpoints with different learning rates, and the data they were trained on."""
    folder = tmp_path_factory.mktemp("runs")
    split = {number: name for number, name in enumerate(["train"] * 4 + ["validation"] * 2)}
    data = [
        record.model_copy(update={"split": split[number]})
        for record in RECORDS
        if (number := int(record.prompt_id[1:])) in split
    ]
    write_judged(folder / "judged.jsonl", data)
    options = f"--data {folder}/judged.jsonl --model {tiny_backbone} --dtype float32 --max_length 256 --max_steps 6"
    options += " --eval_steps 1 --lora_rank 2 --patience 50 --keep_checkpoints 6 --select_by brier"
    for name, rate in (("slow", "1e-3"), ("fast", "2e-2")):
        assert main(["train", "--output", str(folder / name), "--learning_rate", rate, *options.split()]) == 0
    return folder


def snr_command(folder, output, runs, *more):
    command = ["snr", "--data", f"{folder}/judged.jsonl", "--output", str(output)]
    command += ["--runs", f"[{', '.join(map(str, runs))}]"]
    return main([*command, "--last", "4", "--early", "2", "--min_prompts", "1", "--bootstrap", "20", *more])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_from_training_to_page(trained, tmp_path, capsys, monkeypatch):
    runs = [trained / "slow", trained / "fast"]
    assert len(list((trained / "slow" / "checkpoints").iterdir())) == 6
    assert snr_command(trained, tmp_path / "snr", runs, "--ladder", "null") == 0
    printed = capsys.readouterr().out
    assert "SNR" in printed and "snr.html" in printed
    found = json.loads((tmp_path / "snr" / "snr.json").read_text())
    assert found["runs"] == [{"name": name, "steps": [1, 2, 3, 4, 5, 6]} for name in ("slow", "fast")]
    assert set(found["averaging"]["metrics"]["brier"]) == {"single", "metric", "scores", "weights"}
    assert Page((tmp_path / "snr" / "snr.html").read_text()).open == []

    def refuse(folders):
        raise AssertionError(f"scores {folders} again")

    monkeypatch.setattr("rm.checkpoints.average_weights", refuse)
    assert snr_command(trained, tmp_path / "snr", runs, "--resume", "true", "--seed", "1") == 0
    # the files of scores are runs themselves
    kept = sorted((tmp_path / "snr" / "scores").iterdir(), key=lambda path: path.name, reverse=True)
    assert snr_command(trained, tmp_path / "again", kept) == 0
    again = json.loads((tmp_path / "again" / "snr.json").read_text())
    for name, one in found["metrics"].items():
        assert again["metrics"][name]["snr"] == one["snr"]
    assert "weights" not in again["averaging"]["metrics"]["brier"]

    assert snr_command(trained, tmp_path / "more", runs, "--last", "7") == 2
    assert "has 6 checkpoints, and 7 are asked for; train with --keep_checkpoints 9" in capsys.readouterr().err
    assert snr_command(trained, tmp_path / "more", runs, "--ladder", f"[{runs[0]}, {runs[1]}]") == 2
    assert "ladder: one run must be the largest" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def keys_of(value, path=""):
    """Where the values of a report stand, as `metrics.brier.runs[].mean`. An estimate is one value, null is none."""
    if isinstance(value, dict) and value.keys() != {"value", "low", "high"}:
        for key, inner in value.items():
            yield from keys_of(inner, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from keys_of(inner, f"{path}[]")
    elif value is not None:
        yield path


def documented_keys(section):
    """The keys in the tables of docs/metrics.md: `a.b`, `.c` are a.b and a.c."""
    found = []
    for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        for key in re.findall(r"`(.*?)`", cell):
            found.append(found[-1].rpartition(".")[0] + key if key.startswith(".") else key)
    return found


def test_every_key_of_a_written_file_is_documented_and_every_documented_key_is_written(tiny_backbone, tmp_path):
    given = graded()
    write_judged(tmp_path / "judged.jsonl", given)
    folders = {}
    for place, name in enumerate(("a", "b", "c", "d")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        rng = np.random.default_rng(place)
        for step in range(1, 6):
            probs = towards(GOLD, 0.1 + 0.1 * place + 0.01 * rng.random())
            write_scores(folders[name] / f"step-{step}.jsonl", given, [Scored(one, one, 0.5, 0) for one in probs])
        report = {"train_verdicts": 100 * 2**place, "log": [{"epoch": 1.0}]}
        (folders[name] / "train.json").write_text(json.dumps(report))
        (folders[name] / "config.json").write_text(json.dumps({"model": str(tiny_backbone)}))
    runs = f"[{folders['a']}, {folders['b']}]"
    command = ["snr", "--data", f"{tmp_path}/judged.jsonl", "--output", f"{tmp_path}/snr", "--runs", runs]
    command += ["--small", runs, "--ladder", f"[{', '.join(map(str, folders.values()))}]"]
    assert main([*command, "--last", "4", "--early", "1", "--min_prompts", "5", "--bootstrap", "20"]) == 0

    section = METRICS_PAGE.read_text(encoding="utf-8").partition("\n## snr.json")[2].partition("\n## ")[0]
    written = set(keys_of(json.loads((tmp_path / "snr" / "snr.json").read_text())))
    patterns = {key: re.compile(re.sub("<.*?>", r"\\w+", re.escape(key))) for key in documented_keys(section)}
    assert [key for key in written if not any(one.fullmatch(key) for one in patterns.values())] == []
    assert [key for key, one in patterns.items() if not any(map(one.fullmatch, written))] == []
    names = {*METRICS, "single", "metric", "scores", "weights", "averaged", "last"}
    names |= {"criterion", "tag", "level", "length", "generator"}
    assert names <= {*re.findall("`(.*?)`", section)}


def test_the_mean_of_weights_is_of_what_the_adapters_do(trained):
    """The mean of products, not the product of means."""
    paths = find(str(trained / "fast"), last=2, early=0).sources
    first, second, mean = (average_weights(folders).state_dict() for folders in ((paths[0],), (paths[1],), paths))
    changed = 0
    for name, tensor in mean.items():
        expected = (first[name].float() + second[name].float()) / 2
        torch.testing.assert_close(tensor.float(), expected, atol=1e-2, rtol=1e-2)  # to the backbone's rounding
        changed += int(not torch.equal(first[name], second[name]))
    assert changed > 2


def test_a_folder_without_checkpoints_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoints"):
        find(str(tmp_path / "empty"), last=2, early=0)
    (tmp_path / "empty" / "final.jsonl").write_text("")
    with pytest.raises(UserError, match="a step of its own in its name"):
        find(str(tmp_path / "empty"), last=2, early=0)
