import numpy as np
import pytest
import torch

from rm.backbone import load_causal_lm, load_tokenizer
from rm.sampling import Completion, _completion, _gumbel, render_chat, sample

PROMPTS = ["I like apples", "Which one do you like best? Write a short note.", "plums"]


@pytest.fixture(scope="module")
def policy(tiny_backbone):
    return load_causal_lm(tiny_backbone), load_tokenizer(tiny_backbone)


def draw(policy, prompts=PROMPTS, **options):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, **options}
    return sample(*policy, prompts, **settings)


def test_the_prompt_stands_in_the_chat_template(policy):
    assert render_chat(policy[1], "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_greedy_is_the_arg_max_of_an_unpadded_forward_pass_token_by_token(policy):
    model, tokenizer = policy
    for prompt, (completion,) in zip(PROMPTS, draw(policy, temperature=0.0), strict=True):
        ids = tokenizer(render_chat(tokenizer, prompt), return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            best = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
            if best == tokenizer.eos_token_id:
                break
        assert completion == _completion(tokenizer, ids[0, start:].tolist())


def test_arg_max_after_the_noise_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = logits.expand(4000, 4)
    for temperature in (0.5, 1.0):
        drawn = _gumbel(range(4000), temperature)(None, rows).argmax(-1)
        found = np.bincount(drawn.numpy(), minlength=4) / 4000
        # three standard deviations of a share are at most 0.024
        assert found == pytest.approx(torch.softmax(logits / temperature, 0).numpy(), abs=0.03)


def test_the_batch_and_the_other_prompts_change_nothing(policy):
    together = draw(policy, samples=2)
    assert draw(policy, samples=2, batch_size=1) == together
    assert draw(policy, prompts=PROMPTS[::-1], samples=2) == together[::-1]
    assert draw(policy, prompts=PROMPTS[1:2]) == [together[1][:1]]


def test_seed_sample_and_repetition_each_change_the_draw(policy):
    first = draw(policy, prompts=["plums", "plums"], samples=2)
    texts = [completion.text for row in first for completion in row]
    assert len(set(texts)) == 4
    assert draw(policy, prompts=["plums", "plums"], samples=2) == first
    assert draw(policy, prompts=["plums", "plums"], samples=2, seed=4) != first


def test_mode_and_global_random_state_stay(policy):
    model, _ = policy
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(policy)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()


def test_text_stops_at_the_end_token_and_says_so(policy):
    _, tokenizer = policy
    words = tokenizer("pears and", add_special_tokens=False)["input_ids"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert _completion(tokenizer, [*words, end, pad, pad]) == Completion("pears and", finished=True)
    assert _completion(tokenizer, words) == Completion("pears and", finished=False)
    assert _completion(tokenizer, [end, pad]) == Completion("", finished=True)


def test_unfit_settings_are_refused(policy, tiny_backbone):
    with pytest.raises(ValueError, match=r"temperature must be at least 0, got -1"):
        draw(policy, temperature=-1.0)
    tokenizer = load_tokenizer(tiny_backbone)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pad token other than its end token"):
        draw((policy[0], tokenizer))
