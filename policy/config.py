"""Configurations of the RL stage and of the whole demo. Never imports torch, so `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Any, Literal

from rm.config import AuditConfig, CalibrateConfig, RewardKind, TrainConfig
from rubric_data.config import EMBEDDED, JudgeConfig


@dataclass
class AggregationConfig:
    """From P(met) of each criterion to the reward that is paid; by default their weighted mean. See docs/rewards.md."""

    weights: Literal["rubric", "categories"] = "rubric"  # their own, or those of RaR by tag: essential, important, ...
    implicit: bool = False  # pay the criteria tagged 'overall' alone
    saturation: float = 0.0  # rate of diminishing returns within each criterion; 0 pays in proportion
    headroom: float = 0.0  # criteria weigh (1 - s)^headroom, s what the policy has reached of them; 0 leaves weights
    interactions: str | None = None  # file of `rubric interactions`: what pairs of criteria add or take
    veto: Literal["soft", "hard", "off"] = "soft"  # multiply by P(met) of veto criteria; pay 0 below the threshold
    veto_threshold: float = 0.5  # of hard vetoes
    top_share: float | None = None  # of the scale that rewards above top_from are stretched to; unset leaves them
    top_from: float = 0.75  # where the top region begins
    pessimism: float = 0.0  # standard deviations, by the model's posterior, taken off the reward
    dropout: float = 0.0  # share of the criteria left out, drawn anew for each prompt and update


@dataclass
class RlConfig:
    """What every way to train a policy on the reward model's reward has in common."""

    reward_model: str  # model folder of a training run
    output: str  # run folder; what was learnt is written into its adapter/, or with lora_rank 0 its model/, folder
    data: str = "builtin"  # prompts with rubrics: train + validation prompts are trained on, test prompts evaluated
    reward: RewardKind = "proxy"  # what is paid: mean of the verdicts; the judge's expected reward; its lower bound
    policy: str = "smollm2"  # model folder, hub id or 'smollm2'; or adapter/ of a run, trained on from there
    judge: Literal["verifier", "local", "openai", "systemone"] = "verifier"  # who gives the gold reward
    judge_model: str = EMBEDDED  # local: model folder, hub id or 'smollm2'; openai, systemone: its name at the endpoint
    judge_base_url: str | None = None  # openai, systemone: e.g. http://127.0.0.1:8000/v1
    use_verifiers: bool = True  # code answers criteria with a verifier, in reward and gold; false: such vetoes alone
    steps: int = 14  # updates
    batch_size: int = 16  # rollouts in one update
    micro_batch_size: int = 8  # rollouts in one forward and backward pass
    response_length: int = 48  # new tokens of a rollout
    temperature: float = 1.0  # of sampling, in training and in evaluation
    learning_rate: float = 5e-4  # constant; 1e-6 to 1e-5 with lora_rank 0
    lora_rank: int = 16  # of the adapter; 0 has none, and trains all weights
    lora_alpha: int = 32  # scale of the adapter: alpha / rank
    lora_layers: int | None = None  # adapters in so many last layers only: cheaper updates; unset means all
    gold_sample: int = 16  # rollouts of an update that the judge also scores, drawn with preference for tail and doubt
    gold_budget: int | None = None  # such rollouts in the whole run: some updates are not judged; unset judges all
    fallback_budget: int | None = None  # verdicts that the judge gives in place of doubtful answers, in the whole run
    fallback_width: float = 0.5  # how much of [0, 1] the interval of such an answer leaves open, at least
    on_alarm: Literal["warn", "stop", "rollback"] = "warn"  # when gold has declined; the last two end the run early
    eval_samples: int = 4  # responses per test prompt, before and after
    eval_prompts: int | None = None  # first test prompts only; unset means all
    seed: int = 0  # of sampling, of the order of prompts and of dropout
    mask_unfinished: bool = False  # rollouts that never end teach nothing, whatever their reward
    report_to: str = "none"  # tensorboard, wandb, trackio: anything transformers knows
    save_steps: int = 5  # updates between checkpoints; the newest is kept
    resume: bool = False  # go on from the last checkpoint of an interrupted run; more steps may be asked for
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)


@dataclass
class PolicyConfig(RlConfig):
    """Train a policy by PPO on the reward model's reward, beside the judge's on a sample."""

    ppo_epochs: int = 2  # passes over the rollouts of an update
    kl_coef: float = 0.02  # weight of the KL to the starting policy in the reward
    gae_lambda: float = 1.0  # 1 credits every token with the whole reward; less, with what is near
    critic_from: Literal["policy", "reward_model"] = "policy"  # whose first layers the value head stands on
    critic_layers: int = 6  # how many of them; they are frozen
    missing_eos_penalty: float | None = None  # subtracted from the reward of a rollout that never ends


@dataclass
class DemoConfig:
    """The main job, end to end: judge, train, calibrate, audit, compare speed, PPO; ends with a table."""

    output: str = "runs/demo"  # run folder; every stage has a folder in it
    speed_responses: int = 40  # responses both scorers read for the speed comparison
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(output="judge"))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(output="train"))
    calibrate: CalibrateConfig = field(default_factory=lambda: CalibrateConfig(model="train/model"))
    audit: AuditConfig = field(default_factory=lambda: AuditConfig(model="train/model", output="audit"))
    policy: PolicyConfig = field(  # every embedded criterion carries a verifier; here the model is what is measured
        default_factory=lambda: PolicyConfig(reward_model="train/model", output="ppo", use_verifiers=False)
    )


# What the demo sets itself, because each stage reads what the one before it wrote. Not offered as options.
DEMO_SETS = (
    "judge.output",
    "judge.resume",
    "judge.engine",
    "judge.workers",
    "judge.ray_address",
    "judge.batch_results",
    "train.data",
    "train.output",
    "train.resume",
    "calibrate.model",
    "calibrate.data",
    "calibrate.overwrite",
    "audit.model",
    "audit.data",
    "audit.output",
    "policy.reward_model",
    "policy.data",
    "policy.output",
    "policy.resume",
)


@dataclass
class GroupConfig(RlConfig):
    """What GRPO and RLOO have in common: rewards are compared within a group of rollouts of one prompt."""

    group_size: int = 4  # rollouts of one prompt that are compared with each other


@dataclass
class GrpoConfig(GroupConfig):
    """Train a policy by GRPO on the reward model's reward, beside the judge's on a sample."""

    kl_coef: float = 0.02  # weight of the KL to the starting policy, per token, in the loss
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # mean over the update's tokens; over rollouts; fixed length
    scale_rewards: Literal["group", "batch", "none"] = "group"  # what standard deviation divides the advantages


@dataclass
class RlooConfig(GroupConfig):
    """Train a policy by RLOO on the reward model's reward, beside the judge's on a sample."""

    kl_coef: float = 0.02  # weight of the KL to the starting policy, per rollout, in the reward
    normalise: bool = False  # divide advantages by their standard deviation over the update


@dataclass
class BonConfig:
    """Choose each prompt's best responses by the reward model: best-of-n, data for SFT, preference pairs for DPO."""

    reward_model: str  # model folder of a training run
    output: str  # run folder; best.jsonl, accepted.jsonl, pairs.jsonl, report.json and bon.png are written into it
    data: str = "builtin"  # responses with rubrics (.jsonl or .parquet), several a prompt; with --policy prompts do
    split: Literal["all", "train", "validation", "test"] = "all"  # whose prompts
    reward: RewardKind = "proxy"  # what chooses: mean of the verdicts; the judge's expected reward; its lower bound
    use_verifiers: bool = True  # code answers criteria with a verifier; false: vetoes alone, and the model all else
    policy: str | None = None  # samples responses first: model folder, hub id or 'smollm2'; unset: those of the data
    samples: int = 8  # policy: responses to each prompt
    response_length: int = 256  # policy: most new tokens of a response
    temperature: float = 1.0  # policy: of sampling
    threshold: float | None = None  # accept responses of at least this reward; unset: by share
    share: float | None = None  # accept the best share of each prompt's responses; unset, without threshold too: 0.25
    pairs: Literal["best-worst", "all"] = "best-worst"  # of each prompt, one pair or every ordered pair
    margin: float = 0.05  # least difference of the rewards in a pair, which lie in [0, 1]
    bootstrap: int = 1000  # resamples of prompts for the intervals
    tokens_per_batch: int = 16_384  # packed tokens in one forward pass of the reward model
    seed: int = 0  # of the order of tied responses, of sampling and of the resamples
    resume: bool = False  # go on with an interrupted run; what was sampled is kept


@dataclass
class OnlineDpoConfig(RlConfig):
    """Train a policy by online DPO on the reward model's reward, beside the judge's on a sample."""

    beta: float = 0.1  # pull to the starting policy: a pair's log-odds for each nat that training sets it apart
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # of a pair: DPO's; squared distance to 1 / (2 beta) nats apart


@dataclass
class PageConfig:
    """Make the page of an RL run anew, or put several runs side by side on one page."""

    runs: list[str]  # folders of ppo, grpo, rloo or online-dpo; runs that go on show what they have so far
    output: str | None = None  # HTML file; unset: run.html in the folder, of one run only
    overwrite: bool = False  # replace the output if it is there; a run's run.html always is


@dataclass
class PromptChoice:
    """Which prompts of its data a stage of a curriculum takes; all that is given must hold."""

    ids: list[str] | None = None  # of a prompt_id like one of these, where * stands for anything
    sources: list[str] | None = None  # of one of these sources
    tags: list[str] | None = None  # with a criterion that has one of these tags
    verifiable: bool | None = None  # true: code answers every criterion; false: a model answers some


@dataclass
class PromptFilter:
    """Keep a stage's prompts on which the policy that it begins with earns middling rewards, and differing ones."""

    samples: int = 4  # responses of the policy to each prompt, as long and as hot as the stage's rollouts
    low: float = 0.25  # quantile of the prompts' mean rewards; a prompt below is dropped as too hard
    high: float = 0.75  # the same; a prompt above is dropped as too easy
    min_spread: float = 0.05  # least standard deviation of a prompt's rewards, which lie in [0, 1]


@dataclass
class CurriculumConfig:
    """Train a policy in stages, by any of the RL commands, each from where the one before ended; docs/curricula.md."""

    stages: list[dict[str, Any]]  # in order; each has name, algorithm, options of it, and may have prompts and filter
    output: str  # folder of all; a stage's run folder is OUTPUT/<number>-<name>, the report OUTPUT/curriculum.json
    policy: str = "smollm2"  # that the first stage begins with: model folder, hub id, 'smollm2', or adapter/ of a run
    common: dict[str, Any] = field(default_factory=dict)  # what all stages would say; what a stage says itself wins
    eval_prompts: int | None = None  # first held-out prompts of each stage's data only; unset means all
    families: Literal["stage", "source", "tag"] = "stage"  # report held-out prompts by the stages they fit, or by these
    resume: bool = False  # go on with an interrupted curriculum; stages to come may have changed, or be more
