"""The commands `data import`, `data export` and `data split`. What a row means is its format's, in a module each."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rubric_data.config import DataExportConfig, DataImportConfig, DataSplitConfig
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, refuse_existing, start_run, write_json, write_text
from rubric_data.formats import FORMATS, OWN
from rubric_data.formats.base import Answer, Example, Group, Placed, SkipRow, Written, free_name, read_row
from rubric_data.formats.guess import first_rows, guess_format
from rubric_data.formats.source import is_dataset, read_rows
from rubric_data.io import BUILTIN, load_prompts_and_responses, prompts_of, write_judged, write_prompts
from rubric_data.programmatic import load_verdicts
from rubric_data.records import JudgedResponse, PromptRecord, content_hash
from rubric_data.split import SPLITS, Prompted, assign_splits, names_of, without_generators

_ROWS = (".jsonl", ".json", ".parquet")


@dataclass
class Imported:
    """What an import has so far: prompts by id, responses by id, and how much was left out for which reason."""

    prompts: dict[str, PromptRecord] = field(default_factory=dict)
    responses: dict[str, JudgedResponse] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    first_left_out: dict[str, str] = field(default_factory=dict)  # the first place of each reason
    places: dict[str, str] = field(default_factory=dict)  # of each prompt
    repeated: int = 0  # examples whose prompt and rubric were there before
    told: set[tuple[str, Answer]] = field(default_factory=set)  # by prompt, what was taken in as a response

    def leave_out(self, reason: str, where: str) -> None:
        """Count one thing that is left out."""
        self.left_out[reason] += 1
        self.first_left_out.setdefault(reason, where)

    def add(self, example: Example, where: str, *, source: str, licence: str) -> None:
        """Take in one example. A prompt that was there before gains its responses, unless preferences keep it apart.

        Raises UserError if the source's own id stands for two prompts or rubrics.
        """
        for reason in example.left_out:
            self.leave_out(reason, where)
        prompt = PromptRecord(
            prompt_id=example.prompt_id or _content_id(example),
            prompt=example.prompt,
            rubric=example.rubric,
            source=source,
            licence=licence,
        )
        before = self.prompts.get(prompt.prompt_id)
        if before is not None and before != prompt:
            raise UserError(
                f"{where}: the prompt id {prompt.prompt_id!r} stood for another prompt or rubric before, at "
                f"{self.places[prompt.prompt_id]}; make it unique"
            )
        if before is not None and any(answer.preference is not None for answer in example.answers):
            # one row's preferences are not comparable with another's
            prompt = prompt.model_copy(update={"prompt_id": free_name(prompt.prompt_id, self.prompts, "-")})
        elif before is not None:
            self.repeated += 1
        self.prompts[prompt.prompt_id] = prompt
        self.places.setdefault(prompt.prompt_id, where)
        self._add_responses(prompt, example, where)

    def _add_responses(self, prompt: PromptRecord, example: Example, where: str) -> None:
        for answer in example.answers:
            if prompt.rubric is None:
                self.leave_out("response without a rubric", where)
            elif not answer.text.strip():
                self.leave_out("empty response", where)
            elif (prompt.prompt_id, answer) in self.told:
                self.leave_out("repeated response", where)
            else:
                self.told.add((prompt.prompt_id, answer))
                response_id = free_name(f"{prompt.prompt_id}-{answer.name}", self.responses, "-")
                self.responses[response_id] = JudgedResponse(
                    prompt_id=prompt.prompt_id,
                    prompt=prompt.prompt,
                    response_id=response_id,
                    response=answer.text,
                    rubric=prompt.rubric,
                    generator=answer.generator,
                    verdicts=answer.verdicts,
                    source=prompt.source,
                    licence=prompt.licence,
                    preference=answer.preference,
                )


def _content_id(example: Example) -> str:
    return content_hash([example.prompt, example.rubric.id if example.rubric else ""])[:16]


# --- import --------------------------------------------------------------------------------------------------


def run_import(config: DataImportConfig) -> dict[str, Any]:
    """Read ``config.input`` as ``config.format``; write prompts.jsonl, responses.jsonl and report.json.

    There is no responses.jsonl where there are no responses. Returns the report. Raises UserError on bad input,
    before anything is written.
    """
    if not config.input.strip():
        raise UserError("input: is empty; give a file, or a dataset of the hub as owner/name")
    if config.format == OWN:
        imported, details = _import_own(config)
    else:
        imported, details = _import_foreign(config)
    prompts, responses = list(imported.prompts.values()), list(imported.responses.values())
    report = {
        "format": config.format,
        "input": config.input,
        "licences": _counted(prompt.licence or "unknown" for prompt in prompts),
        **details,
        **_counts(prompts, responses),
        "left_out": dict(sorted(imported.left_out.items())),
        "first_left_out": dict(sorted(imported.first_left_out.items())),
    }
    folder = start_run(config.output, asdict(config))
    write_prompts(folder / "prompts.jsonl", prompts)
    if responses:
        write_judged(folder / "responses.jsonl", responses)
    write_json(folder / "report.json", report)
    return report


def _import_own(config: DataImportConfig) -> tuple[Imported, dict[str, Any]]:
    if config.input != BUILTIN and is_dataset(config.input):
        raise UserError(f"{config.input}: format {OWN} is read from a .jsonl or .parquet file; give one")
    try:
        prompts, responses = load_prompts_and_responses(config.input)
    except UserError as error:
        raise UserError(f"{error}{_hint(config)}") from None
    if config.licence is not None:
        change = {"licence": config.licence}
        prompts = [prompt.model_copy(update=change) for prompt in prompts]
        responses = [response.model_copy(update=change) for response in responses]
    imported = Imported(
        {prompt.prompt_id: prompt for prompt in prompts}, {response.response_id: response for response in responses}
    )
    return imported, {}


def _import_foreign(config: DataImportConfig) -> tuple[Imported, dict[str, Any]]:
    form, imported = FORMATS[config.format], Imported()
    source = config.input if is_dataset(config.input) else form.source or config.input
    licence = form.licence if config.licence is None else config.licence
    rows, ignored, first = 0, set[str](), None
    found = read_rows(config.input, unfold=form.unfold, subset=config.subset, hub_split=config.hub_split)
    try:
        for where, row in _watched(found):
            rows += 1
            first = row if first is None else first
            ignored |= row.keys() - form.row.model_fields.keys()
            try:
                imported.add(read_row(form, row, where), where, source=source, licence=licence)
            except SkipRow as reason:
                imported.leave_out(str(reason), where)
    except UserError as error:
        raise UserError(f"{error}{_hint(config, first)}") from None
    if not rows:
        raise UserError(f"{config.input}: holds no rows; give a file with at least one")
    _check_prompts(config, imported, first)
    details = {
        "source": source,
        "rows": rows,
        "repeated_prompts": imported.repeated,
        "ignored_columns": sorted(ignored),
    }
    return imported, details


def _check_prompts(config: DataImportConfig, imported: Imported, first: dict[str, Any] | None) -> None:
    """Raise UserError if there is no prompt, or no rubric where another format would have some."""
    hint = _hint(config, first) if not any(prompt.rubric for prompt in imported.prompts.values()) else ""
    if imported.prompts and not hint:
        return
    what = "rubric" if imported.prompts else "prompt"
    why = ", ".join(f"{reason} ({count})" for reason, count in imported.left_out.items())
    raise UserError(f"{config.input}: holds no {what} in format {config.format}: {why}; check --format{hint}")


def _hint(config: DataImportConfig, first: dict[str, Any] | None = None) -> str:
    """The end of a message: which other format the rows look like, if any. ``first``: one of them, if any was read."""
    rows = [first] if first is not None else first_rows(config.input)
    guess = next(filter(None, map(guess_format, rows)), None)
    return f", or give --format {guess}, which it looks like" if guess not in (None, config.format) else ""


def _watched(rows: Iterable[Placed]) -> Iterator[Placed]:
    """``rows`` with their count on stderr, if that is a terminal: how many there will be is not known."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(rows)


def _counts(prompts: Sequence[PromptRecord], responses: Sequence[JudgedResponse]) -> dict[str, int]:
    rubrics = [prompt.rubric for prompt in prompts if prompt.rubric]
    return {
        "prompts": len(prompts),
        "prompts_without_rubric": len(prompts) - len(rubrics),
        "criteria": sum(len(rubric.criteria) for rubric in rubrics),
        "responses": len(responses),
        "verdicts": sum(len(response.verdicts) for response in responses),
    }


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


# --- export --------------------------------------------------------------------------------------------------


def run_export(config: DataExportConfig) -> dict[str, Any]:
    """Write ``config.data`` to ``config.output`` in ``config.format``; returns counts, what was left out included.

    Raises UserError on bad input, on a format that is for import only, if nothing fits it, or if the output exists.
    """
    output = Path(config.output)
    form = FORMATS.get(config.format)
    if form is not None and form.write is None:
        exporting = ", ".join([name for name, other in sorted(FORMATS.items()) if other.write] + [OWN])
        raise UserError(f"format: {config.format} is for import only; export to one of {exporting}")
    refuse_existing(output, config.overwrite)
    if config.format == "preferences" and config.by == "reward":
        responses = load_verdicts(config.data)
        prompts = prompts_of(config.data, responses)
    else:
        prompts, responses = load_prompts_and_responses(config.data)
    report: dict[str, Any] = {
        "format": config.format,
        "licences": _counted(prompt.licence or "unknown" for prompt in prompts),
        **_counts(prompts, responses),
    }
    if form is None or form.write is None:
        _write_own(output, prompts, responses)
        return report
    options = {"pairs": config.pairs, "by": config.by} if config.format == "preferences" else {}
    written = form.write(_groups(prompts, responses), **options)
    _write_content(output, written, config.data)
    rows = written.content if isinstance(written.content, list) else written.content["items"]
    return {**report, "rows": len(rows), "left_out": dict(sorted(written.left_out.items()))}


def _groups(prompts: Sequence[PromptRecord], responses: Iterable[JudgedResponse]) -> list[Group]:
    by_prompt: dict[str, list[JudgedResponse]] = {prompt.prompt_id: [] for prompt in prompts}
    for response in responses:
        by_prompt[response.prompt_id].append(response)
    return [Group(prompt, tuple(by_prompt[prompt.prompt_id])) for prompt in prompts]


def _write_content(output: Path, written: Written, data: str) -> None:
    content = written.content
    if isinstance(content, dict):
        if output.suffix != ".json":
            raise UserError(f"{output}: this format is one document; name it .json")
        empty = not content["items"]
    else:
        if output.suffix not in _ROWS:
            raise UserError(f"{output}: unknown file type {output.suffix!r}; use one of {', '.join(_ROWS)}")
        empty = not content
    if empty:
        why = ", ".join(f"{reason} ({count})" for reason, count in sorted(written.left_out.items()))
        raise UserError(f"{data}: nothing of it fits the format: {why}; mend that, or choose another --format")
    if output.suffix == ".json":
        write_json(output, content)
    elif output.suffix == ".jsonl":
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    else:
        with atomic_path(output) as path:
            pq.write_table(pa.Table.from_pylist(content), path, compression="zstd")


# --- split ---------------------------------------------------------------------------------------------------


def run_split(config: DataSplitConfig) -> dict[str, Any]:
    """Write ``config.data`` to ``config.output`` with splits; returns how many prompts and responses each has.

    Raises UserError on bad input, if records carry splits and ``config.replace`` is false, if there are too few
    groups of prompts, if a generator to hold out is unknown or all there is to train on, or if the output exists.
    """
    output = Path(config.output)
    refuse_existing(output, config.overwrite)
    prompts, responses = load_prompts_and_responses(config.data)
    held_out = names_of(config.held_out_generators)
    if responses:
        responses = without_generators(_with_splits(responses, config), held_out, name=config.data)
    elif held_out:
        raise UserError(f"held_out_generators: {config.data} has prompts alone; leave it out, or give responses")
    else:
        prompts = _with_splits(prompts, config)
    _write_own(output, prompts, responses)
    split_of = {record.prompt_id: record.split for record in responses or prompts}
    report = {"prompts": _by_split(split_of.values())}
    return report | ({"responses": _by_split(record.split for record in responses)} if responses else {})


def _with_splits(records: list[Prompted], config: DataSplitConfig) -> list[Prompted]:
    if config.replace:
        records = [record.model_copy(update={"split": None}) for record in records]
    elif carried := sum(record.split is not None for record in records):
        raise UserError(
            f"{config.data}: {carried} of {len(records)} records carry a split already; add --replace true for new ones"
        )
    fractions = (config.train, config.validation, config.test)
    shared = config.shared_rubrics
    return assign_splits(records, fractions=fractions, seed=config.seed, shared_rubrics=shared, name=config.data)


def _by_split(splits: Iterable[str | None]) -> dict[str, int]:
    counts = Counter(splits)
    return {split: counts[split] for split in SPLITS}


# --- our own files -------------------------------------------------------------------------------------------


def _write_own(output: Path, prompts: Sequence[PromptRecord], responses: Sequence[JudgedResponse]) -> None:
    if responses:
        write_judged(output, responses)
    elif output.suffix == ".jsonl":
        write_prompts(output, prompts)
    else:
        raise UserError(f"{output}: prompts without responses are written as .jsonl; rename it")
