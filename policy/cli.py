"""The command line, `rubric-rm COMMAND`: help, options, errors, log settings. Every stage's work is elsewhere.

Never imports torch: a stage's module is imported only once its options are known to be right.
"""

import importlib.metadata
import inspect
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from policy.config import (
    DEMO_SETS,
    BonConfig,
    CurriculumConfig,
    DemoConfig,
    GrpoConfig,
    OnlineDpoConfig,
    PageConfig,
    PolicyConfig,
    RlooConfig,
)
from policy.options import build_parser, parse, to_yaml, width_of_help
from rm.config import (
    DEFEND_SETS,
    REFINE_SETS,
    AuditConfig,
    CalibrateConfig,
    DefendConfig,
    FilterConfig,
    RedistilConfig,
    RefineConfig,
    RouteConfig,
    ScoreConfig,
    SnrConfig,
    TailConfig,
    TrainConfig,
)
from rm.memory import keep_memory
from rubric_data.config import (
    AblateConfig,
    AttachConfig,
    ConsistencyConfig,
    DataExportConfig,
    DataImportConfig,
    DataLevelsConfig,
    DataSplitConfig,
    DiffConfig,
    GenerateConfig,
    InteractionsConfig,
    JudgeConfig,
    LedgerExportConfig,
    LedgerStatsConfig,
    LedgerVerifyConfig,
    LintConfig,
    MergeConfig,
)
from rubric_data.errors import UserError

PROGRAM = "rubric-rm"


@dataclass(frozen=True)
class Stage:
    """One subcommand: its config, the function that runs it, and what its help says beyond the options."""

    config: type
    run: str  # "module:function", imported when it is called
    about: str
    example: str
    hidden: tuple[str, ...] = ()  # config keys the stage sets itself
    recipe: str | None = None  # the recipe used when no --config is given
    tabulates: bool = False  # the stage prints its own closing table
    quick: bool = False  # a look at something, not a job: no recipe, and its configuration is not shown


STAGES = {
    "data import": Stage(
        DataImportConfig,
        "rubric_data.formats.commands:run_import",
        "Nothing is dropped silently: report.json counts what was left out, by reason. Reference answers become "
        "responses of generator 'reference'. A path never goes to the network; owner/name does.",
        "--format rar --input ScaleAI/RaR-Medicine --output runs/rar",
    ),
    "data split": Stage(
        DataSplitConfig,
        "rubric_data.formats.commands:run_split",
        "Prompts that share an id, a text or a rubric stay together. `judge` does the same with the defaults.",
        "--data runs/rar/responses.jsonl --output runs/rar/split.jsonl",
    ),
    "data levels": Stage(
        DataLevelsConfig,
        "rubric_data.grading:run_levels",
        "A criterion gets them if one of its verdicts lies between 0 and 1. Shares of votes are no scale: leave them.",
        "--data graded.jsonl --labels '[fails, partial, met]' --output runs/graded.jsonl",
    ),
    "data export": Stage(
        DataExportConfig,
        "rubric_data.formats.commands:run_export",
        "What the format has no place for is counted at the end. Pairs that tie and responses without a reward make no "
        "preferences.",
        "--format preferences --data runs/judge/judged.jsonl --output runs/pairs.jsonl",
    ),
    "rubric generate": Stage(
        GenerateConfig,
        "rubric_data.generate:run_generate",
        "The reply must be JSON of a fixed form; one that is not is asked for once more, and a prompt without a "
        "readable reply keeps the rubric it came with. Replies are kept as they come in, so an interrupted run goes on "
        "with --resume true and pays nothing twice.",
        "--data prompts.jsonl --model gpt-5-mini --output runs/rubrics",
    ),
    "rubric lint": Stage(
        LintConfig,
        "rubric_data.lint:run_lint",
        "Every finding comes with its reason; docs/rubrics.md explains the rules.",
        "--data runs/rubrics/prompts.jsonl",
        quick=True,
    ),
    "rubric refine": Stage(
        RefineConfig,
        "rm.refining:run_refine",
        "A proposer sees prompt, rubric and the two best responses not shown before, and writes the rubric anew. It is "
        "taken if it tells the two apart better; otherwise the one before stays. docs/rubrics.md has the rules.",
        "--data my.jsonl --rubrics runs/rubrics/prompts.jsonl --model gpt-5-mini --judge.judge openai "
        "--judge.model gpt-5-mini --output runs/refine",
        hidden=REFINE_SETS,
        tabulates=True,
    ),
    "rubric attach": Stage(
        AttachConfig,
        "rubric_data.attaching:run_attach",
        "Prompts are matched by their id. Where the file has no rubric, responses keep their own; those with none are "
        "left out and counted. Verdicts on another rubric are dropped.",
        "--data responses.jsonl --rubrics runs/rubrics/prompts.jsonl --output with-rubrics.jsonl",
    ),
    "rubric diff": Stage(
        DiffConfig,
        "rubric_data.diff:run_diff",
        "Marks: - removed, + added, ~ reworded (with its closest match below), = another weight.",
        "--before runs/rubrics/prompts.jsonl --after runs/refine/prompts.jsonl",
        quick=True,
    ),
    "judge": Stage(
        JudgeConfig,
        "rm.judging:run_judge",
        "Criteria with a verifier are answered by code, unless --use_verifiers false. "
        "Every verdict goes into a ledger first, so an interrupted run goes on with --resume true and nothing is "
        "asked twice. An answer that fails or cannot be read is masked with its reason; it never counts as 'not met'.",
        "--data my.jsonl --judge openai --model gpt-5-mini --output runs/judge",
    ),
    "rubric consistency": Stage(
        ConsistencyConfig,
        "rubric_data.consistency:run_consistency",
        "Compares the responses to one prompt pair by pair; pairs that people or verdicts tie on are counted "
        "apart. A criterion is reported by a one-sided binomial test, or by its share of agreement.",
        "--data judged.jsonl --output runs/consistency",
        tabulates=True,
    ),
    "rubric ablate": Stage(
        AblateConfig,
        "rubric_data.ablation:run_ablate",
        "Shows how pair accuracy against people, ties at the top and the gap between the two best change without it, "
        "and how far it says what the others say, on the prompts that ask it. What is best done without comes first, "
        "what changes nothing last.",
        "--data runs/judge/judged.jsonl --output runs/ablate",
        tabulates=True,
    ),
    "rubric interactions": Stage(
        InteractionsConfig,
        "rubric_data.interactions:run_interactions",
        "Explains the overall verdict beyond the weighted mean of the other criteria by products of two verdicts "
        "each (ridge regression), and says how much is left unexplained on held-out prompts.",
        "--data runs/judge/judged.jsonl --output runs/interactions.json",
    ),
    "data filter": Stage(
        FilterConfig,
        "rm.filtering:run_filter",
        "A prompt that every response solves, or none, teaches a policy nothing. Prompts of the validation and test "
        "splits are passed on untouched. kept.jsonl is what `ppo` and `train` read.",
        "--data runs/judge/judged.jsonl --output runs/filter",
    ),
    "data merge": Stage(
        MergeConfig,
        "rubric_data.merging:run_merge",
        "Every judge has answered the same file, each in a run of its own. Questions are matched by their content; "
        "human verdicts are kept. Criteria on which the judges hardly agree are flagged in report.json and in a table.",
        "--data '[runs/a/judged.jsonl, runs/b/judged.jsonl]' --output runs/panel",
    ),
    "ledger stats": Stage(
        LedgerStatsConfig,
        "rubric_data.ledger_view:run_stats",
        "Verdicts, their mean, masked ones and calls without an answer by kind of reason, first and last time.",
        "--ledger runs/judge/ledger.sqlite",
        tabulates=True,
        quick=True,
    ),
    "ledger export": Stage(
        LedgerExportConfig,
        "rubric_data.ledger_view:run_export",
        "Rows come in the order they were written: key, judge, template, vote, criterion_id, value, masked, raw, "
        "created. Calls that brought no answer are no verdicts and stay behind.",
        "--ledger runs/judge/ledger.sqlite --output verdicts.parquet",
    ),
    "ledger verify": Stage(
        LedgerVerifyConfig,
        "rubric_data.ledger_view:run_verify",
        "Checks SQLite's structures, tables and triggers, and every row; a damaged ledger ends with exit code 2. With "
        "--data it tells for each judge, template and vote how many of the file's questions are answered, and which "
        "nobody answered.",
        "--ledger runs/judge/ledger.sqlite --data my.jsonl",
        tabulates=True,
        quick=True,
    ),
    "train": Stage(
        TrainConfig,
        "rm.train:run_train",
        "Needs responses with verdicts and with splits, as `judge` writes them. The best checkpoint on the "
        "validation split ends up in OUTPUT/model. After an interruption the same command with --resume true goes on. "
        "On several processes: torchrun --nproc_per_node 2 -m policy.cli train ...",
        "--data runs/judge/judged.jsonl --output runs/train",
    ),
    "tail": Stage(
        TailConfig,
        "rm.tail:run_tail",
        "Pairs are two responses to one prompt, both in its top share by the judge, that it tells apart; whoever wrote "
        "them. Their verdicts and ordinary responses are trained on beside. If the best checkpoint orders the tail "
        "of the validation split worse than before, or forgot more than the tolerance, OUTPUT/model has the old "
        "weights. Calibrate afterwards. --resume true goes on after an interruption.",
        "--model runs/train/model --data runs/judge/judged.jsonl --output runs/tail",
        tabulates=True,
    ),
    "redistil": Stage(
        RedistilConfig,
        "rm.redistil:run_redistil",
        "New responses to validation prompts are held out to measure the gain; where there are none, a part of the new "
        "training prompts is. If the new verdicts are not told better there, or more than the tolerance is lost on the "
        "old validation split, OUTPUT/model has the old weights. Calibrate afterwards. --resume true goes on after an "
        "interruption.",
        "--model runs/train/model --data runs/judge/judged.jsonl --new runs/ppo/judged.jsonl --output runs/redistil",
        tabulates=True,
    ),
    "calibrate": Stage(
        CalibrateConfig,
        "rm.calibrating:run_calibrate",
        "Ways to map verdicts are compared on held-out prompts, and the best is stored; then the expected reward of "
        "the judge, and intervals, right where a policy at the planned KL will be. Everything that loads the model "
        "afterwards applies it. The model answers all criteria here, those with a verifier too.",
        "--model runs/train/model --data runs/judge/judged.jsonl",
    ),
    "audit": Stage(
        AuditConfig,
        "rm.audit:run_audit",
        "Intervals come from resampling prompts. Baselines stand beside the model: majority, mean of the criterion's "
        "tag, length, lexical overlap, and the untrained backbone; --others puts further predictors there: folders of "
        "models, and files of scores, which may hold rewards alone. The model answers all criteria here, those with a "
        "verifier too.",
        "--model runs/train/model --data runs/judge/judged.jsonl --output runs/audit",
        tabulates=True,
    ),
    "route": Stage(
        RouteConfig,
        "rm.frontier:run_route",
        "Puts the judge's verdicts in the place of the model's answers, a growing share of them: the widest first, "
        "those most valuable to the reward first, and at random. Shows what --fallback_budget of `ppo` is worth "
        "(docs/fallback.md). The model answers all criteria here, those with a verifier too.",
        "--model runs/train/model --data runs/judge/judged.jsonl --output runs/route",
        tabulates=True,
    ),
    "snr": Stage(
        SnrConfig,
        "rm.panel:run_snr",
        "Signal is what differs between recipes, noise what differs between one run's last checkpoints. Train each "
        "recipe with --keep_checkpoints 12 or so first. The models answer all criteria, uncalibrated. Scores are kept; "
        "--resume true scores new checkpoints only, whatever else is asked.",
        "--runs '[runs/a, runs/b, runs/c]' --data runs/judge/judged.jsonl --output runs/snr",
        tabulates=True,
    ),
    "score": Stage(
        ScoreConfig,
        "rm.scorer:run_score",
        "Reads the prompts, responses and rubrics of a file; needs no verdicts in it. Criteria with a verifier are "
        "answered by code, and marked so.",
        "--model runs/train/model --data my.jsonl --output scored.jsonl",
    ),
    "bon": Stage(
        BonConfig,
        "policy.bon:run_bon",
        "The curve is the expected reward of the best of n, by the model and, where the responses carry verdicts, by "
        "the judge. pairs.jsonl is what TRL's DPOTrainer reads, accepted.jsonl its SFTTrainer; what is left out of "
        "them is counted. --policy samples responses first, and --resume true goes on after an interruption.",
        "--reward_model runs/train/model --data runs/judge/judged.jsonl --output runs/bon",
        tabulates=True,
    ),
    "ppo": Stage(
        PolicyConfig,
        "policy.ppo:run_ppo",
        "Logs at every update the reward model's reward (proxy), the judge's reward (gold) and the KL to the "
        "starting policy; compares gold reward on held-out prompts before and after. Gold is estimated from a few "
        "judged rollouts, with an interval and an alarm when it declines (docs/watch.md). After an interruption the "
        "same command with --resume true goes on. On several processes: torchrun --nproc_per_node 2 -m policy.cli ppo "
        "...",
        "--reward_model runs/train/model --data runs/judge/judged.jsonl --output runs/ppo",
    ),
    "grpo": Stage(
        GrpoConfig,
        "policy.group:run_grpo",
        "Advantages compare the rollouts of one prompt, so there is no value model. Logs what `ppo` logs, and the mean "
        "of every criterion. Goes on after an interruption, and runs on several processes, as `ppo` does.",
        "--reward_model runs/train/model --data runs/judge/judged.jsonl --output runs/grpo",
    ),
    "rloo": Stage(
        RlooConfig,
        "policy.group:run_rloo",
        "A rollout's baseline is the mean reward of the others of its prompt; the KL is part of the reward. Otherwise "
        "as `grpo`.",
        "--reward_model runs/train/model --data runs/judge/judged.jsonl --output runs/rloo",
    ),
    "online-dpo": Stage(
        OnlineDpoConfig,
        "policy.online_dpo:run_online_dpo",
        "Of two rollouts of a prompt the better paid is preferred to the other, by however little; pairs that are paid "
        "the same are left out. Otherwise as `grpo`.",
        "--reward_model runs/train/model --data runs/judge/judged.jsonl --output runs/online-dpo",
    ),
    "page": Stage(
        PageConfig,
        "policy.comparison:run_page",
        "The RL commands keep run.html in their folders up to date as they train. Several runs have gold against KL in "
        "one plot, a table of gains, and the options they differ in.",
        "--runs '[runs/ppo, runs/grpo]' --output page.html",
        tabulates=True,
        quick=True,
    ),
    "curriculum": Stage(
        CurriculumConfig,
        "policy.curriculum:run_curriculum",
        "The stages are written in the --config file. Where a stage ends, the next one begins, and that is its "
        "reference, too. Before a stage its prompts may be filtered by what the policy earns on them. All are measured "
        "on the same held-out prompts, whole and by family. Finished stages are not run again: --resume true goes on.",
        "--config curriculum --output runs/curriculum",
        tabulates=True,
    ),
    "rubric defend": Stage(
        DefendConfig,
        "rm.defence:run_defend",
        "A rollout exploits if the reward model ranks it high and the judge far lower. What such rollouts have more "
        "often than others becomes vetoes, and those are taken that catch them, and spare the good, on prompts which "
        "nothing was chosen by. `rubric attach` puts them into the data of the next run (docs/hacks.md).",
        "--runs '[runs/grpo]' --prompts runs/judge/judged.jsonl --output runs/defend",
        hidden=DEFEND_SETS,
        tabulates=True,
    ),
    "demo": Stage(
        DemoConfig,
        "policy.demo:run_demo",
        "Needs no network and no GPU: the data, the backbone and the judge are embedded. Without --config it runs "
        "the packaged recipe 'quickstart'.",
        "--output runs/demo --policy.steps 20",
        hidden=DEMO_SETS,
        recipe="quickstart",
        tabulates=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted, 141 output cut."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        raise UserError(f"a command is missing; give one of {_names()}, or --help")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(_versions())
        return 0
    if group := [stage for stage in STAGES if stage.startswith(f"{name} ")]:
        if rest and rest[0] in ("-h", "--help"):
            print("\n".join(["usage: " + f"{PROGRAM} {name} COMMAND [--option VALUE ...]", "", *_listed(group)]))
            return 0
        second, rest = (rest[0], rest[1:]) if rest else ("", [])
        if f"{name} {second}" not in STAGES:
            among = ", ".join(stage.partition(" ")[2] for stage in group)
            what = f"unknown command '{second}'" if second else "a command is missing after it"
            raise UserError(f"{name}: {what}; give one of {among}, or --help")
        name = f"{name} {second}"
    if name not in STAGES:
        raise UserError(f"unknown command '{name}'; give one of {_names()}, or --help")
    return _run_stage(name, STAGES[name], rest)


def _names() -> str:
    """The first words of all commands, each once."""
    return ", ".join(dict.fromkeys(stage.partition(" ")[0] for stage in STAGES))


def _run_stage(name: str, stage: Stage, rest: list[str]) -> int:
    parser = build_parser(
        stage.config,
        prog=f"{PROGRAM} {name}",
        description=f"{_purpose(stage)} {stage.about}",
        epilog=f"example: {PROGRAM} {name} {stage.example}",
        hidden=stage.hidden,
    )
    if "-h" in rest or "--help" in rest:
        print(parser.format_help())
        return 0
    if stage.recipe and not any(argument.partition("=")[0] == "--config" for argument in rest):
        rest = ["--config", stage.recipe, *rest]
    config: Any = parse(stage.config, rest, parser, stage.hidden)
    if _is_main_process() and not stage.quick:
        _show(name, to_yaml(config, stage.hidden))
    _quieten()
    keep_memory()
    report = resolve_name(stage.run)(config)
    if _is_main_process() and not stage.tabulates:
        print("\n".join(["", *digest(report)]))
    return 0


def _purpose(stage: Stage) -> str:
    return inspect.cleandoc(stage.config.__doc__ or "")


def _listed(names: Sequence[str]) -> list[str]:
    """A line for each of the commands: its name and its purpose."""
    width = max(map(len, names))
    return [
        textwrap.fill(
            _purpose(STAGES[name]),
            width_of_help(),
            initial_indent=f"  {name:{width}}  ",
            subsequent_indent=" " * (width + 4),
        )
        for name in names
    ]


def _overview() -> str:
    lines = [
        f"usage: {PROGRAM} COMMAND [--config FILE] [--option VALUE ...]",
        "",
        "Distil a judge's verdicts on rubrics into a compact reward model, and use it in RL.",
        "",
        "commands, in the order of the work:",
        *_listed(list(STAGES)),
        "",
        f"`{PROGRAM} COMMAND --help` explains a command and each of its options.",
        "Options come from a YAML file (--config) and from the command line, which wins.",
        f"Start with: {PROGRAM} demo",
    ]
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width_of_help()) for line in lines)


def _versions() -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    beside = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl"))
    return f"{PROGRAM} {version(PROGRAM)} (Python {sys.version.split()[0]}, {beside})"


def _is_main_process() -> bool:
    """False on all ranks but the first under `accelerate launch` or torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _show(name: str, resolved: str) -> None:
    """Print the resolved configuration as YAML that --config would read back."""
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console()
    console.rule(f"{PROGRAM} {name}", style="dim")
    console.print(Syntax(resolved.rstrip(), "yaml", theme="ansi_dark", background_color="default", word_wrap=True))
    console.rule(style="dim")


def digest(report: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each number or name in a stage's report; a group of them, or a group in one, shares a line.

    Lists are left out, and what has no value.
    """
    lines = []
    for key, value in report.items():
        if isinstance(value, Mapping):
            groups = {name: part for name, part in value.items() if isinstance(part, Mapping)}
            parts = [f"{name} {_short(part)}" for name, part in value.items() if name not in groups and _is_told(part)]
            lines += [f"{prefix}{key}: {', '.join(parts)}"] if parts else []
            lines += digest(groups, f"{key}.") if not prefix else []
        elif _is_told(value):
            lines.append(f"{prefix}{key}: {_short(value)}")
    return lines


def _is_told(value: object) -> bool:
    return value is not None and not isinstance(value, (list, tuple))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _quieten() -> None:
    """Silence what libraries say on every run and a user can do nothing about. Only the command line does this."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every fork warns
    for pattern in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for logger in {logger for logger, _ in _KNOWN_LOGS}:
        logging.getLogger(logger).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(record.name == logger and text in record.getMessage() for logger, text in _KNOWN_LOGS)


_KNOWN_WARNINGS = (
    r"You are importing from 'trl.experimental'",
    r"`is_gradient_checkpointing` is deprecated",  # peft asks transformers by the old name
    r"`gradient_checkpointing` is deprecated",  # so does trl
    r"Could not find a config file in .* will assume that the vocabulary",  # peft, of an adapter below another
)
_KNOWN_LOGS = (
    ("transformers.generation.utils", "Passing `generation_config` together with"),  # trl's PPO does
    ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens"),  # SmolLM2's bos, which nothing reads
)


if __name__ == "__main__":
    sys.exit(main())
