"""HealthBench (arXiv:2505.08775), as openai/healthbench and openai/simple-evals publish it.

Criteria of negative points are faults: met is bad. A response's score there is the points it earns over the sum of
the positive points, which is `rubric_data.reward`; only that HealthBench clips the mean over responses to [0, 1],
and this project each response.
"""

from collections.abc import Sequence

from rubric_data.formats.base import (
    REFERENCE,
    Answer,
    Example,
    Format,
    Group,
    Message,
    Row,
    Written,
    losses,
    make_rubric,
    number,
    prompt_messages,
    reference_and_others,
    transcript,
    with_rubric,
)
from rubric_data.records import Number


class _Item(Row):
    criterion: str
    points: Number
    tags: tuple[str, ...] = ()


class _Ideal(Row):
    ideal_completion: str = ""
    ideal_completions_ref_completions: tuple[str, ...] = ()


class _Row(Row):
    prompt: list[Message]
    prompt_id: str
    rubrics: list[_Item]
    ideal_completions_data: _Ideal = _Ideal()


def read(row: _Row, where: str) -> Example:
    """The dialogue as a prompt, its rubric, the physician's completion and the models' that were shown with it."""
    rubric, left_out = make_rubric(
        ({"text": item.criterion, "weight": item.points, "tags": item.tags} for item in row.rubrics), where
    )
    ideal = row.ideal_completions_data
    answers = [Answer(ideal.ideal_completion, REFERENCE, generator=REFERENCE)] if ideal.ideal_completion else []
    answers += [
        Answer(text, f"draft-{place}") for place, text in enumerate(ideal.ideal_completions_ref_completions, start=1)
    ]
    return Example(transcript(row.prompt), rubric, row.prompt_id, tuple(answers), left_out)


def write(groups: Sequence[Group]) -> Written:
    """One row a prompt; a reference answer is the ideal completion, other responses are its reference completions."""
    having, left_out = with_rubric(groups)
    rows = []
    for group, rubric in having:
        reference, others = reference_and_others(group.responses)
        ideal = {
            "ideal_completion": reference or "",
            "ideal_completions_group": None,
            "ideal_completions_ref_completions": [response.response for response in others],
        }
        rows.append(
            {
                "prompt": prompt_messages(group.prompt.prompt),
                "prompt_id": group.prompt.prompt_id,
                "rubrics": [
                    {"criterion": item.text, "points": number(item.weight), "tags": list(item.tags)}
                    for item in rubric.criteria
                ],
                "example_tags": [],
                "ideal_completions_data": ideal if group.responses else None,
            }
        )
    return Written(rows, left_out + losses(groups, "tags"))


FORMAT = Format(_Row, read, source="openai/healthbench", licence="MIT", write=write)
