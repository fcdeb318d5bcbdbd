from benchmarks.rl_cost import CRITERIA, filled_up
from rubric_data.io import load_data


def test_every_prompt_is_asked_ten_different_criteria_its_own_first():
    records = load_data("builtin")
    own = {record.prompt_id: [one.text for one in record.rubric.criteria] for record in records}
    found = filled_up(records)
    assert len(own) - 2 <= len(found) <= len(own)  # the first prompts have nobody before them
    for record in found:
        texts = [one.text for one in record.rubric.criteria]
        assert len(texts) == len(set(texts)) == CRITERIA
        assert texts[: len(own[record.prompt_id])] == own[record.prompt_id]
        assert not record.verdicts
