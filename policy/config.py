"""Configurations of the RL stage and of the whole demo. Never imports torch, so `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from rm.config import AuditConfig, CalibrateConfig, RewardKind, TrainConfig
from rubric_data.config import EMBEDDED, JudgeConfig


@dataclass
class PolicyConfig:
    """Train a policy by PPO on the reward model's reward, beside the judge's on a sample."""

    reward_model: str  # model folder of a training run
    output: str  # run folder; the LoRA adapter is written into its adapter/ folder
    data: str = "builtin"  # prompts with rubrics: train + validation prompts are trained on, test prompts evaluated
    reward: RewardKind = "proxy"  # what is paid: mean of the verdicts; the judge's expected reward; its lower bound
    policy: str = "smollm2"  # model folder, hub id or 'smollm2'
    judge: Literal["verifier", "local", "openai", "systemone"] = "verifier"  # who gives the gold reward
    judge_model: str = EMBEDDED  # local: model folder, hub id or 'smollm2'; openai, systemone: its name at the endpoint
    judge_base_url: str | None = None  # openai, systemone: e.g. http://127.0.0.1:8000/v1
    use_verifiers: bool = True  # criteria with a verifier are answered by code, in the reward and in the gold reward
    steps: int = 14  # PPO updates
    batch_size: int = 16  # rollouts in one update
    micro_batch_size: int = 8  # rollouts in one forward and backward pass
    ppo_epochs: int = 2  # passes over the rollouts of an update
    response_length: int = 48  # new tokens of a rollout
    temperature: float = 1.0  # of sampling, in training and in evaluation
    learning_rate: float = 5e-4  # constant
    kl_coef: float = 0.02  # weight of the KL to the starting policy in the reward
    gae_lambda: float = 1.0  # 1 credits every token with the whole reward; less, with what is near
    critic_layers: int = 6  # of the policy's first layers, frozen, below the value head
    missing_eos_penalty: float | None = None  # subtracted from the reward of a rollout that never ends
    lora_rank: int = 16  # of the adapter
    lora_alpha: int = 32  # scale of the adapter: alpha / rank
    lora_layers: int | None = None  # adapters in so many last layers only: cheaper updates; unset means all
    gold_sample: int = 16  # rollouts of an update that the judge also scores, drawn with preference for tail and doubt
    gold_budget: int | None = None  # such rollouts in the whole run: some updates are not judged; unset judges all
    on_alarm: Literal["warn", "stop", "rollback"] = "warn"  # when gold has declined; the last two end the run early
    eval_samples: int = 4  # responses per test prompt, before and after
    eval_prompts: int | None = None  # first test prompts only; unset means all
    seed: int = 0  # of sampling and of the order of prompts


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
)
