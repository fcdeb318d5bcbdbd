"""Prompts about fruit, each with one response, for runs of the RL commands on a tiny model."""

from rubric_data.io import write_judged
from rubric_data.records import JudgedResponse


def write_fruit(path, rubric, splits):
    """One record a split into ``path``, all under ``rubric``; the path as a string."""
    records = [
        JudgedResponse(
            prompt_id=f"p{number}",
            prompt=f"Name fruit number {number}.",
            response_id=f"p{number}-r",
            response="A pear.",
            rubric=rubric,
            split=split,
        )
        for number, split in enumerate(splits)
    ]
    write_judged(path, records)
    return str(path)
