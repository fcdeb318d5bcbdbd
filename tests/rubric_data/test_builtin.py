import json
import math
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import rm.build_builtin as script
from rubric_data.builtin import load_builtin
from rubric_data.builtin.criteria import CHECKS, choose
from rubric_data.builtin.edits import _FRAMES, _MOVES, _STARTERS, Bench, Text, climb, parse
from rubric_data.builtin.recipe import KINDS, SEED, build, compatible, draft_prompts, split_topics
from rubric_data.builtin.topics import load_topics
from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest
from rubric_data.records import Rubric
from rubric_data.reward import rubric_reward
from rubric_data.verifiers import VerifierJudge, verify, words_of


@pytest.fixture(scope="module")
def records():
    return load_builtin()


@pytest.fixture(scope="module")
def verdicts(records):
    """Verdict values (K,) of every record, by the verifiers."""
    requests = [JudgeRequest(record.prompt, record.response, record.rubric.criteria) for record in records]
    return [[verdict.value for verdict in row] for row in VerifierJudge().judge(requests)]


@pytest.fixture(scope="module")
def rewards(records, verdicts):
    """prompt id -> (generator, reward) of its responses."""
    found = defaultdict(list)
    for record, values in zip(records, verdicts, strict=True):
        found[record.prompt_id].append((record.generator, rubric_reward(record.rubric, values)))
    return found


# ---- the files ---------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_recipe_makes_of_the_stored_samples():
    built = build(script.stored_samples())
    assert script.differing(built) == []
    # and the comparison sees a change of one letter
    changed = type(built)(built.prompts, (built.responses[0].replace("e", "a", 1), *built.responses[1:]))
    assert script.differing(changed) == ["responses.jsonl"]


def test_size_and_composition(records):
    prompts = {record.prompt_id: record for record in records}
    assert len(prompts) == 156
    assert len({record.prompt for record in prompts.values()}) == 156
    assert Counter(record.split for record in prompts.values()) == {"train": 108, "validation": 18, "test": 30}
    kinds = Counter(draft.kind for draft in draft_prompts())
    assert len(kinds) == 12 and set(kinds.values()) == {13}
    assert len({record.response_id for record in records}) == len(records)
    for record in prompts.values():
        assert 6 <= len(record.rubric.criteria) <= 8
        assert all(len(criterion.text.split()) <= 14 for criterion in record.rubric.criteria)
        assert len(record.prompt.split()) <= 36
    assert sum((script.FOLDER / name).stat().st_size for name in ("prompts.jsonl", "responses.jsonl")) < 10_000_000


def test_every_prompt_has_samples_at_three_temperatures_and_five_exemplars_all_different(records):
    by_prompt = defaultdict(list)
    for record in records:
        by_prompt[record.prompt_id].append(record)
    for rows in by_prompt.values():
        generators = Counter(row.generator for row in rows)
        assert [generators[f"smollm2-135m-instruct@T{t}"] for t in (0.4, 0.7, 1.0)] == [2, 2, 2]
        edits = [row.response for row in rows if row.generator.startswith("edit:")]
        assert len(edits) >= 5
        assert len(set(edits)) == len(edits)
        assert all(text.strip() for text in edits)
        assert {row.source for row in rows} == {"rubric-rm"}


def test_a_topic_stands_in_one_split_only(records):
    names = {topic.name for topic in load_topics()}
    splits = defaultdict(set)
    for record in records:
        topic = next(name for name in names if record.prompt_id.startswith(f"{name}-"))
        splits[topic].add(record.split)
    assert set(splits) == names
    assert all(len(found) == 1 for found in splits.values())


def test_the_split_is_by_rank_of_the_hash():
    topics = load_topics()
    splits = split_topics(topics)
    assert Counter(splits.values()) == {"train": 36, "validation": 6, "test": 10}
    assert split_topics(topics[::-1]) == splits
    assert sorted(name for name, split in splits.items() if split == "test") == (
        ["boats", "owls", "rice", "rivers", "robots", "salt", "stars", "trees", "volcanoes", "wolves"]
    )


# ---- what it is good for -----------------------------------------------------------------------------------------


def test_exemplars_are_what_their_generator_claims(records, verdicts):
    for record, values in zip(records, verdicts, strict=True):
        ideal = [float(criterion.weight > 0) for criterion in record.rubric.criteria]
        missed = sum(value != wanted for value, wanted in zip(values, ideal, strict=True))
        match record.generator:
            case "edit:toward-all":
                assert missed == 0
            case "edit:excellent-minus-one":
                assert missed == 1
            case "edit:away":
                assert missed >= 2
            case "edit:toward-part":
                assert missed >= 1


def test_no_family_of_checks_gives_its_verdicts_away(records, verdicts):
    met = defaultdict(list)
    train = defaultdict(list)
    test_labels, test_tags = [], []
    for record, values in zip(records, verdicts, strict=True):
        for criterion, value in zip(record.rubric.criteria, values, strict=True):
            (tag,) = criterion.tags
            met[tag].append(value)
            if record.split == "train":
                train[tag].append(value)
            if record.split == "test":
                test_labels.append(value)
                test_tags.append(tag)
    assert len(met) == 12
    assert all(0.3 <= np.mean(values) <= 0.7 for values in met.values())
    assert roc_auc_score(test_labels, [np.mean(train[tag]) for tag in test_tags]) < 0.60


def test_length_alone_says_little(records, verdicts):
    labels, words = [], []
    for record, values in zip(records, verdicts, strict=True):
        labels += values
        words += [len(record.response.split())] * len(values)
    assert 0.39 < roc_auc_score(labels, words) < 0.61


def test_the_best_responses_of_a_prompt_differ_in_reward(rewards):
    tied = pairs = 0
    for rows in rewards.values():
        best = sorted((reward for _, reward in rows), reverse=True)[: math.ceil(len(rows) / 4)]
        assert best[0] == 1.0
        pairs += len(best) * (len(best) - 1) // 2
        tied += sum(a == b for i, a in enumerate(best) for b in best[:i])
    assert tied / pairs < 0.05


def test_samples_leave_room_to_improve(rewards):
    sampled = [reward for rows in rewards.values() for generator, reward in rows if generator.endswith("@T1.0")]
    assert 0.3 < np.mean(sampled) < 0.5
    assert np.std(sampled) > 0.15


# ---- topics, words, prompts --------------------------------------------------------------------------------------


def test_every_topic_offers_what_the_edits_draw_on():
    for topic in load_topics():
        facts = " ".join(topic.facts)
        assert set(topic.keywords) <= set(words_of(facts)), topic.name
        assert len(set(topic.keywords)) == 5
        assert not any(digit in " ".join(topic.facts[:4]) for digit in "0123456789"), topic.name
        assert any(digit in topic.facts[4] for digit in "0123456789"), topic.name
        assert {"you", "your"} & set(words_of(topic.you)) and not {"i", "my"} & set(words_of(topic.you)), topic.name
        assert {"i", "my"} & set(words_of(topic.me)) and not {"you", "your"} & set(words_of(topic.me)), topic.name
        assert topic.question.endswith("?")
        assert not any(mark in "".join(topic.sentences) for mark in ",!"), topic.name


SLOTS = {"n": 2, "word": "Dear", "first": "tea", "second": "milk"}


def slots_of(check):
    text = " ".join((*CHECKS[check].wordings, *CHECKS[check].requests))
    return {name: value for name, value in SLOTS.items() if f"{{{name}}}" in text}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_has_three_wordings_that_name_its_slots_and_a_known_verifier(check):
    slots = slots_of(check)
    choice = choose(check, **slots)
    assert len(set(CHECKS[check].wordings)) >= 3
    for wording in CHECKS[check].wordings:
        assert all(f"{{{slot}}}" in wording for slot in slots)
        assert wording.format(**choice.slots).endswith(".")
    verify(choice.verifier, "Some text.", "A prompt.")  # raises if the name or an argument is wrong
    criterion = choice.criterion(3, 2.0, False, Random(0))
    assert (criterion.id, criterion.tags) == ("c3", (CHECKS[check].tag,))
    assert criterion.weight == (-2.0 if check == "filler" else 2.0)


def test_a_stated_number_means_the_same_to_reader_and_verifier():
    at_most = choose("words_max", n=2)
    assert [verify(at_most.verifier, text) for text in ("a b", "a b c")] == [1.0, 0.0]
    exactly = choose("sentences_exact", n=1)
    assert exactly.criterion(1, 1.0, False, Random(0)).text.count("sentences") <= 1
    assert [verify(exactly.verifier, text) for text in ("One.", "One. Two.")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("one", "other", "fits"),
    [
        (choose("keyword", word="tea"), choose("keyword", word="cup"), True),
        (choose("keyword", word="tea"), choose("avoid", word="tea"), False),
        (choose("keyword", word="tea"), choose("names_early", word="tea", n=3), True),
        (choose("words_max", n=30), choose("words_min", n=22), True),
        (choose("words_max", n=30), choose("words_min", n=23), False),
        (choose("json"), choose("title"), False),
        (choose("title"), choose("sentences_exact", n=2), False),
        (choose("ends_question"), choose("complete"), False),
        (choose("no_comma"), choose("no_comma"), False),
        (choose("one_paragraph"), choose("sentences_exact", n=1), False),
        (choose("one_paragraph"), choose("sentences_exact", n=2), True),
    ],
)
def test_checks_that_cannot_hold_together_are_kept_apart(one, other, fits):
    assert compatible(one, other) is fits
    assert compatible(other, one) is fits


def test_a_prompt_asks_for_every_stated_check_and_its_rubric_holds_them(records):
    rubrics = {record.prompt_id: record.rubric for record in records}
    for draft in draft_prompts():
        asked = rubrics[draft.prompt_id]
        assert 2 <= len(draft.stated) <= 3
        for choice in draft.stated:
            assert choice.verifier in [criterion.verifier for criterion in asked.criteria]
            requests = [request.format(**choice.slots) for request in CHECKS[choice.check].requests]
            assert any(request.lower() in draft.prompt.lower() for request in requests)
    first = draft_prompts()[0]
    assert (first.prompt_id, first.prompt) == (
        "boats-explain",
        "In simple terms, explain why boats float. "
        'Finish by asking a question, keep it to 25 words and mention "anchor" or "hull".',
    )


# ---- edits -------------------------------------------------------------------------------------------------------


def test_a_text_renders_its_parts():
    text = Text(items=("Owls hunt.", "They see well."))
    assert text.render() == "Owls hunt. They see well."
    assert Text(items=text.items, layout="1").render() == "1. Owls hunt.\n2. They see well."
    assert Text(items=text.items, layout="-", title="Owls").render() == "<<Owls>>\n- Owls hunt.\n- They see well."
    assert Text(items=text.items, opener="Well,").render() == "Well, owls hunt. They see well."
    assert Text(items=text.items, cut=1).render() == "Owls hunt. They see"
    assert json.loads(Text(items=text.items, json=True).render()) == {"answer": "Owls hunt. They see well."}
    assert Text(items=text.items, quoted=True, lower=True).render() == '"owls hunt. they see well."'
    assert Text(items=text.items, postscript="Bye.").render().endswith("well.\nP.S. Bye.")


@pytest.mark.parametrize(
    ("response", "items", "layout"),
    [
        ("One. Two", ("One.", "Two"), " "),
        ("Dear Tom,\n\nHow are you?", ("Dear Tom,", "How are you?"), "\n"),
        ("Facts:\n* a b\n* c d", ("Facts:", "a b", "c d"), "*"),
        ("1. a b\n2) c d", ("a b", "c d"), "1"),
        ("...", ("Nothing.",), " "),
    ],
)
def test_a_sample_is_taken_apart(response, items, layout):
    assert parse(response) == Text(items=items, layout=layout)


def bench(*choices):
    drawn = [choice.criterion(i, 1.0, False, Random(0)) for i, choice in enumerate(choices)]
    criteria = tuple(
        criterion.model_copy(update={"weight": 1.0}) for criterion in drawn
    )  # a pitfall alone is no rubric
    topic = next(topic for topic in load_topics() if topic.name == "owls")
    return Bench(
        "Tell this as a story: Owls hunt mice. Use no commas.", "story", topic, Rubric(criteria=criteria), choices
    )


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("wanted", [True, False])
def test_every_check_can_be_met_and_missed_by_its_moves(check, wanted):
    slots = slots_of(check)
    if check == "names_early":
        slots = {"word": "owls", "n": 3}
    if check in ("words_max", "words_min", "short_sentences", "short_words"):
        slots = {"n": 9}
    if check in ("no_copy", "bullets", "numbered"):
        slots = {"n": 3}
    at_work = bench(choose(check, **slots))
    start = Text(items=at_work.topic.facts[:2])
    reached = [climb(start, (wanted,), at_work, Random(seed)) for seed in range(5)]
    assert any(text is not None and at_work.verdicts(text.render()) == (wanted,) for text in reached)


def test_a_climb_never_claims_what_cannot_be():
    at_work = bench(choose("words_min", n=5), choose("words_max", n=3))
    assert climb(Text(items=at_work.topic.facts[:1]), (True, True), at_work, Random(0)) is None


def test_the_sentence_frames_fit_every_topic():
    for topic in load_topics():
        for frame in [*sum(_FRAMES.values(), ()), *sum(_STARTERS.values(), ())]:
            assert "{" not in frame.format(**vars(topic))
    assert set(_MOVES) == set(CHECKS)
    assert set(_FRAMES) <= set(KINDS)
    assert SEED


# ---- the script --------------------------------------------------------------------------------------------------


def test_samples_of_other_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="not there; run without --reuse and --check"):
        script.stored_samples(tmp_path)
    for name in ("prompts.jsonl", "responses.jsonl"):
        (tmp_path / name).write_text((script.FOLDER / name).read_text().replace("Explain", "Describe"))
    with pytest.raises(UserError, match="its prompts are not the recipe's"):
        script.stored_samples(tmp_path)


def test_the_samplings_go_to_the_plan(monkeypatch):
    calls = []

    def fake(model, tokenizer, prompts, *, samples, max_new_tokens, temperature, seed, batch_size, progress):
        calls.append((temperature, max_new_tokens, samples, seed))
        return [[script_completion(f"{prompt} {seed} {s}") for s in range(samples)] for prompt in prompts]

    def script_completion(text):
        return type("Completion", (), {"text": text})

    monkeypatch.setattr(script, "sample", fake)
    monkeypatch.setattr(script, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(script, "load_causal_lm", lambda name, dtype: None)
    found = script.sample_responses()
    assert calls == [(0.4, 48, 1, 0), (0.4, 80, 1, 1), (0.7, 48, 1, 2), (0.7, 80, 1, 3), (1.0, 48, 2, 4)]
    first = draft_prompts()[0]
    assert found[first.prompt_id][0] == ("smollm2-135m-instruct@T0.4", f"{first.prompt} 0 0")
    assert [generator[-4:] for generator, _ in found[first.prompt_id]] == [
        "T0.4",
        "T0.4",
        "T0.7",
        "T0.7",
        "T1.0",
        "T1.0",
    ]
