import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rubric_data.errors import UserError
from rubric_data.io import SCHEMA, load_data, load_prompts, read_judged, write_judged
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict, Verifier
from rubric_data.split import check_leaks

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


# --- strategies ----------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
filled = texts.filter(lambda text: text.strip())
shares = st.floats(0, 1)
args = st.dictionaries(
    texts,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
        max_leaves=3,
    ),
    max_size=2,
)


@st.composite
def criteria(draw, name):
    veto = draw(st.booleans())
    weight = draw(st.floats(0.01, 1e300))
    return Criterion(
        id=name,
        text=draw(filled),
        weight=weight if veto or draw(st.booleans()) else -weight,
        levels=tuple(Level(label=draw(texts), anchor=draw(texts)) for _ in range(draw(st.sampled_from([0, 2, 3])))),
        veto=veto,
        tags=tuple(draw(st.lists(texts, max_size=2))),
        verifier=draw(st.none() | st.builds(Verifier, name=texts, args=args)),
    )


@st.composite
def verdicts(draw, name):
    masked = draw(st.none() | texts)
    return Verdict(
        criterion_id=name,
        value=draw(shares) if masked is None else None,
        masked=masked,
        judge=draw(texts),
        human=draw(st.none() | shares),
    )


@st.composite
def responses(draw, name):
    names = draw(st.lists(filled, min_size=1, max_size=3, unique=True))
    first = draw(criteria(names[0])).model_copy(update={"weight": 1.0})
    rubric = Rubric(criteria=(first, *(draw(criteria(other)) for other in names[1:])))
    return JudgedResponse(
        prompt_id=draw(texts),
        prompt=draw(texts),
        response_id=name,
        response=draw(texts),
        rubric=rubric,
        generator=draw(texts),
        verdicts=tuple(draw(verdicts(other)) for other in names if draw(st.booleans())),
        split=draw(st.sampled_from([None, "train", "validation", "test"])),
        source=draw(texts),
    )


@st.composite
def files(draw):
    names = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    return [draw(responses(name)) for name in names]


def response(**changes):
    fields = {
        "prompt_id": "p1",
        "prompt": "Say hi.",
        "response_id": "r1",
        "response": "hi",
        "rubric": {"criteria": [{"id": "c1", "text": "Greets."}, {"id": "c2", "text": "Short.", "weight": -1}]},
    }
    return fields | changes


def jsonl(folder, *rows, end="\n"):
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end)
    return path


# --- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=files())
def test_every_field_survives_a_round_trip(tmp_path, suffix, records):
    path = tmp_path / f"data{suffix}"
    write_judged(path, records)
    back = read_judged(path)
    assert back == records
    assert [record.model_dump_json() for record in back] == [record.model_dump_json() for record in records]


def test_ragged_criteria_bring_no_nulls_into_each_other(tmp_path):
    plain = Criterion(id="plain", text="Greets.")
    rich = Criterion(
        id="rich",
        text="Counts.",
        levels=(Level(label="no"), Level(label="yes", anchor="all of it")),
        tags=("format",),
        verifier=Verifier(name="words", args={"most": 3}),
    )
    other = Criterion(id="other", text="Counts.", verifier=Verifier(name="lines", args={"exact": [1, 2]}))
    record = JudgedResponse.model_validate(response(rubric=Rubric(criteria=(plain, rich, other))))
    write_judged(tmp_path / "a.parquet", [record])
    (back,) = read_judged(tmp_path / "a.parquet")
    assert [criterion.model_dump() for criterion in back.rubric.criteria] == [
        criterion.model_dump() for criterion in (plain, rich, other)
    ]
    assert back.verdicts == ()


def test_parquet_gives_verdicts_in_the_order_of_the_rubric(tmp_path):
    found = [{"criterion_id": "c2", "value": 0.25}, {"criterion_id": "c1", "masked": "timeout: late"}]
    record = JudgedResponse.model_validate(response(verdicts=found))
    write_judged(tmp_path / "a.parquet", [record])
    (back,) = read_judged(tmp_path / "a.parquet")
    assert back.verdicts == tuple(reversed(record.verdicts))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_equal_rubrics_are_one_object(tmp_path, suffix):
    rows = [JudgedResponse.model_validate(response(response_id=name)) for name in ("r1", "r2")]
    assert rows[0].rubric is not rows[1].rubric
    write_judged(tmp_path / f"a{suffix}", rows)
    first, second = read_judged(tmp_path / f"a{suffix}")
    assert first.rubric is second.rubric


def test_a_rubric_written_another_way_is_the_same_object(tmp_path):
    spelt_out = {
        "criteria": [{"text": "Greets.", "id": "c1", "weight": 1}, {"id": "c2", "text": "Short.", "weight": -1.0}]
    }
    first, second = read_judged(jsonl(tmp_path, response(), response(response_id="r2", rubric=spelt_out)))
    assert first.rubric is second.rubric


def test_written_parquet_extends_the_plain_schema(tmp_path):
    write_judged(tmp_path / "a.parquet", [JudgedResponse.model_validate(response())])
    assert pq.read_schema(tmp_path / "a.parquet").equals(SCHEMA)


# --- the plain schema ----------------------------------------------------------------------------------------


def plain_row(**changes):
    item = {
        "criterion_id": "c1",
        "text": "Greets.",
        "weight": 2.0,
        "verdict": 0.5,
        "human_verdict": None,
        "judge": "gpt-4o",
    }
    row = {
        "prompt_id": "p1",
        "prompt": "Say hi.",
        "response_id": "p1::m",
        "model": "m",
        "response": "hi",
        "criteria": [item | changes],
        "source": "a/b",
        "split": "test",
    }
    return row


def parquet(folder, *rows):
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_a_plain_row_becomes_a_record(tmp_path):
    (record,) = read_judged(parquet(tmp_path, plain_row(human_verdict=1.0)))
    assert record == JudgedResponse(
        prompt_id="p1",
        prompt="Say hi.",
        response_id="p1::m",
        response="hi",
        rubric=Rubric(criteria=(Criterion(id="c1", text="Greets.", weight=2.0),)),
        generator="m",
        verdicts=(Verdict(criterion_id="c1", value=0.5, judge="gpt-4o", human=1.0),),
        split="test",
        source="a/b",
    )


def test_a_human_verdict_alone_is_kept_beside_a_masked_one(tmp_path):
    (record,) = read_judged(parquet(tmp_path, plain_row(verdict=None, human_verdict=1.0)))
    (verdict,) = record.verdicts
    assert verdict.value is None and verdict.human == 1.0
    assert verdict.masked.startswith("unjudged")


SHARED_ROWS = {"structflow": (6734, 18551), "hellobench": (9688, 59607), "realsumm": (2000, 21075),
               "mrbench": (1929, 12808), "ttcw": (30, 420)}  # fmt: skip


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_shared_data_reads(name):
    path = SHARED / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    records = read_judged(path)
    assert (len(records), sum(len(record.verdicts) for record in records)) == SHARED_ROWS[name]
    assert set(Counter(record.split for record in records)) == {"train", "validation", "test"}
    check_leaks(records, shared_rubrics=True)


# --- what is said of bad files -------------------------------------------------------------------------------


def complaint(path):
    with pytest.raises(UserError) as caught:
        read_judged(path)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message and "http" not in message
    assert ";" in message, "a remedy follows the problem"
    return message.replace(str(path), "FILE")


def rubric(*items):
    return {"criteria": list(items)}


ONE = {"id": "c1", "text": "Greets."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            response(rubric=rubric(ONE, {"id": "c2", "text": "x"}, {"id": "c3", "text": "x", "weight": "heavy"})),
            "FILE:2: field rubric.criteria.2.weight: must be a valid number, unable to parse string as a number, "
            "got 'heavy'; correct it",
        ),
        (
            response(rubric=rubric({"id": "c3", "text": "x", "weight": float("nan")})),
            "FILE:2: field rubric.criteria.0: criterion 'c3': weight must be finite and non-zero, got nan; correct it",
        ),
        (
            response(rubric=rubric()),
            "FILE:2: field rubric: rubric: needs at least one criterion, got none; correct it",
        ),
        (
            response(rubric=rubric(ONE, ONE)),
            "FILE:2: field rubric: rubric: criterion id 'c1' appears twice; ids must be unique; correct it",
        ),
        (
            {"promt" if key == "prompt" else key: value for key, value in response().items()},
            "FILE:2: field prompt: is missing; rename 'promt'",
        ),
        (response(note="x"), "FILE:2: field note: is not known; remove or rename it"),
        (
            response(split="dev"),
            "FILE:2: field split: must be 'train', 'validation' or 'test', got 'dev'; correct it",
        ),
        (
            response(verdicts=[{"criterion_id": "c9", "value": 1}]),
            "FILE:2: response 'r1': verdict on unknown criterion 'c9'; correct it",
        ),
        (
            response(rubric=rubric({**ONE, "verifier": {"name": "words", "args": {"most": float("inf")}}})),
            "FILE:2: a verifier's args hold NaN or infinity; use finite numbers",
        ),
        ("[1, 2]", "FILE:2: holds [1, 2], not an object; write one JSON object a line"),
        ('{"a": }', "FILE:2: not valid JSON (Expecting value, column 7); write one JSON object a line"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_remedy(tmp_path, row, expected):
    assert complaint(jsonl(tmp_path, response(response_id="r0"), row)) == expected


def test_another_encoding_is_not_called_cut(tmp_path):
    path = jsonl(tmp_path, response(response_id="r0"), response())
    path.write_bytes(path.read_text().encode("utf-16"))
    assert complaint(path) == "FILE:1: not text in UTF-8; save the file as UTF-8"


def test_a_cut_file_is_called_cut(tmp_path):
    path = jsonl(tmp_path, response(response_id="r0"), response())
    path.write_bytes(path.read_bytes()[:-9])
    assert re.match("FILE:2: the last line is not complete JSON, the file seems cut off; ", complaint(path))


def test_a_file_cut_inside_a_character_is_called_cut(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "é'.encode()[:-1])
    assert "FILE:1: the last line is not complete JSON" in complaint(path)


def test_a_response_id_used_twice_is_refused(tmp_path):
    path = jsonl(tmp_path, response(), response(response_id="r2"), response())
    assert complaint(path) == "FILE:3: response_id 'r1' was used before, at FILE:1; make it unique"
    record = JudgedResponse.model_validate(response())
    with pytest.raises(UserError, match="response_id 'r1' was used before"):
        write_judged(tmp_path / "new.jsonl", [record, record])
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_a_missing_file(tmp_path, name):
    assert complaint(tmp_path / name).startswith("FILE: no such file; give 'builtin' or")
    with pytest.raises(UserError, match="no such file"):
        load_data(tmp_path / name)


def test_an_unknown_suffix(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b")
    assert complaint(path) == "FILE: unknown file type '.csv'; use .jsonl or .parquet"
    with pytest.raises(UserError, match="unknown file type"):
        write_judged(path, [JudgedResponse.model_validate(response())])


def test_files_without_a_response(tmp_path):
    assert complaint(jsonl(tmp_path, "", end="")) == "FILE: holds no responses; give a file with at least one"
    path = tmp_path / "data.parquet"
    pq.write_table(SCHEMA.empty_table(), path)
    assert complaint(path).startswith("FILE: holds no responses")
    with pytest.raises(UserError, match="no responses to write"):
        write_judged(tmp_path / "new.jsonl", [])


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps(response()) + "\n\n", encoding="utf-8")
    assert [record.response_id for record in read_judged(path)] == ["r1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"weight": 0.0},
            "FILE: row 1: field criteria.0: criterion 'c1': weight must be finite and non-zero, got 0.0; ",
        ),
        ({"criterion_id": None}, "FILE: row 1: field criteria.0.criterion_id: must be a valid string, got None; "),
        ({"verdict": 1.5}, "FILE: row 1: field criteria.0: verdict on 'c1': value must lie in [0, 1], got 1.5; "),
        ({"levels": "low"}, "FILE: row 1: field criteria.0.levels: must be JSON text, got 'low'; "),
        ({"wieght": 1.0}, "FILE: column 'criteria': field 'wieght' is not known (did you mean 'weight'?); "),
    ],
)
def test_a_bad_row_is_named_in_the_words_of_the_file(tmp_path, changes, expected):
    assert complaint(parquet(tmp_path, plain_row(**changes))).startswith(expected)


def test_a_missing_column(tmp_path):
    row = plain_row()
    del row["prompt"]
    assert complaint(parquet(tmp_path, row)).startswith("FILE: column 'prompt' is missing; the file has prompt_id, ")


def test_criteria_of_another_type(tmp_path):
    assert "column 'criteria' is DataType(string)" in complaint(parquet(tmp_path, plain_row() | {"criteria": "c1"}))


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"not parquet at all"])
def test_a_damaged_parquet_file(tmp_path, damage):
    path = parquet(tmp_path, plain_row())
    path.write_bytes(damage(path.read_bytes()))
    assert complaint(path).startswith("FILE: not a readable Parquet file (")


def test_half_a_character_is_told_of_where_it_stands(tmp_path):
    line = '{"prompt_id": "p", "prompt": "\\ud83d\\ude00 \\ud800", "rubric": null}'
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl:1: holds half a character \(\\ud800 without its other half\)"):
        load_prompts(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(line.replace("\\ud800", "") + "\n")
    assert load_prompts(tmp_path / "x.jsonl")[0].prompt == "\U0001f600 "
