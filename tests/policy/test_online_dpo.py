"""Online DPO on a random model: through the command line, and what is extended of TRL's trainer, by hand."""

import json
import math
import sys

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy import stage
from policy.cli import main
from policy.config import OnlineDpoConfig
from policy.online_dpo import check_pairs, describe, require_trl
from policy.prompts import RubricPrompt
from policy.reward import reward_dataset
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Rubric, Verifier
from tests.policy.fruit import UNTIMED, read_lines, reward_untrained, small_run, words, write_fruit

RUBRIC = Rubric(
    criteria=(
        Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma")),
        Criterion(id="tone", text="is friendly", tags=("tone",)),
    )
)
PROMPTS = [RubricPrompt("p0", "Say it.", RUBRIC), RubricPrompt("p1", "Name three fruits, please.", RUBRIC)]
END, PAD = 2, 0
dpo_trainer = require_trl()  # it keeps TRL from warning that this part of it may change


@pytest.fixture
def command(tmp_path, tiny_backbone, monkeypatch):
    """Arguments of a run of three updates, whose reward model is an untrained one."""
    reward_untrained(monkeypatch, tiny_backbone)
    data = write_fruit(tmp_path / "data.jsonl", RUBRIC, ["train"] * 2 + ["validation"] + ["test"])
    options = small_run(tiny_backbone, data, eval_samples=2, save_steps=1)  # four pairs an update, of three prompts
    return ["online-dpo", *words(options)]


def test_two_updates_end_to_end(command, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*command, "--steps", "2", "--aggregation.saturation", "3", "--output", str(run)]) == 0
    rows = read_lines(run / "metrics.jsonl")
    assert [(row["step"], row["episode"], row["reward/judged"]) for row in rows] == [(1, 8, 4), (2, 16, 4)]
    for row in rows:
        assert row["reward/gold_low"] < row["reward/gold"] < row["reward/gold_high"]
        assert 0 < row["criteria/tone"] < 1 and 0 <= row["criteria/has no comma"] <= 1
        assert row["reward/proxy"] == pytest.approx((row["criteria/tone"] + row["criteria/has no comma"]) / 2)
        assert row["reward/paid"] > row["reward/proxy"] + 0.02
        assert 1 <= row["response_tokens"] <= 6
        assert 0 < row["pair_margin"] < 1 and row["same_reward_share"] in (0, 0.25, 0.5, 0.75)
        assert row["grad_norm"] > 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-2)  # the first rollouts are the starting policy's own
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # a sum in bfloat16 would be off by more
    assert abs(rows[1]["kl"]) > 0.05
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["prompts_trained"], result["prompts_evaluated"]) == (2, 3, 1)
    assert (run / "checkpoints" / "checkpoint-2" / "watch.json").exists()
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert capsys.readouterr().out.count("/2  proxy 0.") == 2


def test_without_an_adapter_the_reference_is_the_starting_policy(command, tmp_path):
    run = tmp_path / "run"
    assert main([*command, "--lora_rank", "0", "--steps", "2", "--loss", "ipo", "--output", str(run)]) == 0
    first, second = read_lines(run / "metrics.jsonl")
    assert first["kl"] == pytest.approx(0, abs=1e-4) and abs(second["kl"]) > 0.05
    assert first["loss"] == pytest.approx(25)  # 1 / (2 beta), squared: nothing is set apart yet
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(command, tmp_path, monkeypatch):
    whole, stopped = ([*command, "--output", str(tmp_path / name)] for name in ("whole", "stopped"))
    assert main(whole) == 0
    write = stage.StepLog.on_log

    def interrupt(self, args, state, control, **rest):
        write(self, args, state, control, **rest)
        if state.global_step == 2:
            raise KeyboardInterrupt  # the second row is written, its checkpoint is not

    monkeypatch.setattr(stage.StepLog, "on_log", interrupt)
    assert main(stopped) == 130
    monkeypatch.setattr(stage.StepLog, "on_log", write)
    assert main([*stopped, "--resume", "true"]) == 0
    rows, again = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    for row, other in zip(rows, again, strict=True):
        assert other.pop("alarm") is row.pop("alarm") is None
        assert {**other, **UNTIMED} == pytest.approx({**row, **UNTIMED}, rel=1e-3)


def test_what_cannot_be_paired_is_refused(command, tmp_path, capsys):
    for options, message in (
        (["--micro_batch_size", "1"], "micro_batch_size: 1 is odd"),
        (["--beta", "0"], "beta: must be positive, got 0.0"),
        (["--save_steps", "0"], "save_steps: must be at least 1, got 0"),
    ):
        assert main([*command, "--output", str(tmp_path / "run"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    check_pairs(OnlineDpoConfig("model", "run"))


def test_a_trl_without_it_is_told(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "policy.dpo_trainer", None)
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    assert "online-dpo: needs trl>=1.8,<1.13" in capsys.readouterr().err


def test_a_row_of_metrics_by_hand():
    logs = {"objective/kl": 1.5, "objective/entropy": 30.0, "loss": 0.5, "pairs/margin": 0.25, "grad_norm": math.nan}
    assert describe({**logs, "pairs/same_reward": 0.5, "rewards/margins": 3.0}, []) == {
        "kl": 1.5,
        "entropy": 30.0,
        "loss": 0.5,
        "pair_margin": 0.25,
        "same_reward_share": 0.5,
        "grad_norm": None,
    }


# --- TRL's side: each of these fails if what `policy.dpo_trainer` extends is no longer called, or called otherwise ----


class Pays:
    """A reward function that pays what it was told to, and keeps what it was called with."""

    __name__ = "pays"

    def __init__(self, *rewards):
        self.rewards, self.calls = list(rewards), []

    def __call__(self, prompts, completions, log_metric=None, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        log_metric("criteria/tone", 0.25 * len(self.calls))
        return self.rewards


@pytest.fixture
def build(tiny_backbone, tmp_path):
    """A trainer of two pairs a pass, its adapter away from zero."""

    def build(reward, accumulation=1, **options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)
        arguments = dpo_trainer.OnlineDPOConfig(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_new_tokens=6,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-2,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return dpo_trainer.PairTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=reward_dataset(PROMPTS, [0, 1] * accumulation),
            processing_class=AutoTokenizer.from_pretrained(tiny_backbone),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
            **options,
        )

    return build


def batch(trainer):
    return trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])


def gradients(trainer):
    return [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]


def test_the_reward_function_gets_columns_ids_without_padding_and_the_hook(build, monkeypatch):
    reward = Pays(1.0, 0.0, 0.0, 1.0)
    trainer, logged = build(reward), []
    give_completions(monkeypatch, trainer, [[5, END], [5, 6, 7], [END], [9, 8]])
    trainer.training_step(trainer.model, batch(trainer))
    (call,) = reward.calls
    assert call["place"] == [0, 1, 0, 1] and call["rubric"] == [RUBRIC.model_dump_json()] * 4
    assert [prompt[0]["content"] for prompt in call["prompts"]] == [prompt.prompt for prompt in PROMPTS] * 2
    assert call["completion_ids"] == [[5, END], [5, 6, 7], [END], [9, 8, PAD]]  # all but what follows the end token
    assert call["completions"][2] == [{"role": "assistant", "content": ""}]
    assert call["trainer_state"] is trainer.state
    monkeypatch.setattr(dpo_trainer.OnlineDPOTrainer, "log", lambda self, logs, start_time=None: logged.append(logs))
    trainer.log({"loss": 0.5})
    trainer.log({"train_loss": 0.5})
    update = {"loss": 0.5, "criteria/tone": 0.25, "pairs/margin": 1.0, "pairs/same_reward": 0.0}
    assert logged == [update, {"train_loss": 0.5}]


def give_completions(monkeypatch, trainer, rows):
    """Have the model "generate" ``rows``, in TRL's order: the first of every prompt, then the second of every one."""
    width = max(map(len, rows))

    def generate(input_ids, **_):
        found = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        assert len(input_ids) == len(found)
        return torch.cat((input_ids, found), dim=1)

    monkeypatch.setattr(trainer.model, "generate", generate)


def log_probabilities(trainer, rows):
    """Sum over each of ``rows``, of the policy and of the reference; prompts in TRL's order, one row at a time."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()

    @torch.no_grad()
    def of(place, row):
        turns = [{"role": "user", "content": PROMPTS[place % 2].prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([asked + row])).logits[0, len(asked) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).sum().item()

    policy = [of(place, row) for place, row in enumerate(rows)]
    with model.disable_adapter():
        return policy, [of(place, row) for place, row in enumerate(rows)]


def test_the_better_paid_of_each_prompt_is_chosen_and_padding_counts_nowhere(build, monkeypatch):
    rows = [[5, END], [5, 6, 7, END], [9, 8, END], [END]]
    trainer = build(Pays(0.75, 0.25, 0.5, 0.5))
    give_completions(monkeypatch, trainer, rows)
    policy, reference = log_probabilities(trainer, rows)
    loss = trainer.training_step(trainer.model, batch(trainer))
    told = {name: values[0] for name, values in trainer.stats.items()}
    assert told["logps/chosen"] == pytest.approx((policy[0] + policy[3]) / 2, rel=1e-4)
    assert told["logps/rejected"] == pytest.approx((policy[2] + policy[1]) / 2, rel=1e-4)
    ratios = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
    assert told["objective/kl"] == pytest.approx(sum(ratios) / 4, rel=1e-3)
    assert told["objective/entropy"] == pytest.approx(-sum(policy) / 4, rel=1e-4)
    gaps = [0.1 * (ratios[0] - ratios[2]), 0.1 * (ratios[3] - ratios[1])]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 2, rel=1e-4)
    assert trainer._noted["pairs/margin"] == [0.25]


@pytest.mark.parametrize("rewards", [(0.5, 0.5, 0.5, 0.5), (None, 0.5, 0.25, None), (None, None, None, None)])
def test_pairs_that_tell_nothing_teach_nothing(build, monkeypatch, rewards):
    trainer = build(Pays(*rewards))
    give_completions(monkeypatch, trainer, [[5, END], [5, 6], [9, 8], [END]])
    loss = trainer.training_step(trainer.model, batch(trainer))
    assert loss.item() == pytest.approx(math.log(2))
    assert gradients(trainer) and all((gradient == 0).all() for gradient in gradients(trainer))
    assert (trainer._noted["pairs/margin"], trainer._noted["pairs/same_reward"]) == ([0.0], [1.0])


def test_one_pair_teaches_beside_one_that_does_not(build, monkeypatch):
    found = []
    for rewards, options in (
        ((0.75, 0.5, 0.25, None), {}),
        ((0.75, 0.5, 0.25, 0.5), {}),
        ((0.75, 0.25, 0.25, 0.5), {"mask_unfinished": True}),  # the second prompt's first rollout never ends
    ):
        trainer = build(Pays(*rewards), **options)
        give_completions(monkeypatch, trainer, [[5, END], [5, 6], [9, END], [END]])
        trainer.training_step(trainer.model, batch(trainer))
        assert trainer._noted["pairs/same_reward"] == [0.5]
        found.append(gradients(trainer))
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_micro_batches_are_averaged(build, monkeypatch):
    found = []
    for accumulation in (1, 2):
        trainer = build(Pays(0.75, 0.25, 0.5, 0.5), accumulation)
        give_completions(monkeypatch, trainer, [[5, END], [5, 6, 7, END], [9, 8, END], [END]])
        for _ in range(accumulation):
            trainer.training_step(trainer.model, batch(trainer))
        found.append(gradients(trainer))
    torch.testing.assert_close(*found)


def test_what_the_trainer_was_not_made_for_is_refused(build):
    with pytest.raises(UserError, match="online DPO: takes one reward function"):
        build([Pays(), Pays()])


def test_a_whole_update_through_trl(build):
    reward = Pays(0.75, 0.25, 0.5, 0.5)
    trainer = build(reward)
    trainer.train()
    (call,) = reward.calls
    assert all(1 <= len(ids) <= 6 for ids in call["completion_ids"])
    assert trainer.state.log_history[0]["criteria/tone"] == 0.25
    assert trainer.state.global_step == 1
