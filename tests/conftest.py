"""Fixtures that several test folders share. What one module alone needs stands in its own test file."""

import signal

import pytest

from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

_CORPUS = [
    "Prompt: Response: Criterion: Does the response meet the criterion? Answer Yes or No. Met: Yes No",
    "Write a short note that names three fruits and ends with a question. Yes. No.",
    "I like apples, pears and plums. Which one do you like best?",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure():
    """Let tests interrupt themselves and what they start, also where a shell put pytest into the background.

    Without job control a shell starts such a job with SIGINT ignored, which it and its children would inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """Folder of a random two-layer Llama (width 32) with a byte-level tokenizer shaped like SmolLM2's.

    pad is <|endoftext|> (id 0), eos is <|im_end|> (id 2); " Yes" and " No" are one token each; window 1024.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = _CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # larger than usual, so that different inputs give clearly different logits
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny_backbone")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def judged():
    """Twelve judged responses: six prompts (4 train, 1 validation, 1 test), two responses each, two criteria.

    The first response of a prompt meets both criteria, the second only the second.
    """
    splits = ["train"] * 4 + ["validation", "test"]
    records = []
    for number, split in enumerate(splits):
        rubric = Rubric(
            criteria=(
                Criterion(id="fruit", text=f"names fruit number {number}", weight=2.0),
                Criterion(id="short", text=f"has fewer than {number + 20} words"),
            )
        )
        for place, (text, met) in enumerate([(f"Fruit {number} is a pear.", 1.0), (f"Stone {number} is grey.", 0.0)]):
            records.append(
                JudgedResponse(
                    prompt_id=f"p{number}",
                    prompt=f"Name fruit number {number}.",
                    response_id=f"p{number}-r{place}",
                    response=text,
                    rubric=rubric,
                    generator="test",
                    verdicts=(
                        Verdict(criterion_id="fruit", value=met, judge="test"),
                        Verdict(criterion_id="short", value=1.0, judge="test"),
                    ),
                    split=split,
                )
            )
    return records
