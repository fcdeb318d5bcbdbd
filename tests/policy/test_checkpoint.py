"""What is kept of a policy: an adapter, or the whole model, as it was when the best rollouts were written."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from policy.checkpoint import BestAdapter
from rm.lora import attach_lora


def policies(tied):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    return {"whole": lambda: model, "adapter": lambda: attach_lora(model, model.model.layers, rank=2, alpha=4)}


@pytest.mark.parametrize(("kind", "tied"), [("adapter", False), ("whole", False), ("whole", True)])
def test_the_best_comes_back_whatever_was_learnt_since(kind, tied, tmp_path, tiny_backbone):
    policy = policies(tied)[kind]()
    best = BestAdapter(policy, AutoTokenizer.from_pretrained(tiny_backbone), tmp_path / "best")
    ids = torch.tensor([[1, 2, 3]])

    def learn():
        with torch.no_grad():
            for weight in policy.parameters():
                if weight.requires_grad:
                    weight.normal_()
        return policy(ids).logits

    wrote = learn()
    best.remember()
    learn()
    best.keep(1)  # what was remembered, not what it is by now
    learn()
    best.restore()
    torch.testing.assert_close(policy(ids).logits, wrote)
    if kind == "whole":
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "best" / "step-1")
        torch.testing.assert_close(saved(ids).logits, wrote)
