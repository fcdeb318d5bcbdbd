"""The page of an RL run, and of several: what it tells, by hand; hostile texts; the command."""

import math
import re
from dataclasses import replace

import pytest

from policy import comparison, run_page
from policy.cli import main
from policy.run_digest import (
    against_kl,
    criterion_curves,
    criterion_sides,
    furthest_pairs,
    overrated,
    pairs_of,
    verdict,
)
from policy.run_folder import METRICS, read_run
from policy.run_page import LivePage
from rubric_data.errors import UserError
from tests.policy.runs import write_run
from tests.rm.test_report import HOSTILE, Page


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of six updates that has ended, with an alarm at the last."""
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "ended"))


def look(step, kl, gold, half=None, proxy=0.5):
    low, high = (None, None) if half is None else (gold - half, gold + half)
    rewards = {"reward/proxy": proxy, "reward/gold": gold, "reward/gold_low": low, "reward/gold_high": high}
    return {"step": step, "kl": kl, **rewards}


def test_neighbouring_looks_are_averaged():
    looks = [look(1, 0.0, 0.4, 0.3), look(2, 1.0, 0.6, 0.4), look(3, None, 0.9), look(4, 2.0, 0.5, None, None)]
    first, second = against_kl(looks, 2)
    assert (first.kl, first.proxy) == (0.5, 0.5)
    # half of the interval: sqrt(.09 + .16) / 2
    assert first.gold == pytest.approx({"value": 0.5, "low": 0.25, "high": 0.75})
    assert (second.kl, second.proxy, second.gold) == (2.0, None, {"value": 0.5, "low": None, "high": None})
    assert [point.kl for point in against_kl(looks, 9)] == [0.0, 1.0, 2.0]
    assert against_kl([], 9) == []


def test_criteria_by_change_and_by_side(ended):
    rows = [{"criteria/a": value, "criteria/b": 1 - value} for value in (0.0, 0.1, 0.2, 0.3, 0.8)]
    rows[0]["criteria/b"] = None
    b, a = criterion_curves(rows)  # four values of b, five of a
    assert (b.name, b.first, b.last) == ("b", 0.9, pytest.approx(0.2))
    assert (a.name, a.first, a.last, a.change) == ("a", pytest.approx(0.05), pytest.approx(0.55), pytest.approx(0.5))
    assert [(one.name, one.answers, one.model, one.judge) for one in criterion_sides(ended.rollouts)] == [
        ("plain 1", 12, pytest.approx(0.4875), 0.0),
        ("plain 0", 12, pytest.approx(0.9), 1.0),
    ]


def test_pairs_and_rollouts_that_are_read(ended):
    pairs = pairs_of(ended.samples)
    assert len(pairs) == 6 and math.isnan(pairs[1].gold)
    gained = furthest_pairs(pairs, lambda pair: pair.gold, 9)
    assert [(pair.prompt_id, pair.gold, pair.proxy) for pair in gained] == [("q2 plain", 0.25, 0.25)]
    (lost,) = furthest_pairs(pairs, lambda pair: -pair.gold, 9)
    assert (lost.prompt_id, lost.before["text"], lost.after["text"]) == ("q0 plain", "before 0 plain", "after 0 plain")
    parted = furthest_pairs(pairs, lambda pair: pair.proxy - pair.gold, 1)
    assert [pair.prompt_id for pair in parted] == ["q0 plain"]
    worst = overrated(ended.rollouts, 3)
    assert [(one.step, one.record.prompt_id, round(one.proxy - one.gold, 6)) for one in worst] == [
        (6, "p1 plain", 0.5),
        (6, "p2 plain", 0.5),
        (5, "p1 plain", 0.416667),
    ]


def test_the_verdict_in_words(ended):
    assert verdict(ended) == [
        "On 3 held-out prompts the judge's reward (gold) rose from 0.400 to 0.500: +0.100 [+0.050, +0.150].",
        "The reward model's (proxy) rose from 0.400 to 0.700: +0.300 [+0.250, +0.350]. "
        "It gained more than gold, so the two part: proxy less gold +0.200 [+0.100, +0.300].",
        "Gold declined: an alarm at update 6, and training was left to go on.",
        "It spent a KL of 6.00 nats a response. Gold was best about update 3, KL 2.12, where the rollouts earned "
        "0.656 [0.58, 0.74].",
        "Responses went from 35.0 to 21.5 tokens; 90% end by themselves, 50% before.",
    ]


def test_a_run_that_goes_on_and_one_that_was_resumed_have_no_gains(tmp_path):
    folder = write_run(tmp_path / "on", steps=9, done=2, method="GRPO")
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 3, "rew')  # it is being written
    run = read_run(folder)
    assert (run.method, len(run.rows), len(run.rollouts)) == ("GRPO", 2, 4)
    assert verdict(run)[0].startswith("Update 2 of 9; held-out prompts are answered again at the end. The judge's")
    assert verdict(run)[1] == "No alarm in 2 looks of the judge."
    page = Page(run_page.render(run))
    assert page.open == [] and "Gold now" in page.text and "Gained most" not in page.text
    resumed = write_run(tmp_path / "resumed")
    lines = (resumed / METRICS).read_text().splitlines()
    (resumed / METRICS).write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert read_run(resumed).result is None and read_run(resumed).samples == []


def test_rolled_back_stopped_and_drifting_runs_say_so(tmp_path):
    runs = {way: read_run(write_run(tmp_path / way, on_alarm=way)) for way in ("rollback", "stop")}
    assert "and the policy was given back what it was at update 3." in verdict(runs["rollback"])[2]
    assert verdict(runs["stop"])[2] == "Gold declined: an alarm at update 6, and training ended."
    run = read_run(write_run(tmp_path / "drifts", steps=4))
    run.rows[2]["alarm"] = "divergence"
    assert verdict(run)[2] == "Proxy and gold drifted apart: a warning at update 3."


def test_what_is_undefined_is_a_dash_or_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=4))
    for row in run.rows:
        row |= {"reward/gold_low": None, "reward/gold_high": None, "kl": None, "best_step": None}
    run.result.update(kl_final=None, gold_gain=dict.fromkeys(("value", "low", "high")))
    assert verdict(run)[0].endswith("is unknown: no prompt has it before and after.")
    assert verdict(run)[2] == "No alarm was possible: no look of the judge has an interval."
    page = Page(run_page.render(run))
    assert page.open == [] and "–" in page.text and page.tags.count("svg") == 3 + 2  # no KL
    assert "None" not in page.text and not re.search(r"\bnan\b", page.text)
    page = Page(comparison.render(comparison.compare([run, replace(run, folder=tmp_path / "twin")])))
    assert page.open == [] and "svg" not in page.tags and "None" not in page.text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Two runs that differ in their seeds, all their texts hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    names = ("<b>one", "two")
    return [read_run(write_run(folder / name, text=HOSTILE, seed=place)) for place, name in enumerate(names)]


def check_page(source):
    """A page that obeys none of its texts, asks nothing of the network, and has ids of its own."""
    page = Page(source)
    assert page.open == []
    assert not {"script", "img"} & {*page.tags} and "<b>one" not in source
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    asking = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "srcset", "data"}]
    assert all(value.startswith("#") for value in asking)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})
    assert "1337" not in page.text and "@import" not in source and "#0a0b0c" not in source
    return page


def test_hostile_texts_are_shown_and_never_obeyed(hostile):
    page = check_page(run_page.render(hostile[0]))
    # criteria and prompts; responses before, after and judged; the configuration
    assert page.text.count(HOSTILE) > 30 and "PPO run <b>one" in page.text
    page = check_page(comparison.render(comparison.compare(hostile)))
    assert "<b>one" in page.text


def test_the_page_holds_the_runs_numbers_and_every_part(ended):
    source = run_page.render(ended)
    page = check_page(source)
    assert "Gold gained+0.100[0.05, 0.15]the judge's reward on 3 held-out prompts" in page.text
    assert "Alarmdeclineat update 6" in page.text and "commit0123456789, changed" in page.text
    for part in ("Reward", "Policy", "Criterion by criterion", "Model and judge", "Gained most", "Lost most"):
        assert part in page.text
    assert page.tags.count("svg") == 5 + 2 and page.tags.count("polyline") == 2
    assert "Parted most" in page.text and "Overrated rollouts" in page.text and "ppo_epochs: 2" in page.text


def test_runs_side_by_side(hostile, tmp_path):
    runs = [*hostile, read_run(write_run(tmp_path / "three", method="RLOO", done=1))]
    runs[1].result["gold_gain"] = {"value": 0.25, "low": 0.2, "high": 0.3}
    compared = comparison.compare(runs)
    assert compared[0].colour == compared[1].colour != compared[2].colour
    assert [one.ahead and one.ahead["value"] for one in compared] == [None, 0.0, None]
    assert comparison.compared_in_words(compared) == [
        "On held-out prompts two (+0.250 [+0.200, +0.300] at KL 6.00) gained the most gold, <b>one (+0.100 [+0.050, "
        "+0.150] at KL 6.00) the least.",
        # mean .175, standard deviation .106, t(1) = 12.7
        "On average over seeds, gold gained +0.175 [−0.778, +1.128] by <b>one and 1 more.",
        "Proxy gained measurably more than gold in <b>one and two.",
        "Gold declined in <b>one (update 6) and two (update 6).",
        "Not ended, hence without gains: three (update 1).",
    ]
    assert comparison.differing(runs[:2]) == {"seed": ["0", "1"]}
    assert {"command", "normalise"} < {*comparison.differing(runs)}
    assert comparison.short_names([tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"]) == ["a/ppo", "b/ppo"]
    with pytest.raises(UserError, match="is there twice"):
        comparison.compare([runs[0], runs[0]])


def test_the_command(tmp_path, capsys):
    one, two = (str(write_run(tmp_path / name, steps=3, seed=place)) for place, name in enumerate(("one", "two")))
    assert main(["page", "--runs", f"[{one}]"]) == 0
    assert "rose from 0.400 to 0.500" in capsys.readouterr().out and (tmp_path / "one" / "run.html").exists()
    output = str(tmp_path / "page.html")
    both = ["page", "--runs", f"[{one}, {two}]"]
    assert main([*both, "--output", output]) == 0
    printed = capsys.readouterr().out
    assert "+.100 [+.05 +.15]" in printed and f"written: {output}" in printed
    for arguments, message in (
        (both, "say where: --output page.html"),
        ([*both, "--output", output], "exists already"),
        (["page", "--runs", f"[{tmp_path}]"], "holds no run of ppo, grpo, rloo or online-dpo"),
        (["page", "--runs", "[]"], "needs a run folder at least"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_live_page_takes_a_twentieth_of_the_time_and_ends_no_run(tmp_path, monkeypatch, caplog):
    now, made = [100.0], []

    def write(folder):
        made.append(folder)
        now[0] += 2.0
        if len(made) == 2:
            raise KeyError("reward/proxy")

    monkeypatch.setattr(run_page.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run_page, "write_page", write)
    live = LivePage(tmp_path)
    assert live.refresh() == 2.0 and len(made) == 1
    now[0] = 139.9
    assert live.refresh() == 0.0 and len(made) == 1
    now[0] = 140.1
    assert live.refresh() == pytest.approx(2.0) and len(made) == 2
    assert "could not be written; the run goes on" in caplog.text
