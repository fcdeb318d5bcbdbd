"""Offline batches in OpenAI's format: open questions into request files, result files into verdicts. Sends nothing.

A request's ``custom_id`` is a hash of the ledger keys that it asks for. So a result finds its question without any
other record of what was sent, and one that belongs to another judge, mode, template or text finds none.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rubric_data.endpoint import Account, Limits, status_kind, tokens_of, without_surrogates
from rubric_data.errors import UserError
from rubric_data.files import atomic_path
from rubric_data.io import read_lines
from rubric_data.judges import is_unanswered, masked_verdicts
from rubric_data.labelling import Answer, Question, cut, keys_of
from rubric_data.openai_judge import ChatForm
from rubric_data.records import Verdict, content_hash
from rubric_data.spending import Spent

URL = "/v1/chat/completions"
# what OpenAI takes in one file
MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000


@dataclass
class Ingested:
    """What result files held, in lines."""

    replies: int = 0  # that answered an open question, failures included
    failures: int = 0  # of them, no answer; the question stays open
    repeated: int = 0  # second replies to one question: the first answer counts, a failure gives way to it
    before: int = 0  # replies to what the ledger answered already
    unknown: int = 0  # replies to nothing that this run asks
    models: dict[str, int] = field(default_factory=dict)  # who says to have answered


class ResultFiles:
    """The engine that finds answers in the result files of a batch, which it reads but does not wait for.

    ``paths`` are files, and folders of .jsonl files. ``asked`` is everything the run may ever have asked, answered or
    not. All answers come as one batch, so that they are kept together or, where a file is refused, not at all; the
    request files in ``folder`` are removed then, as they ask for what is answered. Raises UserError if a file is
    missing.
    """

    def __init__(
        self, form: ChatForm, paths: Sequence[Path], asked: Sequence[Question], limits: Limits, folder: Path
    ) -> None:
        self.name, self.template = form.name, form.template
        self.ingested = Ingested()
        self.form = form
        self.asked = asked
        self._paths = [file for path in paths for file in _files(path)]
        self._folder = folder
        self._limits = limits
        self._account = Account(limits)

    @property
    def spent(self) -> Spent:
        """The replies that were taken and the tokens they tell of."""
        return self._account.spent()

    def ask(self, questions: Sequence[Question], stop: threading.Event) -> Iterator[Sequence[Answer]]:
        """See `rubric_data.labelling.Engine`. Raises UserError at the first line that is no result."""
        open_keys = set(keys_of(questions))
        # what is open now, and as it was asked if a part of it was answered by others since
        calls = {
            custom_id(call): call for asked in (self.asked, questions) for call in cut(asked, self.form.most_criteria)
        }
        found: dict[str, tuple[Verdict, ...]] = {}
        models: Counter[str] = Counter()
        account = Account(self._limits)  # nothing counts until every file is known to be sound
        read = 0
        for path in self._paths:
            known = lines = 0
            for where, line in _results(path):
                lines += 1
                call = calls.get(line["custom_id"])
                if call is None:
                    self.ingested.unknown += 1
                    continue
                known += 1
                if open_keys.isdisjoint(call.keys):
                    self.ingested.before += 1
                    continue
                before = found.get(line["custom_id"])
                self.ingested.repeated += before is not None
                if before is None or is_unanswered(before[0]):
                    found[line["custom_id"]] = self._read(line, call, where, account)
                models[_model(line)] += 1
            if lines and not known:
                raise UserError(
                    f"{path}: none of its {lines} replies is to a question of this run; give the results of its own "
                    "requests, with the same data, model, mode and base_url"
                )
            read += lines
        if self._paths and not read:  # one of them may well be empty: a batch without errors
            raise UserError(
                f"{', '.join(map(str, self._paths))}: no results in it; fetch the batch's output file again"
            )
        models.pop("", None)
        self.ingested.models = dict(models.most_common())
        self.ingested.replies = len(found)
        self.ingested.failures = sum(is_unanswered(verdicts[0]) for verdicts in found.values())
        if found:
            remove_requests(self._folder)
            self._account = account
            yield [_only(calls[name], verdicts, open_keys) for name, verdicts in found.items()]

    def _read(self, line: Mapping[str, Any], call: Question, where: str, account: Account) -> tuple[Verdict, ...]:
        """The verdicts of one line, read as a live reply is, or masked with the kind of its failure."""
        failure = _failure(line)
        if failure is not None:  # not counted: the file may be given again
            return masked_verdicts(call.request.criteria, failure[0], f"{failure[1]} ({where})", judge=self.name)
        body = _body(line)
        account.admit(0)
        account.settle(tokens_of(body), 0)
        return self.form.read(body, call.request)


def custom_id(call: Question) -> str:
    """The name of a call in a batch, 64 hex digits: a hash of the ledger keys in their order."""
    return content_hash(list(call.keys))


def request_line(form: ChatForm, call: Question) -> str:
    """The line that asks ``call``, with its line break."""
    request = {"custom_id": custom_id(call), "method": "POST", "url": URL, "body": form.body(call.request)}
    return json.dumps(request, ensure_ascii=False) + "\n"


def write_requests(folder: Path, form: ChatForm, calls: Iterable[Question]) -> list[Path]:
    """Write what asks ``calls`` as requests.jsonl, requests-2.jsonl ... in ``folder``; the files.

    A call is a question of a size that can be asked (`rubric_data.labelling.cut`). A file holds at most
    `MOST_REQUESTS` lines and `MOST_BYTES` bytes. Earlier request files are replaced.
    """
    remove_requests(folder)
    lines = (request_line(form, call).encode() for call in calls)
    paths: list[Path] = []
    ahead = next(lines, None)
    while ahead is not None:
        paths.append(folder / f"requests{f'-{len(paths) + 1}' if paths else ''}.jsonl")
        with atomic_path(paths[-1]) as temporary, open(temporary, "wb") as file:
            count = size = 0
            while ahead is not None and (not count or (count < MOST_REQUESTS and size + len(ahead) <= MOST_BYTES)):
                file.write(ahead)
                count, size = count + 1, size + len(ahead)
                ahead = next(lines, None)
    return paths


def remove_requests(folder: Path) -> None:
    """Remove the request files of ``folder``: once replies are read they ask for what is answered."""
    for path in (folder / "requests.jsonl", *folder.glob("requests-[0-9]*.jsonl")):
        path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    """``path`` itself, or the .jsonl files of a folder."""
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise UserError(f"{path}: holds no .jsonl file; put the output and error files of the batch into it")
        return files
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give the result files of the batch, separated by commas, or their folder"
        )
    return [path]


def _results(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a result file with its place; raises UserError at the first that is none."""
    try:
        for where, line in read_lines(path, half_characters=True):  # a paid reply with one is no broken file
            if "body" in line or "method" in line:
                raise UserError(f"{where}: is a request, not a result; give the batch's output and error files")
            if not isinstance(line.get("custom_id"), str):
                raise UserError(f"{where}: field custom_id is missing; give the batch's output and error files")
            for name in ("response", "error"):
                if not isinstance(line.get(name), dict | None):
                    raise UserError(f"{where}: field {name}: must be an object or null; download the file again")
            yield where, without_surrogates(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --batch_results") from None


def _body(line: Mapping[str, Any]) -> dict[str, Any]:
    """What the server replied; empty if nothing."""
    body = (line.get("response") or {}).get("body")
    return body if isinstance(body, dict) else {}


def _model(line: Mapping[str, Any]) -> str:
    return str(_body(line).get("model") or "")


def _failure(line: Mapping[str, Any]) -> tuple[str, str] | None:
    """Kind and detail of a line that brought no reply (`rubric_data.judges.UNANSWERED`); None if it brought one."""
    status = (line.get("response") or {}).get("status_code")
    error = line.get("error") or _body(line).get("error") or {}
    if status == 200 and not line.get("error"):
        return None if _body(line) else ("server_error", "the reply holds no body")
    if isinstance(error, dict):
        error = error.get("error", error)  # some servers nest it once more
    code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
    detail = " ".join(f"{message or code or 'no reason is given'}".split())[:200]
    if isinstance(status, int) and status != 200:
        return status_kind(status), f"status {status}: {detail}"
    return "timeout" if code == "batch_expired" else "rejected", detail


def _only(call: Question, verdicts: Sequence[Verdict], keys: set[str]) -> Answer:
    """The part of an answer that is about ``keys``."""
    triples = zip(call.keys, call.request.criteria, verdicts, strict=True)
    wanted = [(key, criterion, verdict) for key, criterion, verdict in triples if key in keys]
    names, criteria, found = zip(*wanted, strict=True)
    return Question(replace(call.request, criteria=criteria), call.vote, names), found
