"""Configurations of the data, labelling and rubric commands. Never imports torch, so `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal

EMBEDDED = "smollm2"  # the name of the embedded language model


@dataclass(kw_only=True)
class EndpointConfig:
    """The options of every command that calls a model behind a server."""

    base_url: str | None = None  # server: e.g. http://127.0.0.1:8000/v1; unset means OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"  # server: name of the environment variable that holds the key
    timeout: float = 60.0  # server: seconds for one try
    attempts: int = 4  # server: tries per call before it counts as failed
    concurrency: int = 8  # server: calls in flight
    requests_per_minute: float | None = None  # server: rate limit
    tokens_per_minute: float | None = None  # server: rate limit
    max_calls: int | None = None  # server: budget of this command; what is left over is asked on --resume true
    max_total_tokens: int | None = None  # server: budget, tokens read and written; calls in flight may overshoot it
    max_cost: float | None = None  # server: budget, in the currency of the prices; calls in flight may overshoot it
    price_in: float | None = None  # server: of a million tokens read
    price_out: float | None = None  # server: of a million tokens written
    temperature: float | None = 0.0  # openai: null leaves it to the endpoint, for models that take no other
    max_tokens: int | None = None  # openai: longest reply; unset is the endpoint's own limit, 1,024 for some


@dataclass
class JudgeConfig(EndpointConfig):
    """Ask a judge every criterion of every response and write the verdicts beside them."""

    output: str  # run folder; judged.jsonl and report.json are written into it
    data: str = "builtin"  # 'builtin', or a .jsonl / .parquet file of responses with rubrics
    judge: Literal["verifier", "local", "openai", "systemone"] = "verifier"  # who answers; the last two are servers
    model: str = EMBEDDED  # local: model folder, hub id or 'smollm2'; server: model name at the endpoint
    mode: Literal["json", "schema", "logprobs"] = "json"  # openai: one reply; its form enforced; P(yes), a call each
    votes: int = 1  # openai: times every question is asked, at a temperature above 0; the mean is the verdict
    ledger: str | None = None  # SQLite ledger; unset means ledger.sqlite in the run folder
    use_verifiers: bool = True  # criteria with a verifier are answered by code, whoever judges the others
    max_masked: float = 0.2  # stop with advice if a larger share of the verdicts is masked
    limit: int | None = None  # judge only the first responses, for a trial
    resume: bool = False  # go on with an interrupted run; nothing in the ledger is asked again
    engine: Literal["threads", "ray", "batch"] = "threads"  # where judges work: here; Ray workers; nowhere, by files
    workers: int = 2  # ray: processes, which share the calls in flight, the rates and the budgets
    ray_address: str | None = None  # ray: an existing cluster, host:port or 'auto'; unset starts one on this machine
    batch_results: str | None = None  # batch: results to read, files separated by commas or a folder of .jsonl


@dataclass
class ConsistencyConfig:
    """Find the criteria, and the rubrics, that order responses against people's preferences."""

    data: str  # judged responses (.jsonl or .parquet), some of them with a preference
    output: str  # run folder; consistency.json is written into it, and judged.jsonl with --remove true
    significance: float = 0.05  # report a criterion that agrees on so few pairs with less than this chance
    min_agreement: float = 0.3  # report also one that agrees on less than this share of its pairs ...
    min_pairs: int = 10  # ... if it has so many, not counting ties
    remove: bool = False  # write the responses with rubrics that lack these criteria, but for a last positive one


@dataclass
class AblateConfig:
    """Leave every criterion out of its rubrics in turn, and see what becomes of rewards and rankings."""

    output: str  # run folder; ablation.json is written into it
    data: str = "builtin"  # judged responses (.jsonl or .parquet); 'builtin' judges itself by verifier


LEAST_ALPHA = 0.667  # below it Krippendorff (2004) draws no conclusion, not even a tentative one
LEAST_QUESTIONS = 10  # fewer say too little about a criterion to flag it


@dataclass
class MergeConfig:
    """Make soft targets of several judges' verdicts on the same responses, and report where the judges disagree."""

    data: list[str]  # judged responses (.jsonl or .parquet), one file a judge
    output: str  # run folder; judged.jsonl and report.json are written into it
    method: Literal["mean", "dawid-skene"] = "mean"  # every judge alike; or by error rates learnt from three or more
    min_alpha: float = LEAST_ALPHA  # flag criteria with a lower Krippendorff's alpha
    min_questions: int = LEAST_QUESTIONS  # flag no criterion on fewer questions


FormatName = Literal[
    "autorubric",
    "chasing-tail",
    "healthbench",
    "openrubrics",
    "preferences",
    "rar",
    "rubric-rm",
    "verifiers",
    "wildchecklists",
]


@dataclass
class DataImportConfig:
    """Make prompts with rubrics, and responses where there are some, of another project's data."""

    format: FormatName  # what the rows look like; rubric-rm is our own
    input: str  # a .jsonl, .json, .parquet (autorubric: .yaml) file, or a dataset of the Hugging Face hub, owner/name
    output: str  # folder; prompts.jsonl, responses.jsonl and report.json are written into it
    licence: str | None = None  # of the data; unset means what the format's publisher states, if anything
    subset: str | None = None  # hub: which configuration of the dataset
    hub_split: str | None = None  # hub: one split of the dataset; unset means all of them


@dataclass
class DataExportConfig:
    """Write prompts, rubrics and responses in another project's format."""

    format: FormatName  # what to write; openrubrics, wildchecklists and chasing-tail are for import only
    data: str  # 'builtin', or a .jsonl / .parquet file of prompts or responses
    output: str  # rows go to .jsonl, .json or .parquet; autorubric writes .json, our own format .jsonl or .parquet
    pairs: Literal["best-worst", "all"] = "best-worst"  # preferences: of each prompt, one pair or every ordered pair
    by: Literal["reward", "preference"] = "reward"  # preferences: what orders them, the judge's reward or people's
    overwrite: bool = False  # replace an existing output file


@dataclass
class DataSplitConfig:
    """Give prompts or responses to train, validation and test so that nothing leaks."""

    data: str  # 'builtin', or a .jsonl / .parquet file of prompts or responses
    output: str  # .jsonl or .parquet
    seed: int = 0  # another one gives other splits
    train: float = 0.7  # share of the prompts
    validation: float = 0.1  # share of the prompts
    test: float = 0.2  # share of the prompts
    shared_rubrics: bool = False  # let prompts of one rubric go to different splits
    held_out_generators: str | None = None  # names with commas between: their responses stay in test, others go
    replace: bool = False  # give new splits to records that carry some
    overwrite: bool = False  # replace an existing output file


@dataclass
class GenerateConfig(EndpointConfig):
    """Write an initial rubric for every prompt, from the prompt alone."""

    output: str  # run folder; prompts.jsonl, versions.jsonl and report.json are written into it
    model: str  # the proposer: its name at the endpoint
    data: str = "builtin"  # prompts (.jsonl); of a file of responses, with rubrics or without, each prompt counts once
    mode: Literal["json", "schema"] = "json"  # schema: the server enforces the reply's form
    checks: bool = False  # let the proposer answer criteria by programmatic checks (docs/data.md)
    max_failed: float = 0.5  # stop with advice if a larger share of the proposals cannot be had or read
    limit: int | None = None  # the first prompts only, for a trial
    resume: bool = False  # go on with an interrupted run; no reply is paid twice
    retry: bool = False  # on --resume true: ask again where a reply came that could not be read


@dataclass
class LintConfig:
    """Find criteria that grade badly: stacked, vague, overlapping, not self-contained, or true of everybody."""

    data: str  # prompts or responses with rubrics (.jsonl or .parquet), or 'builtin'
    verdicts: str | None = None  # judged responses: also report criteria that (nearly) all or none of them meet
    output: str | None = None  # .json file for all findings
    max_weight: float = 3.0  # weights run from 1 to this; pitfalls are their negatives
    overlap: float = 0.8  # two criteria at least so similar, in [0, 1], ask for the same


@dataclass
class DiffConfig:
    """Show what changed between two files of rubrics: criteria added, removed, reworded, reweighted."""

    before: str  # prompts or responses with rubrics (.jsonl or .parquet), or 'builtin'
    after: str  # the same prompts with other rubrics


@dataclass
class LedgerStatsConfig:
    """Show what a ledger holds, by judge and template."""

    ledger: str  # SQLite ledger, such as ledger.sqlite in the folder of a run; it is only read


@dataclass
class LedgerExportConfig:
    """Write the verdicts of a ledger, raw replies included, as JSONL or Parquet."""

    ledger: str  # SQLite ledger; it is only read
    output: str  # .jsonl or .parquet, one row a verdict
    judge: str | None = None  # this judge's verdicts only; its name as `ledger stats` shows it
    overwrite: bool = False  # replace an output file that is there already


@dataclass
class LedgerVerifyConfig:
    """Check that a ledger is sound, and which questions of a data file it answers."""

    ledger: str  # SQLite ledger; it is only read
    data: str | None = None  # 'builtin', or a .jsonl / .parquet file of responses with rubrics


@dataclass
class AttachConfig:
    """Give responses the rubrics of a file of prompts."""

    data: str  # responses (.jsonl or .parquet); those with a rubric get the other one in its place
    rubrics: str  # prompts with rubrics, such as the prompts.jsonl of `rubric generate`; matched by prompt_id
    output: str  # .jsonl or .parquet, for `judge` and all others that read responses with rubrics
    overwrite: bool = False  # replace an existing output file


@dataclass
class DataLevelsConfig:
    """Give levels to criteria that were judged on a scale which their file does not name."""

    data: str  # .jsonl or .parquet of judged responses
    output: str  # .jsonl or .parquet
    labels: list[str] | None = None  # of the levels, worst first; unset: read off the verdicts, called by their values
    overwrite: bool = False  # replace an existing output file


@dataclass
class InteractionsConfig:
    """Fit what pairs of criteria add to, or take from, the weighted mean in the judge's overall verdict."""

    data: str  # judged responses (.jsonl or .parquet) whose rubrics have a criterion tagged 'overall'
    output: str  # .json file, for `ppo --aggregation.interactions`
    by: Literal["text", "tag"] = "text"  # what makes criteria of different rubrics the same
    ridge: float = 1.0  # penalty on squared weights, in responses
    bound: float = 0.2  # weights are clipped to plus or minus this
    min_responses: int = 20  # of a pair; rarer ones get no weight
    overwrite: bool = False  # replace an existing output file
