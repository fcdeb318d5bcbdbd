"""Make the embedded data: `python -m rm.build_builtin`. Samples with the embedded model; the rest is the recipe's.

    python -m rm.build_builtin            sample, then write prompts.jsonl and responses.jsonl
    python -m rm.build_builtin --reuse    keep the stored samples and make the rest anew
    python -m rm.build_builtin --check    make the rest anew and compare; exit 1 if a file differs

Sampling is seeded; the same torch on the same sort of CPU gives the same files byte for byte.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import rubric_data.builtin
from rm.backbone import EMBEDDED, load_causal_lm, load_tokenizer, native_dtype
from rm.sampling import sample
from rubric_data.builtin.recipe import Built, build, draft_prompts
from rubric_data.errors import UserError
from rubric_data.files import write_text

FOLDER = Path(rubric_data.builtin.__file__).parent
GENERATOR = "smollm2-135m-instruct"
# (temperature, new tokens, responses per prompt)
PLAN = ((0.4, 48, 1), (0.4, 80, 1), (0.7, 48, 1), (0.7, 80, 1), (1.0, 48, 2))

Samples = dict[str, list[tuple[str, str]]]  # prompt id -> (generator, response)


def sample_responses() -> Samples:
    """The plan's responses to every prompt of the recipe, from the embedded model."""
    tokenizer = load_tokenizer(EMBEDDED)
    model = load_causal_lm(EMBEDDED, dtype=native_dtype())
    drafts = draft_prompts()
    prompts = [draft.prompt for draft in drafts]
    found: Samples = {draft.prompt_id: [] for draft in drafts}
    for seed, (temperature, tokens, count) in enumerate(PLAN):
        completions = sample(
            model,
            tokenizer,
            prompts,
            samples=count,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed,
            batch_size=160,
            progress=True,
        )
        for draft, row in zip(drafts, completions, strict=True):
            found[draft.prompt_id] += [(f"{GENERATOR}@T{temperature}", one.text) for one in row]
    return found


def stored_samples(folder: Path = FOLDER) -> Samples:
    """The sampled responses in ``folder``'s data files. Raises UserError if they answer other prompts."""
    try:
        prompts = [json.loads(line) for line in _lines(folder / "prompts.jsonl")]
        responses = [json.loads(line) for line in _lines(folder / "responses.jsonl")]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not there; run without --reuse and --check to sample first") from None
    drafts = {draft.prompt_id: draft.prompt for draft in draft_prompts()}
    if {record["prompt_id"]: record["prompt"] for record in prompts} != drafts:
        raise UserError(f"{folder}: its prompts are not the recipe's; run without --reuse and --check to sample anew")
    found: Samples = {prompt_id: [] for prompt_id in drafts}
    for record in responses:
        if record["generator"].startswith(GENERATOR):
            found[record["prompt_id"]].append((record["generator"], record["response"]))
    return found


def differing(built: Built, folder: Path = FOLDER) -> list[str]:
    """Names of the data files in ``folder`` that are not what was built."""
    return [name for name, text in _files(built).items() if (folder / name).read_text(encoding="utf-8") != text]


def _files(built: Built) -> dict[str, str]:
    return {
        "prompts.jsonl": "".join(f"{line}\n" for line in built.prompts),
        "responses.jsonl": "".join(f"{line}\n" for line in built.responses),
    }


def _lines(path: Path) -> list[str]:
    # split("\n"), as a response may hold other characters that splitlines() breaks at
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m rm.build_builtin", description="Make the embedded data.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--reuse", action="store_true", help="keep the stored samples and make the rest anew")
    mode.add_argument("--check", action="store_true", help="make all but the samples anew and compare with the files")
    options = parser.parse_args(arguments)
    try:
        samples = stored_samples() if options.reuse or options.check else sample_responses()
        built = build(samples)
        if options.check:
            changed = differing(built)
            print(
                f"differs from the recipe: {', '.join(changed)}" if changed else "the files are what the recipe gives"
            )
            return 1 if changed else 0
        for name, text in _files(built).items():
            write_text(FOLDER / name, text)
        print(f"{len(built.prompts)} prompts and {len(built.responses)} responses written to {FOLDER}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
