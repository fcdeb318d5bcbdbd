"""Each format on a small file in its shape: the exact records that come out, and back again."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rubric_data.formats import FORMATS
from rubric_data.formats.base import Group, Message, prompt_messages, read_row, transcript, unique_ids
from rubric_data.formats.commands import Imported
from rubric_data.formats.openrubrics import rubric_items
from rubric_data.formats.preferences import OVERALL
from rubric_data.formats.rar import pitfall_sign
from rubric_data.formats.source import read_rows
from rubric_data.formats.wildchecklists import checklist_items
from rubric_data.records import Criterion, JudgedResponse, Level, PromptRecord, Rubric, Verdict
from rubric_data.reward import rubric_reward

FIXTURES = Path(__file__).parent / "fixtures"


def examples(name, file):
    """The example of every row of a fixture."""
    form = FORMATS[name]
    return [read_row(form, row, where) for where, row in read_rows(str(FIXTURES / file), unfold=form.unfold)]


def criteria(example):
    return [(item.id, item.text, item.weight, item.tags) for item in example.rubric.criteria]


def answers(example):
    return [(answer.name, answer.text, answer.generator, answer.preference) for answer in example.answers]


# --- exact records -------------------------------------------------------------------------------------------


def test_rar():
    bread, total = examples("rar", "rar.jsonl")
    assert bread.prompt == "Why does bread rise?"
    assert criteria(bread) == [
        ("Names Yeast", "Names yeast as the source of the gas.", 5, ("essential",)),
        ("Gluten", "Says that gluten holds the gas.", 3, ("important",)),
        ("Brief", "Is at most three sentences long.", 1, ("optional",)),
        ("No Gas Named", "Does not mention carbon dioxide.", -2, ("pitfall",)),  # met is bad
        ("Baking Soda", "The response should avoid crediting baking soda.", 1, ("pitfall",)),  # met is good
    ]
    assert answers(bread) == [("reference", "Yeast turns sugar into gas, and gluten holds it.", "reference", None)]
    assert bread.left_out == ("pitfall whose words leave its sign open",)
    assert criteria(total) == [
        ("Sum", "States that the sum is 4.", 5, ()),
        ("Sum #2", "Importance Criteria: Shows the sum.", 2, ()),  # no known category: left as it is
    ]
    assert (total.answers, total.left_out) == ((), ("empty reference answer",))


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        # a fault is named: met is bad
        ("Does not mention checking the airway first.", -1),
        ("Doesn’t explain why the reaction is exothermic.", -1),
        ("The response does not clearly state the units.", -1),
        ("Recommends immediate surgery.", -1),
        ("Fails to convert Celsius to Kelvin.", -1),
        ("Overlooks the patient's allergy.", -1),
        ("Confuses mitosis with meiosis.", -1),
        ("Does not mention that incorrect dosing is dangerous.", -1),
        ("Does not use the given data.", -1),
        # what avoids a fault is named: met is good
        ("Avoids overly technical language.", 1),
        ("The response should not omit the sign convention.", 1),
        ("The answer must avoid rounding too early.", 1),
        ("The final explanation should clarify that mass is conserved.", 1),
        ("It is important to avoid mixing units.", 1),
        ("Do not assume ideal behaviour.", 1),
        ("Does not confuse speed with velocity.", 1),
        ("Does not overlook friction.", 1),
        ("Does not include irrelevant history.", 1),
        ("Does not provide any unnecessary detail.", 1),
        # open: it depends on whether what follows is right
        ("Does not recommend waiting two weeks.", None),
        ("Does not suggest delaying fluids.", None),
        ("Never advises a diet.", None),
    ],
)
def test_the_words_of_a_pitfall_decide_its_sign(text, sign):
    assert pitfall_sign(text) == sign


def test_healthbench():
    ear, water = examples("healthbench", "healthbench.jsonl")
    assert (ear.prompt_id, water.prompt_id) == ("hb-1", "hb-2")
    assert ear.prompt == "user: My ear hurts.\n\nassistant: Since when?\n\nuser: Since Monday, with fever."
    assert water.prompt == "How much water a day?"
    assert criteria(ear) == [
        ("c1", "Advises to see a doctor within a day.", 7, ("level:example", "axis:accuracy")),
        ("c2", "Asks about discharge.", 3, ("axis:context_awareness",)),
        ("c3", "Recommends antibiotics without an examination.", -8, ("axis:accuracy",)),
    ]
    assert answers(ear) == [
        ("reference", "See a doctor today. Is there discharge?", "reference", None),
        ("draft-1", "Rest and drink.", "unknown", None),
        ("draft-2", "Take antibiotics.", "unknown", None),
    ]
    assert (len(water.rubric.criteria), water.left_out) == (1, ("criterion of weight 0",))


@pytest.mark.parametrize(
    ("met", "score"),
    [((1, 1, 0), 1.0), ((1, 0, 0), 0.7), ((0, 1, 0), 0.3), ((1, 1, 1), 0.2), ((1, 0, 1), 0.0), ((0, 0, 0), 0.0)],
)
def test_our_reward_is_the_score_of_healthbench(met, score):
    """Points 7, 3 and -8: those earned, over 10; (7 - 8) / 10 is clipped to 0."""
    rubric = examples("healthbench", "healthbench.jsonl")[0].rubric
    assert rubric_reward(rubric, met) == pytest.approx(score)


def test_openrubrics():
    form = FORMATS["openrubrics"]
    rows = [row for _, row in read_rows(str(FIXTURES / "openrubrics.jsonl"))]
    rivers, greeting, count = (read_row(form, row, "F") for row in rows[:3])
    assert criteria(rivers) == [
        ("c1", "The response names exactly three rivers.", 1, ("hard rule",)),
        ("c2", "The response is easy to read, also for children.", 1, ("principle",)),
    ]
    assert answers(rivers) == [("a", "Rhine, Nile, Po.", "unknown", 1.0), ("b", "Rivers are long.", "unknown", 0.0)]
    assert [(text, tag) for _, text, _, (tag,) in criteria(greeting)] == [
        ("The response greets.", "hard rule"),
        ("The response is polite.", "principle"),
    ]
    assert [answer.preference for answer in greeting.answers] == [0.0, 1.0]
    assert [answer.preference for answer in count.answers] == [None, None]
    assert count.left_out == ("preference: no winner named",)


def test_an_item_of_openrubrics_keeps_a_list_within_it_apart_from_the_next():
    assert rubric_items("Rubric:\n1. Uses 3.5 mm. [Hard Rule]\n2. Is kind [sic]. [Principle]") == [
        ("Uses 3.5 mm.", "hard rule"),
        ("Is kind [sic].", "principle"),
    ]


def test_wildchecklists():
    haiku, greeting = examples("wildchecklists", "wildchecklists.jsonl")
    assert criteria(haiku) == [
        ("c1", "Is the text a haiku?", 100, ()),
        ("c2", "Does it satisfy both of these:\n1) it is about snow\n2) it is calm", 75.5, ()),
    ]
    assert answers(haiku) == [
        ("chosen", "White flakes fall slowly", "unknown", 1.0),
        ("rejected", "Snow is cold.", "unknown", 0.0),
    ]
    assert haiku.left_out == ("requirement without an importance",)
    assert greeting.rubric is None
    assert greeting.left_out == ("criterion of weight 0", "rubric without a criterion of positive weight")


def test_a_checklist_without_items():
    assert checklist_items("") == checklist_items("None of these apply.") == []


def test_chasing_tail():
    (tides,) = examples("chasing-tail", "chasing_tail.jsonl")
    assert criteria(tides) == [("c1", "Names the Moon.", 3, ()), ("c2", "Is short.", 1, ())]
    assert (tides.prompt_id, tides.answers) == ("", ())


def test_scored_responses_of_chasing_tail():
    (tides,) = examples("chasing-tail", "chasing_tail_scored.json")
    assert tides.prompt_id == "t1"
    assert criteria(tides) == [("c1", "Names the Moon.", 3, ()), ("c2", "Is short.", 1, ())]
    reason = "parse_failure: the verifier's reply has no yes or no here"
    moon, magic = tides.answers
    assert moon.verdicts == (
        Verdict(criterion_id="c1", value=1.0, judge="unknown"),
        Verdict(criterion_id="c2", masked=reason, judge="unknown"),  # their score counts it as "no"
    )
    assert [verdict.masked for verdict in magic.verdicts] == [reason, reason]  # as it does these
    assert tides.left_out == ("verdict on a criterion the rubric does not have",)


def test_autorubric():
    wet, dry = examples("autorubric", "autorubric.json")
    assert wet.prompt == "Describe rain."
    assert criteria(wet) == [
        ("wet", "Says that rain is wet.", 10, ()),
        ("tone", "How is the tone?", 5, ()),
        ("c3", "Contains an error.", -4, ()),
    ]
    assert wet.rubric.criteria[1].levels == (Level(label="cold"), Level(label="even"), Level(label="warm"))
    assert wet.left_out == ("criterion whose options are no even steps",)
    assert answers(wet) == [("submission", "Rain is wet.", "a good one", None)]
    assert [verdict.value for verdict in wet.answers[0].verdicts] == [1.0, 0.5, 0.0]
    assert answers(dry)[1] == ("reference", "Water falls from clouds.", "reference", None)
    assert [(verdict.value, verdict.masked) for verdict in dry.answers[0].verdicts] == [
        (None, "abstained: CANNOT_ASSESS"),
        (None, "abstained: none"),
        (1.0, None),
    ]


def test_autorubric_in_yaml_with_sections():
    (greeting,) = examples("autorubric", "autorubric.yaml")
    assert criteria(greeting) == [("c1", "Greets.", 10, ())]  # the package's default weight
    assert greeting.answers[0].verdicts == ()
    assert greeting.left_out == ("guidelines of a rubric",)


def test_verifiers():
    sky, bird = examples("verifiers", "verifiers.jsonl")
    assert sky.prompt == "system: Be brief.\n\nuser: Why is the sky blue?"
    assert criteria(sky) == [
        ("scattering", "Names scattering.", 2, ()),
        ("clarity", "Is clear.", 1, ()),
        ("jargon", "Uses jargon.", -1, ()),  # its best answer is no
    ]
    assert [level.label for level in sky.rubric.criteria[1].levels] == ["poor", "fair", "good"]
    assert answers(sky) == [("reference", "Air scatters blue light most.", "reference", None)]
    assert (bird.prompt, bird.answers) == ("Name a bird.", ())


def test_preferences():
    imported, form = Imported(), FORMATS["preferences"]
    rows = list(read_rows(str(FIXTURES / "preferences.jsonl")))
    for where, row in rows[:6]:
        imported.add(read_row(form, row, where), where, source="s", licence="l")
    found = [(item.prompt, item.response, item.preference) for item in imported.responses.values()]
    assert found == [
        ("What colour is the sky?", "Blue.", 1.0),
        ("What colour is the sky?", "Green.", 0.0),
        ("The sky is", " blue.", 1.0),  # as TRL cuts it, but never within a word
        ("The sky is", " black.", 0.0),
        ("Greet me.", "Hello!", 1.0),
        ("Greet me.", "No.", 0.0),
        ("Sing.", "La la.", 1.0),
        ("Sing.", "Never.", 0.0),
        ("Count.", "1 2 3", 1.0),
        ("Count.", "3 1", 0.0),
        ("What colour is the sky?", "Blue, mostly.", 1.0),
        ("What colour is the sky?", "Green.", 0.0),
    ]
    assert len(imported.prompts) == 6  # a pair a prompt: preferences of different rows are not comparable
    assert {prompt.rubric for prompt in imported.prompts.values()} == {OVERALL}


# --- there and back ------------------------------------------------------------------------------------------

words = st.text(min_size=1, max_size=12).filter(lambda text: text == text.strip() and text)
weights = st.floats(0.01, 1e6)
PITFALLS = {"Does not mention X.": -1, "Recommends X.": -1, "Avoids X.": 1, "The answer should not be X.": 1}


@st.composite
def plain(draw, sign=1):
    return Criterion(id="x", text=draw(words), weight=sign * draw(weights))


@st.composite
def for_rar(draw):
    category = draw(st.sampled_from(["", "essential", "important", "optional", "pitfall"]))
    text = draw(st.sampled_from(list(PITFALLS)) if category == "pitfall" else words.map("Says {}".format))
    tags = (category,) if category else ()
    return Criterion(id="x", text=text, weight=PITFALLS.get(text, 1) * draw(weights), tags=tags)


@st.composite
def levelled(draw):
    labels = draw(st.sampled_from([("no", "some", "yes"), ("1", "2", "3", "4"), ("bad", "good")]))
    return Criterion(id="x", text=draw(words), weight=draw(weights), levels=tuple(Level(label=name) for name in labels))


@st.composite
def tagged(draw):
    criterion = draw(plain(draw(st.sampled_from([1, -1]))))
    return criterion.model_copy(update={"tags": tuple(draw(st.lists(words, max_size=2)))})


KINDS = {
    "rar": for_rar(),
    "healthbench": tagged(),
    "verifiers": plain() | plain(-1) | levelled(),
    "autorubric": plain() | plain(-1) | levelled(),
}


@st.composite
def groups(draw, name):
    """A prompt and what the format can hold of its responses: an answer for reference, and perhaps others."""
    found = [draw(plain()), *draw(st.lists(KINDS[name], max_size=4))]
    ids = [f"c{place}" for place in range(1, len(found) + 1)]
    if name != "healthbench":  # it has no ids
        ids = unique_ids(draw(st.lists(words, min_size=len(found), max_size=len(found))))
    rubric = Rubric(
        criteria=tuple(item.model_copy(update={"id": taken}) for item, taken in zip(found, ids, strict=True))
    )
    prompt = PromptRecord(prompt_id=draw(words), prompt=draw(words), rubric=rubric)
    texts = draw(st.lists(words, min_size=1, max_size=3, unique=True))
    generators = ["reference", "unknown", "unknown"] if name in ("healthbench", "autorubric") else ["reference"]
    responses = [
        JudgedResponse(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            response_id=f"r{place}",
            response=text,
            rubric=rubric,
            generator=generator,
            verdicts=draw(verdicts(rubric)) if name == "autorubric" and generator == "unknown" else (),
        )
        for place, (text, generator) in enumerate(zip(texts, generators, strict=False))
    ]
    if name == "autorubric":  # every item is a response
        responses = [item.model_copy(update={"generator": "unknown"}) for item in responses]
    return Group(prompt, tuple(responses))


@st.composite
def verdicts(draw, rubric):
    steps = [max(1, len(item.levels) - 1) for item in rubric.criteria]
    values = [draw(st.none() | st.integers(0, count).map(lambda step, count=count: step / count)) for count in steps]
    return tuple(
        Verdict(criterion_id=item.id, value=value, masked="abstained: x" if value is None else None)
        for item, value in zip(rubric.criteria, values, strict=True)
    )


def back(name, written):
    """What an import makes of an export, by way of JSON."""
    form, imported = FORMATS[name], Imported()
    content = json.loads(json.dumps(written.content))
    rows = form.unfold(content, "F") if isinstance(content, dict) else [("F", row) for row in content]
    for where, row in rows:
        imported.add(read_row(form, row, where), where, source="", licence="")
    return imported


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_export_and_import_keep_what_the_format_can_hold(name, data):
    group = data.draw(groups(name))
    written = FORMATS[name].write([group])
    imported = back(name, written)
    assert not written.left_out and not imported.left_out
    assert [(prompt.prompt, prompt.rubric) for prompt in imported.prompts.values()] == [
        (group.prompt.prompt, group.prompt.rubric)
    ]
    kept = [(item.response, item.generator) for item in imported.responses.values()]
    assert kept == [(item.response, item.generator) for item in group.responses]
    for before, after in zip(group.responses, imported.responses.values(), strict=True):
        assert before.values() == pytest.approx(after.values(), nan_ok=True)
        assert [bool(item.masked) for item in before.verdicts] == [bool(item.masked) for item in after.verdicts]


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(words, words, words).filter(lambda row: row[1] != row[2]), min_size=1, max_size=4))
def test_preference_pairs_survive_export_and_import(pairs):
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    form, imported = FORMATS["preferences"], Imported()
    for row in rows:
        imported.add(read_row(form, row, "F"), "F", source="", licence="")
    sides = list(imported.responses.values())
    found = [Group(prompt, tuple(sides[2 * n : 2 * n + 2])) for n, prompt in enumerate(imported.prompts.values())]
    written = form.write(found, by="preference")
    assert not written.left_out
    again = back("preferences", written)
    assert again.prompts == imported.prompts
    assert again.responses == imported.responses


# --- pieces --------------------------------------------------------------------------------------------------


def test_ids_are_made_unique_by_place_and_number():
    assert unique_ids(["a", " ", "a ", "c2", "a #2"]) == ["a", "c2", "a #2", "c2 #2", "a #2 #2"]


@given(
    st.booleans(),
    st.lists(st.text("ab: \nuser", max_size=20), min_size=1, max_size=5).filter(lambda words: len(words) % 2),
)
def test_a_transcript_is_read_back_as_its_turns(with_system, contents):
    roles = ["user", "assistant"] * 3
    turns = [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]
    turns = [Message(role="system", content="Be brief.")] * with_system + turns
    prompt = transcript(turns)
    read = prompt_messages(prompt)
    assert transcript([Message(**one) for one in read]) == prompt  # whatever it was taken for
    if len(turns) > 1 and not any("\n\nuser: " in turn.content for turn in turns):
        assert read == [turn.model_dump() for turn in turns]


def test_what_is_no_transcript_stays_one_message():
    for prompt in (
        "Name a fruit.",
        "user: Hi.",  # one message alone has no role before it
        "user: Hi.\n\nassistant: Yes?",  # nothing is left to answer
        "assistant: Hi.\n\nuser: Yes?",
        "user: Hi.\n\nuser: Hello?",
        "As in user: Hi.\n\nassistant: Yes?\n\nuser: Go.",
        "",
    ):
        assert prompt_messages(prompt) == [{"role": "user", "content": prompt}]


def test_one_message_is_its_words_and_several_are_a_transcript():
    turns = [Message(role="user", content="Hi."), Message(role="assistant", content="Yes?")]
    assert transcript(turns[:1]) == "Hi."
    assert transcript(turns) == "user: Hi.\n\nassistant: Yes?"


def test_rar_exports_a_pitfall_with_the_sign_of_its_words():
    rubric = examples("rar", "rar.jsonl")[0].rubric
    group = Group(PromptRecord(prompt_id="p", prompt="Why?", rubric=rubric))
    (row,) = FORMATS["rar"].write([group]).content
    assert [(item["description"], item["weight"]) for item in row["rubric"][3:]] == [
        ("Pitfall Criteria: Does not mention carbon dioxide.", -2),
        ("Pitfall Criteria: The response should avoid crediting baking soda.", 1),
    ]


def test_verifiers_turn_a_pitfall_round():
    """The package takes no negative weight; with weights 3 and -1 and answers (yes, no) it scores (3 + 1) / 4."""
    rubric = Rubric(
        criteria=(Criterion(id="a", text="Is right.", weight=3), Criterion(id="b", text="Is rude.", weight=-1))
    )
    (row,) = FORMATS["verifiers"].write([Group(PromptRecord(prompt_id="p", prompt="Why?", rubric=rubric))]).content
    assert json.loads(row["info"])["criteria"] == [
        {"name": "a", "text": "Is right.", "weight": 3, "choices": ["no", "yes"]},
        {"name": "b", "text": "Is rude.", "weight": 1, "choices": ["yes", "no"]},
    ]


def test_what_a_format_cannot_hold_is_counted(judged):
    rich = Criterion(id="a", text="Is right.", veto=True, tags=("new",), levels=(Level(label="n"), Level(label="y")))
    rubric = Rubric(criteria=(rich, Criterion(id="b", text="Is long.")))
    bare = PromptRecord(prompt_id="q", prompt="No rubric.")
    groups = [Group(PromptRecord(prompt_id="p", prompt="Why?", rubric=rubric), tuple(judged[:2])), Group(bare)]
    assert FORMATS["rar"].write(groups).left_out == {
        "prompts without a rubric": 1, "responses": 2, "tags": 1, "levels": 1, "vetoes": 1, "verdicts": 4,
    }  # fmt: skip
    assert FORMATS["healthbench"].write(groups).left_out == {
        "prompts without a rubric": 1, "levels": 1, "vetoes": 1, "verdicts": 4,
    }  # fmt: skip
