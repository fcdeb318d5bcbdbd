"""What an audit looks like: one self-contained HTML page, and a table for the terminal.

Both read the audit's result alone (the content of audit.json); every number is made in `rm.audit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from rich import box
from rich.table import Table
from rich.text import Text

from rm import page
from rm.page import (
    BLUE,
    DASHED,
    GREY,
    INK,
    ORANGE,
    clip,
    cut,
    legend,
    listed,
    mark,
    number,
    percent,
    short,
    side,
    signed_interval,
    svg,
    with_band,
    with_interval,
)

_MODEL, _RAW = "model", "model (raw)"
_CRITERIA, _LEAST_VERDICTS = 15, 10  # criteria shown on the page, and verdicts that one needs for it
_GENERATORS = 12  # of the plot

_HEADLINES = (
    ("Criterion accuracy", "criterion", "accuracy", "on the judge's side of 0.5"),
    ("Pair accuracy", "reward", "pair_accuracy", "responses to one prompt put in the judge's order; chance is 0.5"),
    ("Pair accuracy in the tail", "reward", "tail_pair_accuracy", "the same, among the judge's favourites"),
)

# of two predictors side by side: what it is called, where it stands, and whether lower is better
_VERSUS_ROWS = (
    ("criterion accuracy", ("criterion", "accuracy"), False),
    ("kappa", ("criterion", "kappa"), False),
    ("Brier", ("criterion", "brier"), True),
    ("log-loss", ("criterion", "log_loss"), True),
    ("ECE", ("criterion", "ece"), True),
    ("Spearman", ("reward", "spearman"), False),
    ("Kendall", ("reward", "kendall"), False),
    ("pair accuracy", ("reward", "pair_accuracy"), False),
    ("tail pair accuracy", ("reward", "tail_pair_accuracy"), False),
)
# of these the verdict speaks
_IN_WORDS = ("criterion AUROC", "criterion concordance", "ECE", "pair accuracy", "tail pair accuracy")


@dataclass(frozen=True)
class _Order:
    """The number that tells how well verdicts are put in the judge's order, and how the page speaks of it."""

    key: str
    name: str
    hint: str
    claim: str


_OF_YES_NO = _Order(
    "auroc", "AUROC", "a met verdict scored above an unmet one; chance is 0.5", "It tells met from unmet criteria"
)
_OF_SOFT = _Order(  # on yes and no the same number
    "concordance",
    "concordance",
    "the higher of two verdicts scored higher, by how far they are apart; chance is 0.5",
    "It puts verdicts in the judge's order",
)


def _order(result: dict[str, Any]) -> _Order:
    return _OF_SOFT if result["soft"] else _OF_YES_NO


_REWARD_ROWS = (
    ("mean absolute error, uncalibrated", "error", "raw"),
    ("mean absolute error, verdicts calibrated", "error", "proxy"),
    ("mean absolute error, reward calibrated", "error", "calibrated"),
    ("model minus judge, verdicts calibrated", "bias", "proxy"),
    ("model minus judge, reward calibrated", "bias", "calibrated"),
    ("coverage of verdict intervals", "coverage", "verdict"),
    ("coverage of reward intervals", "coverage", "reward"),
    ("coverage of the lower bound", "coverage", "lower_bound"),
    ("width of reward intervals", "width", "reward"),
)


def render(result: dict[str, Any]) -> str:
    """The HTML page of an audit ``result``. Whatever its texts hold is escaped."""
    predictors = result["predictors"]
    other = next(iter(result["others"]), None)
    order = _order(result)
    headlines = ((f"Criterion {order.name}", "criterion", order.key, order.hint), *_HEADLINES)
    forest = {"width": 4.8, "height": max(2.6, 0.8 + 0.25 * len(predictors))}
    return page.render(
        "audit.html.jinja",
        audit=result,
        model=predictors[_MODEL],
        order=order,
        verdict=_verdict(result),
        other=other,
        versus=_versus_rows(result, other) if other is not None else [],
        reward_rows=_reward_rows(result.get("reward_level")),
        criteria=[(clip(row["criterion"], 200), row) for row in _worst_criteria(result["by_criterion"], order.key)],
        regrets=_regrets(result),
        lengths=[(f"{row['low']} to {row['high']}", row) for row in result["by_length"]],
        novelty=[(f"{of}, {side}", row) for of, sides in result["by_novelty"].items() for side, row in sides.items()],
        headlines=[(title, _get(predictors[_MODEL], kind, key), hint) for title, kind, key, hint in headlines],
        plots={
            "order": svg("order", lambda ax: _draw_forest(ax, predictors, "criterion", order.key), **forest),
            "tail": svg("tail", lambda ax: _draw_forest(ax, predictors, "reward", "tail_pair_accuracy"), **forest),
            "reliability": svg("reliability", lambda ax: _draw_reliability(ax, predictors, "reliability", _RAW)),
            "width": svg("width", lambda ax: _draw_reliability(ax, predictors, "reliability_by_width", _RAW)),
            "rewards": svg("rewards", lambda ax: _draw_rewards(ax, predictors)),
            "pairs": svg("pairs", lambda ax: _draw_pairs(ax, predictors[_MODEL]["reward"]["by_quantile"])),
            "tops": svg("tops", lambda ax: _draw_tops(ax, predictors, _RAW)),
        }
        | _regret_plots("regret", result, _strongest_baseline(result, "reward", "pair_accuracy"))
        | _generator_plots(result["by_generator"])
        | (_versus_plots(result, other) if other is not None else {})
        | _forecast_plots(result["forecast"])
        | _edit_plots(result.get("artefacts")),
    )


def _reward_rows(measured: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    return [(title, measured[kind][key]) for title, kind, key in _REWARD_ROWS] if measured else []


def summary_table(result: dict[str, Any]) -> Table:
    """The headline numbers of every predictor, for a terminal of 80 columns."""
    title = f"{result['prompts']} prompts, {result['responses']} responses, {result['verdicts']} verdicts"
    if result["masked"]:
        title += f" ({result['masked']} masked)"
    caption = f"[low high]: {result['level']:.0%} interval, {result['bootstrap']} resamples of prompts"
    sentences = [_turn_in_words(result["forecast"]), *_beside_all(result), *_flattered(result)]
    caption += "".join(f"\n{said}" for said in sentences)
    table = Table(title=title, caption=Text(caption), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("predictor")
    order = _order(result)
    for column in ("accuracy", order.name, "Brier", "Spearman", "tail pair acc."):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in result["predictors"].items():
        table.add_row(
            Text(name, style="bold" if name == _MODEL else ""),
            Text(short(one["criterion"]["accuracy"]["value"], 3)),
            Text(with_interval(one["criterion"][order.key])),
            Text(short(one["criterion"]["brier"]["value"], 3)),
            Text(short(one["reward"]["spearman"]["value"], 3)),
            Text(with_interval(one["reward"]["tail_pair_accuracy"]["half"])),
        )
    return table


def _get(predictor: dict[str, Any], kind: str, key: str) -> dict[str, Any]:
    """One estimate; of a pair accuracy, the one where predicted ties count half."""
    found = predictor[kind][key]
    return found.get("half", found)


def _turn_in_words(forecast: dict[str, Any]) -> str:
    """One sentence on the KL at which a policy would begin to lose the judge's reward."""
    turn, prompts = forecast["turn"], forecast["prompts"]
    if not turn["reach"]:
        return "Where gold, the judge's reward, turns cannot be told: too few responses a prompt, or too alike."
    reach = f"KL {number(turn['reach'], 2)}, as far as these responses can tell"
    if turn["outcome"] == "turns":
        kl = turn["kl"]
        at = f"{number(kl['value'], 2)} [{number(kl['low'], 2)}, {number(kl['high'], 2)}]"
        return f"Gold is expected to turn at KL {at}: beyond it a policy loses the judge's reward."
    if turn["outcome"] == "rises":
        return f"Gold, the judge's reward, is not expected to turn up to {reach}."
    seen = "" if turn["share"] is None else f": it does in {turn['share']:.0%} of their resamples"
    return f"Whether gold, the judge's reward, turns up to {reach}, cannot be said of {prompts} prompts{seen}."


def _strongest_baseline(result: dict[str, Any], kind: str, key: str) -> str | None:
    """The baseline with the highest defined number of that name."""
    value = {name: _get(one, kind, key)["value"] for name, one in result["predictors"].items()}
    rivals = [name for name in value if name not in (_MODEL, _RAW, *result["others"]) and value[name] is not None]
    return max(rivals, key=lambda name: value[name], default=None)


# --- the verdict in words --------------------------------------------------------------------------------------------


def _verdict(result: dict[str, Any]) -> list[str]:
    """What the audit says, a sentence each: beside the baselines, in the tail, calibrated, optimised, beside others."""
    ours = result["predictors"][_MODEL]
    said = []
    order = _order(result)
    value, best = ours["criterion"][order.key]["value"], _strongest_baseline(result, "criterion", order.key)
    if value is not None and best is not None:
        theirs = result["predictors"][best]["criterion"][order.key]["value"]
        gap = result["model_minus"][best][order.key]
        numbers = f"{order.name} {number(value)} against {number(theirs)}, {signed_interval(gap)}"
        said.append(f"{order.claim} {_than(gap)} the strongest baseline, {best}: {numbers}.")
    tail = ours["reward"]["tail_pair_accuracy"]["half"]
    if tail["value"] is not None:
        from_chance = {key: None if tail[key] is None else tail[key] - 0.5 for key in ("value", "low", "high")}
        share = f"{percent(tail['value'])}{_percents(tail)} of the pairs"
        among = f"Among each prompt's top {percent(result['tail'])} by the judge"
        said.append(f"{among} it puts {share} in the judge's order: {_than(from_chance)} chance.")
    ece = ours["criterion"]["ece"]
    said.append(f"Its probabilities are {number(100 * ece['value'], 1)} points off on average{_ends(ece, 100)} (ECE).")
    said.append(_turn_in_words(result["forecast"]))
    return said + _beside_all(result) + _flattered(result)


def _beside(result: dict[str, Any], name: str) -> str:
    """Where the model is ahead of another predictor, where behind, and where the two cannot be told apart."""
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "": []}
    for row in _versus_rows(result, name):
        if row["title"] in _IN_WORDS and row["minus"]["value"] is not None:
            found[row["side"]].append(f"{row['title']} ({signed_interval(row['minus'])})")
    parts = [f"the model is {where} in {listed(found[where])}" for where in ("ahead", "behind") if found[where]]
    parts += [f"the two cannot be told apart in {listed(found[''])}"] if found[""] else []
    return f"Beside {name}, {'; '.join(parts) or 'nothing can be compared'}."


def _beside_all(result: dict[str, Any]) -> list[str]:
    return [_beside(result, name) for name in result["others"]]


def _flattered(result: dict[str, Any]) -> list[str]:
    """One sentence if the model was made on these very verdicts, else none."""
    if result.get("facts", {}).get("split") != "validation":
        return []
    return [
        "These prompts are the validation split, on which training chose its checkpoint and calibration fits its maps, "
        "so the numbers flatter the model: the test split tells what it is worth."
    ]


def _than(gap: dict[str, Any]) -> str:
    return {"ahead": "better than", "behind": "worse than", "": "not measurably better than"}[side(gap)]


def _ends(one: dict[str, Any], scale: float) -> str:
    return "" if one["low"] is None else f" [{number(scale * one['low'], 1)}, {number(scale * one['high'], 1)}]"


def _percents(one: dict[str, Any]) -> str:
    return "" if one["low"] is None else f" [{percent(one['low'])}, {percent(one['high'])}]"


def _versus_rows(result: dict[str, Any], other: str) -> list[dict[str, Any]]:
    """The model and another predictor side by side, a measure a row; what "model minus other" says of it."""
    pair, minus = (result["predictors"][_MODEL], result["predictors"][other]), result["model_minus"][other]
    order = _order(result)
    first = (f"criterion {order.name}", ("criterion", order.key), False)
    rows = [
        (title, *(_get(one, *at) for one in pair), minus[at[1]], lower) for title, at, lower in (first, *_VERSUS_ROWS)
    ]
    for kind, title, lower in (
        ("precision", "precision at", False),
        ("regret", "regret of the best of", True),
        ("exploitation", "exploitation, top", True),
    ):
        sizes = [key for key, found in result["selection"][kind].items() if found["prompts"]]
        rows += [(f"{title} {n}", *(one["reward"][kind][n] for one in pair), minus[kind][n], lower) for n in sizes]
    return [
        {"title": title, "ours": ours, "theirs": theirs, "minus": gap, "side": side(gap, lower), "lower": lower}
        for title, ours, theirs, gap, lower in rows
    ]


def _worst_criteria(rows: Sequence[dict[str, Any]], order: str) -> list[dict[str, Any]]:
    """The criteria with the lowest ``order``, among those with enough verdicts to have one worth looking at."""
    known = [row for row in rows if row[order]["value"] is not None and row["verdicts"] >= _LEAST_VERDICTS]
    return sorted(known, key=lambda row: row[order]["value"])[:_CRITERIA]


def artefact_table(result: dict[str, Any]) -> Table:
    """What the edits and the rubric swap did, for a terminal of 80 columns."""
    found = result["artefacts"]
    caption = _swap_line(found["swap"]) if found["swap"] else "no rubric swap: all responses have the same rubric"
    layout: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title="edits that make no response better", caption=Text(caption), **layout)
    table.add_column("edit")
    for column in ("proxy", "gold", "proxy rises", "exploited"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found["edits"].items():
        judged = row["judged"]
        gold, exploited = (judged["gold_change"], judged["exploited"]) if judged else (None, None)
        cells = (with_interval(row["proxy_change"], signed=True), with_interval(gold, signed=True))
        shares = (percent(row["raised"]["value"]), percent(exploited["value"] if exploited else None))
        table.add_row(Text(name), *map(Text, (*cells, *shares)))
    return table


def _swap_line(swap: dict[str, Any]) -> str:
    line = f"under another rubric the proxy goes from {short(swap['proxy_own']['value'], 3)}"
    line += f" to {short(swap['proxy_swapped']['value'], 3)}"
    if judged := swap["judged"]:
        line += f", gold from {short(judged['gold_own']['value'], 3)}"
        line += f" to {short(judged['gold_swapped']['value'], 3)};"
        line += f" where gold moves the proxy follows on {percent(judged['follows']['value'])}"
    return line


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw_forest(ax: Axes, predictors: dict[str, Any], kind: str, key: str) -> None:
    names = [name for name, one in predictors.items() if _get(one, kind, key)["value"] is not None]
    for height, name in enumerate(reversed(names)):
        one = _get(predictors[name], kind, key)
        colour = BLUE if name == _MODEL else ORANGE if name == _RAW else GREY
        if one["low"] is not None:
            ax.plot([one["low"], one["high"]], [height, height], color=colour, linewidth=2, solid_capstyle="round")
        ax.plot(one["value"], height, "o", color=colour, markersize=6)
        ax.annotate(f"{one['value']:.3f}", (1.02, height), xycoords=("axes fraction", "data"), va="center")
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    ax.set_yticks(range(len(names)), [cut(name) for name in reversed(names)])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _draw_reliability(ax: Axes, predictors: dict[str, Any], key: str, beside: str) -> None:
    _diagonal(ax)
    for name, colour, marker in ((beside, ORANGE, "s"), (_MODEL, BLUE, "o")):
        if name in predictors:
            points = predictors[name]["criterion"][key]
            places = np.array([point["predicted"]["value"] for point in points])
            _with_bars(ax, places, [point["judged"] for point in points], colour, marker, name)
    ax.set(xlabel="mean predicted probability", ylabel="mean verdict of the judge")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    ax.legend(loc="upper left")


def _draw_rewards(ax: Axes, predictors: dict[str, Any]) -> None:
    rows = predictors[_MODEL]["reward"]["by_quantile"]
    places = np.arange(len(rows))
    gold = [row["gold"]["value"] for row in rows]
    ax.plot(places, gold, color=INK, marker="D", markersize=5, linewidth=1.2, linestyle=(0, (4, 2)), label="judge")
    for name, colour, marker, shift in ((_RAW, ORANGE, "s", 0.06), (_MODEL, BLUE, "o", -0.06)):
        if name in predictors:
            found = predictors[name]["reward"]["by_quantile"]
            _with_bars(ax, places + shift, [row["proxy"] for row in found], colour, marker, name)
    _bin_axis(ax, rows)
    ax.set(ylabel="mean reward", ylim=(-0.03, 1.03))
    ax.legend(loc="upper left")


def _draw_pairs(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    defined = [
        (place, row["pair_accuracy"]) for place, row in enumerate(rows) if row["pair_accuracy"]["value"] is not None
    ]
    _with_bars(
        ax, np.array([place for place, _ in defined]), [one for _, one in defined], BLUE, "o", _MODEL, line=False
    )
    for place, row in enumerate(rows):
        ax.annotate(f"{row['pairs']} pairs", (place, 0.02), ha="center", va="bottom", fontsize=7, color=GREY)
    _bin_axis(ax, rows)
    ax.set(ylabel="pair accuracy", ylim=(0, 1.03))


def _draw_tops(ax: Axes, predictors: dict[str, Any], beside: str) -> None:
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    tops = list(predictors[_MODEL]["reward"]["top_pair_accuracy"])
    for name, colour, marker, shift in ((beside, ORANGE, "s", 0.06), (_MODEL, BLUE, "o", -0.06)):
        if name in predictors:
            reward = predictors[name]["reward"]
            found = [*(reward["top_pair_accuracy"][top]["half"] for top in tops), reward["pair_accuracy"]["half"]]
            _with_defined(ax, np.arange(len(found)) + shift, found, colour, marker, name)
    ax.set_xticks(range(len(tops) + 1), [*(f"top {top}" for top in tops), "all"])
    ax.set(ylabel="pair accuracy", ylim=(0, 1.03), xlim=(-0.5, len(tops) + 0.5))
    legend(ax, "lower right")


def _generator_plots(rows: dict[str, Any]) -> dict[str, Markup]:
    """The bias of the generators with most responses; none without rewards."""
    known = {name: row for name, row in rows.items() if row["bias"]["value"] is not None}
    names = sorted(known, key=lambda name: -known[name]["responses"])[:_GENERATORS]
    shown = {name: known[name]["bias"] for name in sorted(names)}
    height = 0.9 + 0.25 * len(shown)
    return (
        {"generators": svg("generators", lambda ax: _draw_bias(ax, shown), width=4.8, height=height)} if shown else {}
    )


def _draw_bias(ax: Axes, biases: dict[str, dict[str, Any]]) -> None:
    ax.axvline(0, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    for height, one in enumerate(reversed(biases.values())):
        if one["low"] is not None:
            ax.plot([one["low"], one["high"]], [height, height], color=BLUE, linewidth=2, solid_capstyle="round")
        ax.plot(one["value"], height, "o", color=BLUE, markersize=6)
    ax.set_yticks(range(len(biases)), [cut(name) for name in reversed(biases)])
    ax.set(xlabel="model's reward minus the judge's", ylim=(-0.6, len(biases) - 0.4))
    ax.tick_params(axis="y", length=0)


def _regrets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sizes of best-of-n that some prompt has the responses for."""
    return {n: found for n, found in result["selection"]["regret"].items() if found["prompts"]}


def _regret_plots(name: str, result: dict[str, Any], beside: str | None) -> dict[str, Markup]:
    return {name: svg(name, lambda ax: _draw_regret(ax, result, beside))} if _regrets(result) else {}


def _versus_plots(result: dict[str, Any], other: str) -> dict[str, Markup]:
    """The plots of the model and another predictor; reliability only of one that answers criteria."""
    predictors = result["predictors"]
    plots = {"versus_tops": svg("versus_tops", lambda ax: _draw_tops(ax, predictors, other))}
    if result["others"][other]["answers"]:
        key = "versus_reliability"
        plots[key] = svg(key, lambda ax: _draw_reliability(ax, predictors, "reliability", other))
    return plots | _regret_plots("versus_regret", result, other)


def _draw_regret(ax: Axes, result: dict[str, Any], beside: str | None) -> None:
    by_chance = {n: row["by_chance"] for n, row in _regrets(result).items()}
    rows = [("by chance", by_chance, GREY, ".", 0.0)]
    for name, colour, marker, shift in ((beside, ORANGE, "s", 0.05), (_MODEL, BLUE, "o", -0.05)):
        if name is not None:
            rows.append((name, result["predictors"][name]["reward"]["regret"], colour, marker, shift))
    for name, found, colour, marker, shift in rows:
        _with_defined(ax, np.arange(len(by_chance)) + shift, [found[n] for n in by_chance], colour, marker, name)
    ax.set_xticks(range(len(by_chance)), list(by_chance))
    ax.set(xlabel="best of n", ylabel="judge's reward lost", xlim=(-0.5, len(by_chance) - 0.5))
    ax.set_ylim(bottom=0)
    legend(ax, "upper left")


def _edit_plots(found: dict[str, Any] | None) -> dict[str, Markup]:
    if found is None:
        return {}
    return {"edits": svg("edits", lambda ax: _draw_edits(ax, found["edits"]), width=4.8, height=2.6)}


def _draw_edits(ax: Axes, edits: dict[str, Any]) -> None:
    ax.axvline(0, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    for height, row in enumerate(reversed(edits.values())):
        sides = [("model", row["proxy_change"], BLUE, "o", 0.12)]
        if row["judged"]:
            sides = [
                ("model", row["judged"]["proxy_change"], BLUE, "o", 0.12),
                ("judge", row["judged"]["gold_change"], INK, "D", -0.12),
            ]
        for name, one, colour, marker, shift in sides:
            if one["low"] is not None:
                ax.plot([one["low"], one["high"]], [height + shift] * 2, color=colour, linewidth=1.6, alpha=0.7)
            ax.plot(one["value"], height + shift, marker, color=colour, markersize=5, label=None if height else name)
    ax.set_yticks(range(len(edits)), list(reversed(edits)))
    ax.set(xlabel="change of the mean reward", ylim=(-0.6, len(edits) - 0.4))
    ax.tick_params(axis="y", length=0)
    legend(ax, "best")


def _with_defined(
    ax: Axes, x: np.ndarray, estimates: Sequence[dict[str, Any]], colour: str, marker: str, name: str
) -> None:
    """`_with_bars` of what is defined."""
    defined = [place for place, one in enumerate(estimates) if one["value"] is not None]
    _with_bars(ax, x[defined], [estimates[place] for place in defined], colour, marker, name)


def _forecast_plots(forecast: dict[str, Any]) -> dict[str, Markup]:
    """The plots of the forecast by name; none without prompts that allow one."""
    if not forecast["rows"]:
        return {}
    return {
        "forecast": svg("forecast", lambda ax: _draw_forecast(ax, forecast), width=4.8),
        "best_of_n": svg("best_of_n", lambda ax: draw_best_of_n(ax, forecast["best_of_n"]["rows"]), width=4.8),
    }


def _draw_forecast(ax: Axes, forecast: dict[str, Any]) -> None:
    """Expected rewards against KL; beyond what the responses can tell, dotted and without a band."""
    rows = forecast["rows"]
    reached = sum(row["reliable"] for row in rows)
    kl = [row["kl"]["value"] for row in rows]
    for key, name, colour, style in (("proxy", _MODEL, BLUE, "-"), ("gold", "judge", INK, (0, (4, 2)))):
        with_band(ax, kl[:reached], [row[key] for row in rows[:reached]], colour, style, name)
        beyond = slice(max(reached - 1, 0), None)
        values = [row[key]["value"] for row in rows[beyond]]
        ax.plot(kl[beyond], values, color=colour, linewidth=1, linestyle=(0, (1, 2)), alpha=0.6)
    if forecast["turn"]["outcome"] == "turns":
        mark(ax, forecast["turn"]["kl"]["value"], "gold turns")
    ax.set(xlabel="KL from the base policy, nats", ylabel="expected reward")
    ax.legend(loc="upper left")


def draw_best_of_n(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Expected rewards of the best of n; of the judge only where there are its rewards."""
    sizes = [row["n"] for row in rows]
    with_band(ax, sizes, [row["proxy"] for row in rows], BLUE, "-", "model, of its choice")
    if rows[0]["gold"]["value"] is not None:
        with_band(ax, sizes, [row["gold"] for row in rows], INK, (0, (4, 2)), "judge, of the same choice")
        best = [row["best_gold"]["value"] for row in rows]
        ax.plot(sizes, best, color=GREY, linewidth=1, label="judge, of its own choice")
    ax.set(xlabel="n, responses to choose from", ylabel="expected reward of the best")
    ax.legend(loc="lower right")


def _with_bars(
    ax: Axes, x: np.ndarray, estimates: Sequence[dict[str, Any]], colour: str, marker: str, name: str, line: bool = True
) -> None:
    for place, one in zip(x, estimates, strict=True):
        if one["low"] is not None:
            ax.plot([place, place], [one["low"], one["high"]], color=colour, linewidth=1.4, alpha=0.6)
    style, label = "-" if line else "none", cut(name)
    ax.plot(
        x, [one["value"] for one in estimates], color=colour, marker=marker, markersize=5, linestyle=style, label=label
    )


def _bin_axis(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    def span(row: dict[str, Any]) -> str:
        low, high = short(row["low"], 2), short(row["high"], 2)
        return low if low == high else f"{low}–{high}"

    ax.set_xticks(range(len(rows)), [span(row) for row in rows], fontsize=8)
    ax.set(xlabel="reward given by the judge", xlim=(-0.5, len(rows) - 0.5))


def _diagonal(ax: Axes) -> None:
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
