"""A judge behind a System One server (`POST /v1/systemone`): decision models that answer typed questions softly.

Jev, Clef and Laya speak it, as do `any2jev serve` and `transformers serve` with any causal language model. A criterion
is a yes/no question (`noul`), one with levels a `score`; a state of prompt and response goes along as JSON, so nothing
in them can pose as a question.
"""

import json
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from rubric_data.endpoint import CHARACTERS, NO_REPLY, Endpoint
from rubric_data.judges import Finished, JudgeRequest, RawVerdict, answer_all, masked_verdicts
from rubric_data.records import Criterion, Verdict, content_hash
from rubric_data.spending import Spent

_NOUL, _SCORE = (
    "Does the response meet this criterion? {}",
    "Which level does the response reach on this criterion, from worst to best? {}",
)


class SystemOneJudge:
    """Asks ``model`` behind ``endpoint``, whose base URL ends where ``/systemone`` begins; soft verdicts in [0, 1]."""

    most_criteria = 64  # questions in one call; what `transformers serve` takes

    def __init__(self, model: str, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = f"systemone:{model}{endpoint.place}"
        self.template = content_hash([_NOUL, _SCORE, "state: prompt, response"])
        self._model = model

    @property
    def spent(self) -> Spent:
        """What the calls have used so far."""
        return self.endpoint.spent

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """Verdicts aligned with each request's criteria; what fails after all tries is masked.

        Raises UserError if the endpoint refuses the key or does not know the model.
        """
        return answer_all(self, requests)

    def stream(self, requests: Iterable[JudgeRequest]) -> Generator[Finished, None, None]:
        """Verdicts as they come; see `rubric_data.judges.StreamingJudge`."""
        return self.endpoint.stream(self._ask, requests)

    def _ask(self, request: JudgeRequest, stop: threading.Event) -> tuple[Verdict, ...]:
        criteria = request.criteria
        body = {
            "model": self._model,
            "state": {"prompt": request.prompt, "response": request.response},
            "questions": {str(number): question(criterion) for number, criterion in enumerate(criteria, start=1)},
        }
        likely = (len(request.prompt) + len(request.response) + sum(len(c.text) for c in criteria)) // CHARACTERS
        try:
            reply = self.endpoint.post("/systemone", body, stop, holds="answers", likely_tokens=likely)
        except NO_REPLY as error:
            return masked_verdicts(criteria, *self.endpoint.failure(error), judge=self.name)
        answers = reply["answers"]
        raw = json.dumps(reply, ensure_ascii=False)
        if not isinstance(answers, Mapping):
            detail = "the answers are no object"
            return masked_verdicts(criteria, "parse_failure", detail, judge=self.name, raw=raw)
        return tuple(
            self._verdict(answers.get(str(number)), criterion, raw)
            for number, criterion in enumerate(criteria, start=1)
        )

    def _verdict(self, answer: Any, criterion: Criterion, raw: str) -> Verdict:
        if answer is None:
            return masked_verdicts([criterion], "missing_answer", "not in the reply", judge=self.name, raw=raw)[0]
        value = read_answer(answer, len(criterion.levels))
        if value is None:
            detail = f"no probability in {json.dumps(answer)[:80]}"
            return masked_verdicts([criterion], "parse_failure", detail, judge=self.name, raw=raw)[0]
        return RawVerdict(criterion_id=criterion.id, value=value, judge=self.name, raw=raw)


def question(criterion: Criterion) -> dict[str, Any]:
    """A criterion as a typed question."""
    if not criterion.levels:
        return {"type": "noul", "instructions": _NOUL.format(criterion.text)}
    levels = [f"{level.label}: {level.anchor}" if level.anchor else level.label for level in criterion.levels]
    return {"type": "score", "instructions": _SCORE.format(criterion.text), "criteria": levels}


def read_answer(answer: Any, levels: int) -> float | None:
    """P(true) of a `noul` answer, or the expected level of a `score` over the best one; None if it is neither."""
    number = answer.get("score" if levels else "noul") if isinstance(answer, Mapping) else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    best = levels - 1 if levels else 1
    return float(number) / best if 0 <= number <= best else None
