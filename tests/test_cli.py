"""The command line as a user meets it: one-line errors, help that covers everything, configs that read back."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

import configs
from policy import cli
from policy.config import DemoConfig, PolicyConfig
from policy.options import build_parser, field_comments, options_of, parse, to_yaml
from rm.config import TrainConfig
from rubric_data.errors import UserError


@pytest.fixture
def stage_calls(monkeypatch):
    """Every stage replaced by one that records the config it is called with."""
    calls = []
    monkeypatch.setattr(cli, "resolve_name", lambda target: lambda config: calls.append((target, config)) or {})
    return calls


def run(capsys, *argv):
    """Exit code, stdout and stderr of `rubric-rm argv`."""
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


# --- options and recipes ---------------------------------------------------------------------------------------------


def test_options_reach_the_stage_with_their_types(stage_calls, capsys):
    code, _, _ = run(
        capsys, "train", "--output", "runs/x", "--learning_rate", "5e-4", "--max_steps=7", "--resume", "true"
    )
    assert code == 0
    assert stage_calls == [
        ("rm.train:run_train", TrainConfig(output="runs/x", learning_rate=5e-4, max_steps=7, resume=True))
    ]


def test_yaml_numbers_without_a_point_are_floats(stage_calls, capsys, tmp_path):
    code, _, _ = run(capsys, "train", "--config", recipe(tmp_path, "output: a\nlearning_rate: 5e-4\nepochs: 2\n"))
    assert code == 0
    config = stage_calls[0][1]
    assert (config.learning_rate, config.epochs) == (0.0005, 2.0)
    assert type(config.epochs) is float


@pytest.mark.parametrize("option_first", [True, False])
def test_an_option_wins_over_the_file_wherever_it_stands(stage_calls, capsys, tmp_path, option_first):
    file, option = ["--config", recipe(tmp_path, "output: a\nseed: 1\nmax_steps: 3\n")], ["--seed", "2"]
    code, _, _ = run(capsys, "train", *(option + file if option_first else file + option))
    assert code == 0
    assert (stage_calls[0][1].seed, stage_calls[0][1].max_steps) == (2, 3)


def test_nested_options_change_only_what_they_name(stage_calls, capsys, tmp_path):
    text = "train:\n  max_steps: 3\n"
    code, _, _ = run(capsys, "demo", "--config", recipe(tmp_path, text), "--train.learning_rate", "1e-4")
    assert code == 0
    expected = DemoConfig()
    expected.train.max_steps, expected.train.learning_rate = 3, 1e-4
    assert stage_calls == [("policy.demo:run_demo", expected)]


def test_an_optional_value_can_be_unset_again(stage_calls, capsys, tmp_path):
    text = "reward_model: m\noutput: o\neval_prompts: 4\n"
    run(capsys, "ppo", "--config", recipe(tmp_path, text))
    run(capsys, "ppo", "--config", recipe(tmp_path, text), "--eval_prompts", "null")
    assert [config.eval_prompts for _, config in stage_calls] == [4, None]


def test_a_list_is_given_as_yaml_or_piece_by_piece(stage_calls, capsys, tmp_path):
    file = recipe(tmp_path, "output: o\ndata: [c.jsonl]\n")
    for given in (["--data", "[a.jsonl, b c.jsonl]"], ["--data+", "d.jsonl"], ["--data=[a.jsonl]", "--data+=b.jsonl"]):
        assert run(capsys, "data", "merge", "--config", file, *given)[0] == 0
    assert [config.data for _, config in stage_calls] == [
        ["a.jsonl", "b c.jsonl"],
        ["c.jsonl", "d.jsonl"],
        ["a.jsonl", "b.jsonl"],
    ]


def test_demo_without_a_config_runs_the_packaged_recipe_from_any_folder(stage_calls, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "demo", "--output", "mine")[0] == 0
    quickstart = yaml.safe_load(configs.recipe_path("quickstart").read_text())
    config = stage_calls[0][1]
    assert config.output == "mine"
    assert config.train.max_steps == quickstart["train"]["max_steps"]


JOBS = [name for name, stage in cli.STAGES.items() if not stage.quick]


def stage_of(name):
    """The command a recipe is for: its name begins with that; None if there is none."""
    if name == "quickstart":
        return "demo"
    found = [stage for stage in JOBS if f"{name}-".startswith(f"{stage.replace(' ', '-')}-")]
    return max(found, key=len, default=None)


@pytest.mark.parametrize("name", configs.recipe_names())
def test_every_recipe_is_accepted_by_its_stage(stage_calls, capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *stage_of(name).split(), "--config", name)
    assert (code, err) == (0, "")


def test_every_job_has_a_recipe():
    assert {name.replace(" ", "-") for name in JOBS} - {"demo"} <= set(configs.recipe_names())


@pytest.mark.parametrize("stage", JOBS)
def test_the_printed_config_reads_back_as_the_same_config(stage_calls, capsys, tmp_path, stage):
    recipe_name = "quickstart" if stage == "demo" else stage.replace(" ", "-")
    assert run(capsys, *stage.split(), "--config", recipe_name)[0] == 0
    config = stage_calls[0][1]
    printed = recipe(tmp_path, to_yaml(config, cli.STAGES[stage].hidden))
    assert run(capsys, *stage.split(), "--config", printed)[0] == 0
    assert stage_calls[1][1] == config


def test_the_resolved_config_is_printed_before_the_run(stage_calls, capsys):
    _, out, _ = run(capsys, "calibrate", "--model", "m")
    assert "rubric-rm calibrate" in out
    body = [line for line in out.splitlines() if ":" in line]
    assert yaml.safe_load("\n".join(body)) == {
        "model": "m",
        "data": "builtin",
        "planned_kl": 2.0,
        "coverage": 0.9,
        "tokens_per_batch": 16384,
        "overwrite": False,
    }


@pytest.mark.parametrize("columns", [70, 130])
def test_every_help_is_as_wide_as_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("--help", "judge --help"):
        lines = run(capsys, *command.split())[1].splitlines()
        assert columns - 20 < max(len(line) for line in lines if "{" not in line) <= columns - 2  # choices stay whole


def test_the_digest_shows_numbers_and_groups_but_no_lists():
    report = {"steps": 7, "seconds": 1.23456, "after": {"auroc": 0.81234, "log": [1]}, "log": [{"loss": 1}], "none": {}}
    assert cli.digest(report) == ["steps: 7", "seconds: 1.235", "after: auroc 0.8123"]
    report = {"agreement": None, "spent": {"total": {"calls": 2, "failed": {"timeout": 1}, "cost": None}}}
    assert cli.digest(report) == ["spent.total: calls 2"]


def test_a_stage_without_a_table_of_its_own_ends_with_its_digest(capsys, monkeypatch):
    monkeypatch.setattr(cli, "resolve_name", lambda target: lambda config: {"fitted": "platt"})
    assert run(capsys, "calibrate", "--model", "m")[1].endswith("\nfitted: platt\n")
    assert "fitted" not in run(capsys, "audit", "--model", "m", "--output", "o")[1]


def test_ranks_after_the_first_print_nothing(stage_calls, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "calibrate", "--model", "m") == (0, "", "")


# --- bad input -------------------------------------------------------------------------------------------------------

COMMANDS = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in cli.STAGES))
COMMAND_LINE_FAULTS = [
    ("", f"a command is missing; give one of {COMMANDS}, or --help"),
    ("trian", f"unknown command 'trian'; give one of {COMMANDS}, or --help"),
    ("ledger", "ledger: a command is missing after it; give one of stats, export, verify, or --help"),
    ("ledger foo", "ledger: unknown command 'foo'; give one of stats, export, verify, or --help"),
    (
        "ledger stats",
        "missing: --ledger (SQLite ledger, such as ledger.sqlite in the folder of a run; it is only "
        "read); give it here or in the --config file",
    ),
    ("train --output x --learning_rat 3", "unknown option '--learning_rat'; did you mean '--learning_rate'?"),
    ("train --output x --learning_rat=3", "unknown option '--learning_rat'; did you mean '--learning_rate'?"),
    ("train --output x --learn 3", "unknown option '--learn'; did you mean '--learning_rate'?"),
    ("train --output x --zzz 3", "unknown option '--zzz'; see --help for those there are"),
    ("demo --learning_rate 3", "unknown option '--learning_rate'; did you mean '--train.learning_rate'?"),
    ("demo --train.max_step 3", "unknown option '--train.max_step'; did you mean '--train.max_steps'?"),
    ("demo --train.output x", "option '--train.output' is set by the stage itself; remove it"),
    ("train --output x --lora_rank big", "option '--lora_rank' must be a whole number, got 'big'"),
    ("train --output x --max_steps 3.5", "option '--max_steps' must be a whole number, got '3.5'"),
    ("train --output x --dtype half", "option '--dtype' must be one of auto, float32, bfloat16, got 'half'"),
    ("train --output x --resume maybe", "option '--resume' must be true or false, got 'maybe'"),
    ("demo --policy.eval_prompts x", "option '--policy.eval_prompts' must be a whole number, or null, got 'x'"),
    (
        "data merge --output x --data a,b",
        "option '--data' must be a list such as [a, b], got 'a,b'; write --data '[a, b]', quotation marks included",
    ),
    ("data merge --output x --data", "option '--data' must be a list such as [a, b], got nothing"),
    (
        "data merge --output x",
        "missing: --data (judged responses (.jsonl or .parquet), one file a judge); "
        "give it here or in the --config file",
    ),
    ("train --output x --seed", "option '--seed' must be a whole number, got nothing"),
    ("train --output x extra", "unexpected argument 'extra'; write options as --option VALUE"),
    ("train --output x --config", "--config: a file is missing after it; give a YAML file or a recipe's name"),
    (
        "train",
        "missing: --output (run folder; the model is written into its model/ folder); "
        "give it here or in the --config file",
    ),
]


@pytest.mark.parametrize(("line", "message"), COMMAND_LINE_FAULTS)
def test_a_fault_on_the_command_line_is_one_line_and_exit_2(stage_calls, capsys, line, message):
    assert run(capsys, *line.split()) == (2, "", f"rubric-rm: error: {message}\n")
    assert stage_calls == []


RECIPE_FAULTS = [
    ("train", "output: a\nlearning_rat: 1", ": unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    ("demo", "train:\n  learning_rat: 1", ": unknown key 'train.learning_rat'; did you mean 'train.learning_rate'?"),
    ("demo", "learning_rate: 1", ": unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
    ("demo", "train:\n  output: a", ": key 'train.output' is set by the stage itself; remove it"),
    ("demo", "train: 3", ": 'train' is a section; indent its options below it"),
    ("train", "output: a\nlora_rank: big", ": 'lora_rank' must be a whole number, got 'big'"),
    ("train", "output: a\nlora_rank: true", ": 'lora_rank' must be a whole number, got True"),
    ("train", "output: a\nlearning_rate: fast", ": 'learning_rate' must be a number, got 'fast'"),
    ("train", "output: 3", ": 'output' must be text, got 3"),
    ("train", "output: a\ndtype: half", ": 'dtype' must be one of auto, float32, bfloat16, got 'half'"),
    ("data merge", "output: a\ndata: b.jsonl", ": 'data' must be a list such as [a, b], got 'b.jsonl'"),
    ("data merge", "output: a\ndata: [b, 3]", ": 'data' must be a list such as [a, b], got ['b', 3]"),
    ("curriculum", "output: a\nstages: b", ": 'stages' must be a list of sections of options, got 'b'"),
    ("curriculum", "output: a\nstages: []\ncommon: 3", ": 'common' must be a section of options, got 3"),
    ("train", "output: [a\n", ", line 2: broken YAML ("),
    ("train", "a: 1\n b: 2", ", line 2: broken YAML ("),
    ("train", "- output", ": holds no options; write lines of the form 'option: value'"),
    ("train", "", ": holds no options; write lines of the form 'option: value'"),
]


@pytest.mark.parametrize(("stage", "text", "message"), RECIPE_FAULTS)
def test_a_fault_in_a_recipe_names_the_file_and_the_remedy(stage_calls, capsys, tmp_path, stage, text, message):
    path = recipe(tmp_path, text)
    code, out, err = run(capsys, *stage.split(), "--config", path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"rubric-rm: error: {path}")
    if "broken YAML" not in message:
        assert err == f"rubric-rm: error: {path}{message}\n"
    else:  # the parser's own words differ between its C and Python versions
        assert err.startswith(f"rubric-rm: error: {path}{message}") and err.endswith("); correct the line\n")
    assert stage_calls == []


def test_a_missing_recipe_lists_those_there_are(capsys):
    names = ", ".join(configs.recipe_names())
    for given, fault in (("nowhere/x.yaml", "no such file"), ("quickstat", "no such file"), ("configs", "is a folder")):
        code, _, err = run(capsys, "train", "--config", given)
        assert (code, err) == (
            2,
            f"rubric-rm: error: {given}: {fault}; give a YAML file, or the name of a recipe: {names}\n",
        )


def test_an_unreadable_recipe_is_one_line(capsys, tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert run(capsys, "train", "--config", str(path)) == (
        2,
        "",
        f"rubric-rm: error: {path}: is not UTF-8 text; give a YAML file\n",
    )


def test_a_stage_s_user_error_is_one_line_but_a_bug_keeps_its_traceback(capsys, monkeypatch):
    def bad_input(config):
        raise UserError("data.jsonl, line 3: not JSON;\n correct it")

    monkeypatch.setattr(cli, "resolve_name", lambda target: bad_input)
    code, _, err = run(capsys, "calibrate", "--model", "m")
    assert (code, err) == (2, "rubric-rm: error: data.jsonl, line 3: not JSON; correct it\n")

    monkeypatch.setattr(cli, "resolve_name", lambda target: lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["calibrate", "--model", "m"])


def test_ctrl_c_ends_with_130_and_one_line(tmp_path):
    waiting = """
import sys, time
from policy import cli

def sleep(config):
    print("up", flush=True)
    time.sleep(60)

cli.resolve_name = lambda target: sleep
sys.exit(cli.main(["calibrate", "--model", "m"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", waiting],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.strip() == "up":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "rubric-rm: interrupted\n")


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", cli.STAGES)
def test_help_names_every_option_with_its_comment_and_an_example(capsys, stage):
    code, out, _ = run(capsys, *stage.split(), "--help")
    words = " ".join(out.split())
    assert code == 0
    for option in options_of(cli.STAGES[stage].config, cli.STAGES[stage].hidden):
        assert f"--{option.key} " in words
        assert option.help, f"{option.key}: comment its line in the config class; the comment is its help"
        assert " ".join(option.help.split()) in words
    for key in cli.STAGES[stage].hidden:
        assert f"--{key} " not in words
    assert f"example: rubric-rm {stage} --" in words


@pytest.mark.parametrize("stage", cli.STAGES)
def test_the_example_in_the_help_is_accepted(stage_calls, capsys, stage):
    import shlex

    assert run(capsys, *stage.split(), *shlex.split(cli.STAGES[stage].example))[0] == 0


def test_help_of_the_program_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"\n  {stage} " in out for stage in cli.STAGES)


def test_hidden_keys_exist():
    known = {option.key for option in options_of(DemoConfig)}
    assert set(cli.STAGES["demo"].hidden) <= known


def test_version_names_the_libraries(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("rubric-rm ") and "torch 2." in out and "trl 1." in out


def test_the_module_runs_and_help_answers_at_once():
    begin = time.perf_counter()
    cpu_before = os.times()
    done = subprocess.run([sys.executable, "-m", "policy.cli", "demo", "--help"], capture_output=True, text=True)
    cpu = os.times().children_user + os.times().children_system - cpu_before.children_user - cpu_before.children_system
    assert done.returncode == 0 and "--train.learning_rate" in done.stdout, time.perf_counter() - begin
    assert cpu < 1.5  # seconds of work; the clock on the wall also counts whatever else the machine does


# --- the dataclass as the one source ---------------------------------------------------------------------------------


@dataclass
class Inner:
    """An inner group."""

    rate: float = 0.5  # share, in 50% steps
    name: str | None = None  # maybe


@dataclass
class Outer:
    """An outer config."""

    path: str  # where
    kind: Literal["a", "b"] = "a"  # which
    plain: int = 1
    inner: Inner = field(default_factory=lambda: Inner(rate=0.25))


def test_comments_are_found_and_strings_with_a_hash_are_not():
    assert field_comments(Outer) == {"path": "where", "kind": "which"}


def test_nested_defaults_come_from_the_outer_config():
    options = {option.key: option for option in options_of(Outer)}
    assert options["inner.rate"].default == 0.25
    assert options["path"].default is dataclasses.MISSING
    parser = build_parser(Outer, prog="x")
    assert parse(Outer, ["--path", "p", "--inner.name", "n"], parser) == Outer("p", inner=Inner(0.25, "n"))
    assert "in 50% steps" in " ".join(parser.format_help().split())


def test_ppo_and_demo_read_the_same_policy_options():
    standalone = {option.key for option in options_of(PolicyConfig)}
    nested = {
        option.key.removeprefix("policy.") for option in options_of(DemoConfig) if option.key.startswith("policy.")
    }
    assert standalone == nested


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_a_reader_that_leaves_gets_no_traceback(arguments):
    command = [sys.executable, "-m", "policy.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr as pipe:
        err = pipe.read()
    assert (process.wait(), err) == (141, "")
