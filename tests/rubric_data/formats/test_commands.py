"""`data import`, `data split` and `data export` as a user runs them."""

import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from policy import cli
from rubric_data.config import FormatName
from rubric_data.formats import FORMATS
from rubric_data.formats.base import Answer, Example
from rubric_data.formats.commands import OWN, Imported
from rubric_data.io import load_prompts, read_judged, write_judged, write_prompts
from rubric_data.records import Criterion, PromptRecord, Rubric, Verdict
from rubric_data.split import check_leaks

FIXTURES = Path(__file__).parent / "fixtures"


FIRST_FIXTURES = {
    name: FIXTURES / f"{name.replace('-', '_')}{'.json' if name == 'autorubric' else '.jsonl'}" for name in FORMATS
}


def run(capsys, *argv):
    """Exit code, stdout and stderr of `rubric-rm data argv`."""
    code = cli.main(["data", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_options_name_every_format():
    assert set(get_args(FormatName)) == {*FORMATS, OWN}


# --- import --------------------------------------------------------------------------------------------------


def test_import_writes_prompts_responses_and_a_report(tmp_path, capsys):
    code, out, _ = run(
        capsys, "import", "--format", "rar", "--input", FIXTURES / "rar.jsonl", "--output", tmp_path / "run"
    )
    assert code == 0 and "left_out: empty reference answer 1, " in out
    prompts = load_prompts(tmp_path / "run" / "prompts.jsonl")
    (response,) = read_judged(tmp_path / "run" / "responses.jsonl")
    assert [prompt.prompt for prompt in prompts] == ["Why does bread rise?", "What is 2 + 2?"]
    assert {prompt.source for prompt in prompts} == {"ScaleAI/RaR"}
    assert (response.generator, response.prompt_id, response.rubric) == (
        "reference",
        prompts[0].prompt_id,
        prompts[0].rubric,
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report == {
        "format": "rar",
        "input": str(FIXTURES / "rar.jsonl"),
        "licences": {"unknown": 2},
        "source": "ScaleAI/RaR",
        "rows": 2,
        "repeated_prompts": 0,
        "ignored_columns": ["question_source", "rubric_count", "rubric_list"],
        "prompts": 2,
        "prompts_without_rubric": 0,
        "criteria": 7,
        "responses": 1,
        "verdicts": 0,
        "left_out": {"empty reference answer": 1, "pitfall whose words leave its sign open": 1},
        "first_left_out": {
            "empty reference answer": f"{FIXTURES / 'rar.jsonl'}:2",
            "pitfall whose words leave its sign open": f"{FIXTURES / 'rar.jsonl'}:1",
        },
    }
    assert run(capsys, "import", "--format", "rar", "--input", FIXTURES / "rar.jsonl", "--output", tmp_path / "run")[
        2
    ].startswith(f"rubric-rm: error: {tmp_path / 'run'}: holds a run already; ")


@pytest.mark.parametrize(
    ("name", "file", "counts"),
    [
        ("healthbench", "healthbench.jsonl", (2, 3, {"criterion of weight 0": 1})),
        (
            "openrubrics",
            "openrubrics.jsonl",
            (3, 6, {"preference: no winner named": 1, "row whose rubric has no numbered items": 1}),
        ),
        (
            "wildchecklists",
            "wildchecklists.jsonl",
            (
                2,
                2,
                {
                    "criterion of weight 0": 1,
                    "requirement without an importance": 1,
                    "response without a rubric": 2,
                    "rubric without a criterion of positive weight": 1,
                },
            ),
        ),
        ("chasing-tail", "chasing_tail.jsonl", (1, 0, {})),
        ("chasing-tail", "chasing_tail_scored.json", (1, 2, {"verdict on a criterion the rubric does not have": 1})),
        ("autorubric", "autorubric.json", (1, 3, {"criterion whose options are no even steps": 2})),
        ("verifiers", "verifiers.jsonl", (2, 1, {})),
        (
            "preferences",
            "preferences.jsonl",
            (6, 12, {"row whose chosen and rejected responses are the same": 1, "row without a prompt": 1}),
        ),
    ],
)
def test_import_counts_what_it_takes_and_what_it_leaves(tmp_path, capsys, name, file, counts):
    command = ("import", "--format", name, "--input", FIXTURES / file, "--output", tmp_path / "run")
    assert run(capsys, *command)[0] == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["prompts"], report["responses"], report["left_out"]) == counts
    assert (tmp_path / "run" / "responses.jsonl").exists() == (report["responses"] > 0)
    assert set(report["licences"]) == {FORMATS[name].licence or "unknown"}


def test_a_licence_is_overridden_and_a_repeated_row_gains_nothing(tmp_path, capsys):
    path = tmp_path / "twice.jsonl"
    path.write_text((FIXTURES / "healthbench.jsonl").read_text() * 3)
    command = ("import", "--format", "healthbench", "--input", path, "--output", tmp_path / "run", "--licence", "mine")
    assert run(capsys, *command)[0] == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["rows"], report["prompts"], report["repeated_prompts"], report["responses"]) == (6, 2, 4, 3)
    assert report["licences"] == {"mine": 2}
    assert report["left_out"]["repeated response"] == 6


def test_an_id_that_stands_for_two_prompts_is_refused(tmp_path, capsys):
    first, second = rows(FIXTURES / "healthbench.jsonl")
    path = tmp_path / "clash.jsonl"
    path.write_text("".join(json.dumps(row | {"prompt_id": "p"}) + "\n" for row in (first, second)))
    command = ("import", "--format", "healthbench", "--input", path, "--output", tmp_path / "run")
    message = f"{path}:2: the prompt id 'p' stood for another prompt or rubric before, at {path}:1; make it unique"
    assert run(capsys, *command)[::2] == (2, f"rubric-rm: error: {message}\n")
    assert not (tmp_path / "run").exists()


def test_a_file_without_a_usable_row_is_refused(tmp_path, capsys):
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n")
    command = ("import", "--format", "preferences", "--input", path, "--output", tmp_path / "run")
    assert run(capsys, *command)[2] == (
        f"rubric-rm: error: {path}: holds no prompt in format preferences: "
        "row whose chosen and rejected responses are the same (1); check --format\n"
    )


def test_a_wrong_format_is_told_with_the_right_one(tmp_path, capsys, judged):
    """Every fixture under every other format: refused with a hint, or read, where two formats share what is needed."""
    write_judged(tmp_path / "own.jsonl", judged)
    files = {**FIRST_FIXTURES, OWN: tmp_path / "own.jsonl"}
    unhelped, taken = set(), set()
    for right, file in files.items():
        for wrong in files.keys() - {right}:
            command = ("import", "--format", wrong, "--input", file, "--output", tmp_path / f"{right}-{wrong}")
            code, _, said = run(capsys, *command)
            if code == 0:
                taken.add((right, wrong))
            elif not said.endswith(f", or give --format {right}, which it looks like\n"):
                unhelped.add((right, wrong))
    assert unhelped == set()
    assert taken == {("wildchecklists", "preferences")}  # its pairs, as the report's ignored columns tell


def test_our_own_format_is_imported_as_it_is(tmp_path, capsys, judged):
    write_judged(tmp_path / "own.parquet", judged)
    command = ("import", "--format", OWN, "--input", tmp_path / "own.parquet", "--output", tmp_path / "run")
    assert run(capsys, *command)[0] == 0
    assert read_judged(tmp_path / "run" / "responses.jsonl") == judged
    assert [prompt.prompt_id for prompt in load_prompts(tmp_path / "run" / "prompts.jsonl")] == [
        f"p{number}" for number in range(6)
    ]


LONG = "x" * 300  # more than a file system takes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", "", "FILE: holds no rows; give a file with at least one"),
        ("none.json", "[]", "FILE: holds no rows; give a file with at least one"),
        (f"{LONG}.jsonl", None, "FILE: no such file; give one, or a dataset of the hub as owner/name"),
        (LONG, None, "FILE: no such file; give one, or a dataset of the hub as owner/name"),
        ("empty.jsonl", Path.mkdir, "FILE: cannot be loaded as a dataset ("),
        (
            "third.jsonl",
            '{"prompt": "p", "rubrics": [{"criterion": "c", "weight": 1}]}\n\n{"prompt": "p", "rub\n{}\n',
            "FILE:3: not valid JSON (",
        ),
        (
            "kind.jsonl",
            '{"prompt": "p", "rubrics": {"criterion": "c"}}\n',
            "FILE:1: field rubrics: must be a list",
        ),
        ("kind.jsonl", '{"prompt": "p", "rubrics": ["c"]}\n', "FILE:1: field rubrics.0: must be an object, got 'c'"),
    ],
)
def test_what_is_wrong_with_an_input_is_one_line(tmp_path, capsys, name, content, said):
    file = tmp_path / name
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        content(file)
    command = ("import", "--format", "chasing-tail", "--input", file, "--output", tmp_path / "run")
    code, _, err = run(capsys, *command)
    assert (code, err.count("\n")) == (2, 1) and err.startswith(f"rubric-rm: error: {said.replace('FILE', str(file))}")
    assert not (tmp_path / "run").exists()


def test_an_input_without_a_name_is_refused(tmp_path, capsys):
    code, _, err = run(capsys, "import", "--format", "rar", "--input", "", "--output", tmp_path / "run")
    assert (code, err) == (2, "rubric-rm: error: input: is empty; give a file, or a dataset of the hub as owner/name\n")


# --- export --------------------------------------------------------------------------------------------------


def test_export_of_preferences_takes_the_best_and_the_worst_by_reward(tmp_path, capsys, judged):
    """Weights 2 and 1: the first response of a prompt has reward 1, the second, which meets the second only, 1/3."""
    tied = [record.model_copy(update={"verdicts": judged[0].verdicts}) for record in judged[2:4]]
    masked = judged[4].model_copy(
        update={"verdicts": tuple(Verdict(criterion_id=name, masked="x: y") for name in ("fruit", "short"))}
    )
    unjudged = judged[0].model_copy(update={"response_id": "later", "verdicts": ()})
    middle = judged[0].model_copy(update={"response_id": "middle", "response": "A stone or a pear."})
    write_judged(tmp_path / "judged.jsonl", [*judged[:2], unjudged, middle, *tied, masked, *judged[5:8]])
    output = tmp_path / "pairs.jsonl"
    command = ("export", "--format", "preferences", "--data", tmp_path / "judged.jsonl", "--output", output)
    code, out, _ = run(capsys, *command)
    assert code == 0
    first, second = rows(output)
    assert first == {
        "prompt": [{"role": "user", "content": "Name fruit number 0."}],
        "chosen": [{"role": "assistant", "content": "Fruit 0 is a pear."}],
        "rejected": [{"role": "assistant", "content": "Stone 0 is grey."}],
        "score_chosen": 1.0,
        "score_rejected": pytest.approx(1 / 3),
    }
    assert second["prompt"][0]["content"] == "Name fruit number 3."
    assert (
        "left_out: pairs that tie 1, prompts with fewer than two scored responses 1, responses between the best and "
        "the worst 1, responses not judged 1, responses whose verdicts are masked 1, rubrics 4"
    ) in out
    assert run(capsys, *command)[2] == (
        f"rubric-rm: error: {output}: exists already; choose another --output, or add --overwrite true\n"
    )
    assert run(capsys, *command, "--overwrite", "true")[0] == 0


def test_all_ordered_pairs_leave_out_ties(tmp_path, capsys, judged):
    met = [(1.0, 1.0), (0.0, 1.0), (0.0, 1.0), (0.0, 0.0)]  # rewards 1, 1/3, 1/3, 0
    records = [
        judged[0].model_copy(
            update={
                "response_id": f"r{place}",
                "response": f"text {place}",
                "verdicts": tuple(
                    Verdict(criterion_id=name, value=value)
                    for name, value in zip(("fruit", "short"), pair, strict=True)
                ),
            }
        )
        for place, pair in enumerate(met)
    ]
    write_judged(tmp_path / "judged.jsonl", records)
    output = tmp_path / "pairs.json"
    command = ("export", "--format", "preferences", "--data", tmp_path / "judged.jsonl", "--output", output)
    code, out, _ = run(capsys, *command, "--pairs", "all")
    found = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in json.loads(output.read_text())]
    assert code == 0 and "pairs that tie 1" in out
    assert found == [
        ("text 0", "text 1"),
        ("text 0", "text 2"),
        ("text 0", "text 3"),
        ("text 1", "text 3"),
        ("text 2", "text 3"),
    ]


@pytest.mark.parametrize(("name", "suffix"), [("rar", ".parquet"), ("verifiers", ".json"), ("autorubric", ".json")])
def test_export_and_import_through_files(tmp_path, capsys, judged, name, suffix):
    write_judged(tmp_path / "judged.jsonl", judged)
    output = tmp_path / f"out{suffix}"
    assert run(capsys, "export", "--format", name, "--data", tmp_path / "judged.jsonl", "--output", output)[0] == 0
    assert run(capsys, "import", "--format", name, "--input", output, "--output", tmp_path / "back")[0] == 0
    back = load_prompts(tmp_path / "back" / "prompts.jsonl")
    assert [(prompt.prompt, prompt.rubric.id) for prompt in back] == list(
        dict.fromkeys((record.prompt, record.rubric.id) for record in judged)
    )
    if name == "autorubric":
        again = read_judged(tmp_path / "back" / "responses.jsonl")
        assert [record.values() for record in again] == [record.values() for record in judged]


def test_our_own_format_turns_from_jsonl_to_parquet_and_back(tmp_path, capsys, judged):
    write_judged(tmp_path / "a.jsonl", judged)
    for before, after in (("a.jsonl", "b.parquet"), ("b.parquet", "c.jsonl")):
        command = ("export", "--format", OWN, "--data", tmp_path / before, "--output", tmp_path / after)
        assert run(capsys, *command)[0] == 0
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert pq.read_metadata(tmp_path / "b.parquet").num_rows == 12


def test_formats_that_only_import_and_outputs_that_do_not_fit_say_so(tmp_path, capsys, judged):
    data = tmp_path / "judged.jsonl"
    write_judged(data, judged)

    def fault(name, output):
        code, _, err = run(capsys, "export", "--format", name, "--data", data, "--output", output)
        assert code == 2
        return err.removeprefix("rubric-rm: error: ").strip()

    assert fault("openrubrics", "x.jsonl") == (
        "format: openrubrics is for import only; export to one of autorubric, healthbench, preferences, rar, "
        "verifiers, rubric-rm"
    )
    assert fault("autorubric", "x.jsonl") == "x.jsonl: this format is one document; name it .json"
    assert fault("rar", "x.csv") == "x.csv: unknown file type '.csv'; use one of .jsonl, .json, .parquet"
    write_judged(data, [record.model_copy(update={"verdicts": ()}) for record in judged])
    assert fault("preferences", "x.jsonl") == (f"{data}: holds no verdicts; run 'rubric-rm judge --data {data}' first")
    write_judged(data, judged[::2])
    assert fault("preferences", "x.jsonl") == (
        f"{data}: nothing of it fits the format: prompts with fewer than two scored responses (6), rubrics (6); "
        "mend that, or choose another --format"
    )


# --- split ---------------------------------------------------------------------------------------------------


def test_split_keeps_groups_together_and_counts(tmp_path, capsys, judged):
    data, output = tmp_path / "judged.jsonl", tmp_path / "split.parquet"
    write_judged(data, [record.model_copy(update={"split": None}) for record in judged])
    command = ("split", "--data", data, "--output", output, "--train", 0.5, "--validation", 0.25, "--test", 0.25)
    code, out, _ = run(capsys, *command)
    records = read_judged(output)
    check_leaks(records)
    counts = Counter(record.split for record in records)
    assert code == 0 and counts["train"] >= 4 and sum(counts.values()) == 12
    line = ", ".join(f"{split} {counts[split]}" for split in ("train", "validation", "test"))
    assert f"responses: {line}" in out


def test_split_holds_out_generators(tmp_path, capsys, judged):
    data, output = tmp_path / "judged.jsonl", tmp_path / "split.jsonl"
    writers = {record.response_id: "new" if place % 2 else "old" for place, record in enumerate(judged)}
    bare = [one.model_copy(update={"split": None, "generator": writers[one.response_id]}) for one in judged]
    write_judged(data, bare)
    command = ("split", "--data", data, "--train", 0.5, "--validation", 0.25, "--test", 0.25, "--output")
    assert run(capsys, *command, tmp_path / "whole.jsonl")[0] == 0
    assert run(capsys, *command, output, "--held_out_generators", " new")[0] == 0
    kept = [one for one in read_judged(tmp_path / "whole.jsonl") if one.split == "test" or one.generator == "old"]
    assert read_judged(output) == kept and len(kept) < 12 and {one.generator for one in kept} == {"old", "new"}
    for names, message in (
        ("new,newer", f"held_out_generators: none of {data} is by 'newer'; choose among new, old"),
        ("new,old", "held_out_generators: nothing is left for train; hold out fewer"),
    ):
        assert message in run(capsys, *command, tmp_path / "no.jsonl", "--held_out_generators", names)[2]
    assert not (tmp_path / "no.jsonl").exists()


def test_an_output_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, capsys, judged):
    data = tmp_path / "data.jsonl"
    write_judged(data, [record.model_copy(update={"split": None}) for record in judged])
    (tmp_path / "folder.jsonl").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ("split", "--data", data),
        ("export", "--format", OWN, "--data", data),
        ("export", "--format", "rar", "--data", data),
    ):
        for name, said in (
            ("folder.jsonl", "is a folder; give the name of a file"),
            (f"{LONG}.jsonl", "cannot write here (File name too long); choose another output folder"),
            ("data.jsonl/o.jsonl", "cannot write here ("),
        ):
            code, _, err = run(capsys, *command, "--output", tmp_path / name, "--overwrite", "true")
            assert (code, err.count("\n")) == (2, 1) and err.startswith(f"rubric-rm: error: {tmp_path / name}: {said}")
    for name in (LONG, "data.jsonl"):
        code, _, err = run(capsys, "import", "--format", OWN, "--input", data, "--output", tmp_path / name)
        assert (code, err.count("\n")) == (2, 1) and err.startswith(f"rubric-rm: error: {tmp_path / name}")
    assert sorted(tmp_path.rglob("*")) == before


def test_split_asks_before_it_replaces_splits(tmp_path, capsys, judged):
    data = tmp_path / "judged.jsonl"
    write_judged(data, judged)
    command = ("split", "--data", data, "--output", tmp_path / "new.jsonl")
    assert run(capsys, *command)[2] == (
        f"rubric-rm: error: {data}: 12 of 12 records carry a split already; add --replace true for new ones\n"
    )
    first = [run(capsys, *command, "--replace", "true")[0], read_judged(tmp_path / "new.jsonl")]
    again = run(capsys, *command, "--replace", "true", "--overwrite", "true", "--seed", "3")
    assert (first[0], again[0]) == (0, 0)
    assert read_judged(tmp_path / "new.jsonl") != first[1]


def test_what_cannot_be_split_is_named_with_advice_that_helps(tmp_path, capsys):
    rubric = Rubric(criteria=(Criterion(id="c", text="Is fine."),))
    path = tmp_path / "prompts.jsonl"
    command = ("split", "--data", path, "--output", tmp_path / "split.jsonl")
    allow = ", or let prompts of one rubric part by 'rubric-rm data split --shared_rubrics true'"

    def fault(prompts, *options):
        records = [PromptRecord(prompt_id=f"p{n}", prompt=f"Say {n}.", rubric=rubric) for n in range(prompts)]
        write_prompts(path, records)
        return run(capsys, *command, *options)[2].removeprefix("rubric-rm: error: ").strip()

    assert fault(3) == (
        f"{path}: cannot be split: prompts that share an id, text or rubric stay together, which leaves 1 group(s) "
        f"where 3 are needed; add prompts, or set 'split' on every record{allow}"
    )
    assert fault(2).endswith("set 'split' on every record")  # sharing rubrics would not be enough
    assert fault(2, "--shared_rubrics", "true") == (
        f"{path}: cannot be split: prompts that share an id or text stay together, which leaves 2 group(s) "
        "where 3 are needed; add prompts, or set 'split' on every record"
    )
    assert fault(3, "--shared_rubrics", "true") == ""


def test_prompts_without_responses_are_split_as_well(tmp_path, capsys):
    prompts = [PromptRecord(prompt_id=f"p{n}", prompt=f"Say {n}.") for n in range(10)]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    output = tmp_path / "split.jsonl"
    code, out, _ = run(capsys, "split", "--data", tmp_path / "prompts.jsonl", "--output", output)
    assert code == 0 and "prompts: train 7, validation 1, test 2" in out
    assert Counter(prompt.split for prompt in load_prompts(output)) == {"train": 7, "validation": 1, "test": 2}


def test_a_prompt_gathers_different_responses_and_each_once():
    imported = Imported()
    rubric = Rubric(criteria=(Criterion(id="a", text="Is right."),))
    for text in ("one", "two", "two", "one"):
        example = Example("Say a number.", rubric, "p", (Answer(text, "reference", generator="reference"),))
        imported.add(example, "F", source="", licence="")
    assert {name: item.response for name, item in imported.responses.items()} == {
        "p-reference": "one",
        "p-reference-2": "two",
    }
    assert (imported.repeated, imported.left_out) == (3, {"repeated response": 2})
