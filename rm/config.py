"""Configurations of the reward model's stages. Never imports torch, so `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from rubric_data.config import EndpointConfig, JudgeConfig

Backend = Literal["auto", "flash_attention_2", "torch_varlen", "cpu_tree", "cpu_flash", "sdpa"]
Dtype = Literal["auto", "float32", "bfloat16"]
Selection = Literal["loss", "accuracy", "auroc", "concordance", "brier", "pair_accuracy"]
RewardKind = Literal["proxy", "calibrated", "lower_bound"]


@dataclass
class TrainConfig:
    """Distil verdicts into a rubric-conditioned reward model."""

    output: str  # run folder; the model is written into its model/ folder
    data: str = "builtin"  # judged responses (.jsonl or .parquet) with splits; 'builtin' judges itself by verifier
    model: str = "smollm2"  # backbone: model folder, hub id, or 'smollm2' (embedded)
    attention: Backend = "auto"  # kernel; auto takes the fastest the machine has
    dtype: Dtype = "auto"  # of the backbone; auto is bfloat16 where the machine computes it natively
    max_length: int = 2048  # tokens of prompt + response + criterion on one path; longer responses are cut, and counted
    lora_rank: int = 16  # 0 trains every weight
    lora_layers: int | None = None  # adapters in so many last layers only: cheaper backward; unset means all
    lora_alpha: int = 32  # scale of the adapter: alpha / rank
    learning_rate: float = 5e-4  # of the backbone, at its peak
    head_learning_rate: float = 5e-4  # of the verdict head
    level_learning_rate: float = 1e-2  # of the spacing of levels, eight numbers, where criteria are graded
    weight_decay: float = 0.0  # of AdamW
    warmup_ratio: float = 0.05  # share of the steps over which the learning rate rises
    epochs: float = 1.0  # passes over the training split
    max_steps: int = -1  # optimiser steps; overrides epochs when positive
    tokens_per_batch: int = 4096  # packed tokens in one forward pass
    gradient_accumulation: int = 1  # forward passes per optimiser step
    responses_per_tree: int = 8  # responses of one prompt that share a tree
    use_verifiers: bool = True  # criteria with a verifier get their verdicts from code, whatever the file says
    rubric_blind: bool = False  # never show a criterion: a baseline that knows what prompt and response tell alone
    drills: int = 0  # extra checkable criteria asked of each training response, half met: only reading answers them
    pairwise_weight: float = 0.2  # of a tree's pairs, all its verdicts being 1; short trainings want 1
    tail_weight: float = 2.0  # how much more a pair of top-quarter responses counts
    gradient_checkpointing: bool = False  # less memory for more time
    eval_steps: int = 20  # optimiser steps between validations and checkpoints
    eval_trees: int = 40  # validation trees read each time
    patience: int = 5  # validations without improvement before stopping
    select_by: Selection = "loss"  # validation number that picks the best checkpoint; `snr` tells which to trust
    keep_checkpoints: int = 2  # on disk, the best among them; 0 keeps all. `snr` wants a dozen
    logging_steps: int = 1  # optimiser steps between two logged lines
    report_to: str = "none"  # tensorboard, wandb, trackio: anything transformers knows
    seed: int = 0  # of the order of trees and of the adapter's start
    resume: bool = False  # go on from the last checkpoint of an interrupted run


@dataclass
class CalibrateConfig:
    """Put the model's verdicts and rewards on the judge's scale, by the validation split and all its criteria."""

    model: str  # model folder of a training run; calibration.json, .png and posterior.safetensors are written into it
    data: str = "builtin"  # judged responses (.jsonl or .parquet) with splits
    planned_kl: float = 2.0  # nats that a policy will move from its start: where the map of rewards must be right
    coverage: float = 0.9  # share of verdicts and of rewards of the judge that the intervals shall hold
    tokens_per_batch: int = 16_384  # packed tokens in one forward pass
    overwrite: bool = False  # replace an earlier calibration


@dataclass
class AuditConfig:
    """Compare the reward model with its judge on held-out prompts and all their criteria, overall and in the tail."""

    model: str  # model folder
    output: str  # run folder; audit.json, audit.html and predictions.jsonl are written into it
    data: str = "builtin"  # judged responses (.jsonl or .parquet) with splits
    split: Literal["validation", "test"] = "test"  # whose prompts are read
    tail: float = 0.25  # top share of each prompt's responses, by the judge
    bootstrap: int = 1000  # resamples of prompts for the intervals
    zero_shot: bool = True  # also run the untrained backbone, the costliest baseline
    others: list[str] | None = None  # [NAME=PATH,...] beside it: models, files of scores; the first face to face
    artefacts: bool = False  # also score swapped rubrics and edited responses: about six times the model's own work
    ledger: str | None = None  # with the judge's votes, for its own agreement; unset: ledger.sqlite beside the data
    tokens_per_batch: int = 16_384  # packed tokens in one forward pass
    seed: int = 0  # of the resamples


@dataclass
class ScoreConfig:
    """Score responses against their rubrics: text in, verdicts and rewards out."""

    model: str  # model folder
    data: str  # .jsonl or .parquet of responses with rubrics
    output: str  # .jsonl or .parquet file to write
    reward: RewardKind = "proxy"  # mean of the verdicts; the judge's expected reward; a bound it is rarely below
    use_verifiers: bool = True  # criteria with a verifier are answered by code; false asks the model all of them
    tokens_per_batch: int = 16_384  # packed tokens in one forward pass
    overwrite: bool = False  # replace an output file that is there already
    engine: Literal["local", "ray"] = "local"  # where the model works: in this process; in Ray workers
    workers: int = 2  # ray: processes, each with a model
    ray_address: str | None = None  # ray: an existing cluster, host:port or 'auto'; unset starts one on this machine


@dataclass
class FilterConfig:
    """Keep the prompts worth training a policy on: of middling reward, with responses that differ."""

    output: str  # run folder; kept.jsonl, prompts.jsonl, histogram.png and report.json are written into it
    data: str = "builtin"  # .jsonl or .parquet of the current policy's responses; 'builtin' judges itself by verifier
    reward_model: str | None = None  # model folder whose rewards decide; unset: those of the verdicts in the file
    low: float = 0.25  # quantile of the prompts' mean rewards; a prompt below is dropped as too hard
    high: float = 0.75  # the same; a prompt above is dropped as too easy
    min_spread: float = 0.05  # least standard deviation of a prompt's rewards, which lie in [0, 1]
    min_responses: int = 2  # least number of a prompt's responses with a reward
    use_verifiers: bool = True  # with reward_model: code answers criteria with a verifier; false: only vetoes with one
    tokens_per_batch: int = 16_384  # packed tokens in one forward pass of the reward model


@dataclass
class RefineConfig(EndpointConfig):
    """Refine rubrics, round after round, by what tells a prompt's two best responses apart."""

    output: str  # run folder; prompts.jsonl, responses.jsonl, versions.jsonl, report.json and rounds.png are written
    model: str  # the proposer: its name at the endpoint
    data: str = "builtin"  # responses (.jsonl or .parquet): the pool; they may lack rubrics where --rubrics has them
    rubrics: str | None = None  # prompts with the rubrics to start from (.jsonl); unset means those of the responses
    rounds: int = 3  # of refinement; more of them may be asked for on --resume true
    pool: Literal["good", "great", "diverse"] = "diverse"  # all but the top; the top; the top, by different generators
    top: float = 0.25  # share of a prompt's responses, by their first reward, that is the top
    generators: str | None = None  # names with commas between: their responses are the pool, whatever their reward
    tie: float = 1e-6  # rewards no further apart are tied; for soft judges and the reward model about 0.01
    ranker: Literal["judge", "model"] = "judge"  # who scores: the judge below, or a reward model
    reward_model: str | None = None  # model folder of a training run, for --ranker model
    tokens_per_batch: int = 16_384  # reward model: packed tokens in one forward pass
    mode: Literal["json", "schema"] = "json"  # schema: the server enforces the reply's form
    checks: bool = False  # let the proposer answer criteria by programmatic checks (docs/data.md)
    max_failed: float = 0.5  # stop with advice if a larger share of a round's proposals cannot be had or read
    limit: int | None = None  # the first prompts only, for a trial
    seed: int = 0  # of the order of tied responses
    resume: bool = False  # go on with an interrupted run; no reply and no verdict is paid twice
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(output="judge"))


# the judge scores what refinement gives it, here, once
REFINE_SETS = (
    "judge.output",
    "judge.data",
    "judge.limit",
    "judge.resume",
    "judge.votes",
    "judge.engine",
    "judge.workers",
    "judge.ray_address",
    "judge.batch_results",
)


@dataclass
class SnrConfig:
    """Which metrics tell training recipes apart, and how much of each is noise between checkpoints."""

    output: str  # run folder; snr.json, snr.html and the scores of every checkpoint are written into it
    runs: list[str]  # a run of each recipe: folders of `train`, or of score files named by step (step-100.parquet)
    data: str = "builtin"  # judged responses (.jsonl or .parquet) with splits
    split: Literal["validation", "test"] = "validation"  # whose prompts are read
    small: list[str] | None = None  # a cheaper run of each recipe, in the same order: does it decide as `runs` do?
    ladder: list[str] | None = None  # runs of one recipe, ever more verdicts or weights; the largest is foretold
    last: int = 6  # checkpoints at the end of a run that its noise is taken from
    early: int = 6  # checkpoints before them, evenly spread: how early do runs order recipes as in the end?
    average: int = 2  # neighbouring checkpoints in a mean of scores, or of weights
    average_weights: bool = True  # also score means of weights: last / average passes more for each run
    tail: float = 0.25  # top share of each prompt's responses, by the judge
    min_prompts: int = 10  # fewest prompts of a slice or of a group of criteria that is looked at
    bootstrap: int = 1000  # resamples of prompts for the intervals
    tokens_per_batch: int = 8192  # packed tokens in one forward pass
    seed: int = 0  # of the resamples, and of the halves that criteria are chosen and judged on
    resume: bool = False  # keep the scores that an earlier call with this output wrote


@dataclass(kw_only=True)
class FurtherConfig:
    """What `tail` and `redistil` have in common: a finished model is trained on, beside what is replayed."""

    replay: float = 0.5  # share of every batch that ordinary training trees fill, against forgetting
    tolerance: float = 0.005  # for Brier to rise, concordance and pair accuracy to fall; beyond, the old weights stay
    attention: Backend = "auto"  # kernel; auto takes the fastest the machine has
    dtype: Dtype = "auto"  # of the backbone; auto is bfloat16 where the machine computes it natively
    learning_rate: float = 1e-4  # of the backbone, at its peak
    head_learning_rate: float = 1e-4  # of the verdict head
    level_learning_rate: float = 2e-3  # of the spacing of levels, eight numbers, where criteria are graded
    weight_decay: float = 0.0  # of AdamW
    warmup_ratio: float = 0.05  # share of the steps over which the learning rate rises
    epochs: float = 2.0  # passes over what is new: the mined or the newly judged responses
    max_steps: int = -1  # optimiser steps; overrides epochs when positive
    tokens_per_batch: int = 4096  # packed tokens in one forward pass
    gradient_accumulation: int = 1  # forward passes per optimiser step
    responses_per_tree: int = 8  # responses of one prompt that share a tree; pairs of two trees are not trained on
    use_verifiers: bool = True  # criteria with a verifier get their verdicts from code, whatever the file says
    drills: int = 0  # extra checkable criteria asked of the responses in ordinary trees, as in `train`
    gradient_checkpointing: bool = False  # less memory for more time
    eval_steps: int = 20  # optimiser steps between validations and checkpoints
    eval_prompts: int = 40  # held-out prompts read each time; before and after, all of them are
    patience: int = 5  # validations without improvement before stopping
    keep_checkpoints: int = 2  # on disk, the best among them; 0 keeps all
    logging_steps: int = 1  # optimiser steps between two logged lines
    report_to: str = "none"  # tensorboard, wandb, trackio: anything transformers knows
    bootstrap: int = 1000  # resamples of prompts for the intervals
    seed: int = 0  # of the order of trees, of what is held out and of the resamples
    resume: bool = False  # go on from the last checkpoint of an interrupted run


@dataclass
class TailConfig(FurtherConfig):
    """Train a reward model on, on pairs of excellent responses, and keep that only where nothing else gets worse."""

    model: str  # model folder of a training run, to start from
    output: str  # run folder; the model that is kept is written into its model/ folder
    data: str = "builtin"  # judged responses (.jsonl or .parquet) with splits, as the model was trained on
    tail: float = 0.25  # top share of each prompt's responses, by the judge, that pairs are mined from
    min_margin: float = 0.0  # least difference of the judge's rewards in a pair; for a noisy judge above its noise
    pairwise_weight: float = 1.0  # of a tree's pairs, all its verdicts being 1


@dataclass
class RedistilConfig(FurtherConfig):
    """Train a reward model on, on new verdicts beside the old, and keep that only where it helps and loses nothing."""

    model: str  # model folder of a training run, to start from
    output: str  # run folder; the model that is kept is written into its model/ folder
    new: str  # newly judged responses (.jsonl or .parquet), such as judged.jsonl of an RL run
    data: str = "builtin"  # the old ones, with splits, as the model was trained on: replayed, and to show what is lost
    held_out: float = 0.2  # share of the new training prompts that is measured on, if none of the new is for validation
    tail: float = 0.25  # top share of each prompt's responses, by the judge, whose pairs count more and are reported
    pairwise_weight: float = 0.2  # of a tree's pairs, all its verdicts being 1
    tail_weight: float = 2.0  # how much more a pair of top-quarter responses counts


@dataclass
class RouteConfig:
    """What the judge's answer to a part of the criteria would buy: cost against agreement, by which are asked."""

    model: str  # model folder
    output: str  # run folder; route.json and route.png are written into it
    data: str = "builtin"  # judged responses (.jsonl or .parquet) with splits
    split: Literal["validation", "test"] = "test"  # whose prompts are read
    tail: float = 0.25  # top share of each prompt's responses, by the judge
    draws: int = 20  # random choices that are averaged, to compare with
    bootstrap: int = 1000  # resamples of prompts for the intervals
    tokens_per_batch: int = 16_384  # packed tokens in one forward pass
    seed: int = 0  # of the random choices and of the resamples


@dataclass
class DefendConfig(EndpointConfig):
    """Find out what a policy exploits, and add vetoes against it to the rubrics."""

    output: str  # run folder; prompts.jsonl, judged.jsonl, versions.jsonl and report.json are written into it
    runs: list[str] | None = None  # RL run folders with judged.jsonl and scores.jsonl; or give data
    data: str | None = None  # judged responses (.jsonl or .parquet), with scores or a reward model
    scores: str | None = None  # what the reward model says of data: a file of `score`
    reward_model: str | None = None  # model folder: scores data, and answers vetoes with --answers model
    use_verifiers: bool = True  # with reward_model: criteria with a verifier are answered by code
    prompts: str | None = None  # whose rubrics get the vetoes: the next run's data; unset: those of the responses
    top: float = 0.25  # share of a prompt's responses that is high, by proxy or by gold
    excess: float = 1.0  # standard deviations by which proxy less gold lies above its mean where a response exploits
    min_exploits: int = 10  # fewest exploiting responses in either half of the prompts; with fewer nothing is proposed
    fdr: float = 0.05  # false discoveries among the traits that are called
    min_recall: float = 0.2  # least share of the exploiting responses that a veto must catch
    max_false_alarm: float = 0.05  # largest share of the good responses that it may hit, and all of them together
    model: str | None = None  # a proposer of further vetoes: its name at the endpoint; unset: none is asked
    mode: Literal["json", "schema"] = "json"  # proposer: schema has the server enforce the reply's form
    checks: bool = False  # proposer: let it answer vetoes by programmatic checks (docs/data.md)
    answers: Literal["judge", "model"] = "judge"  # of proposed vetoes without a check: the judge, or the reward model
    bootstrap: int = 1000  # resamples of prompts for the intervals
    tokens_per_batch: int = 16_384  # reward model: packed tokens in one forward pass
    seed: int = 0  # of the halves of the prompts, and of the resamples
    resume: bool = False  # go on with an interrupted run; no reply and no verdict is paid twice
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(output="judge"))


# the judge answers vetoes, here, once
DEFEND_SETS = REFINE_SETS
