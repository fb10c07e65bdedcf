"""SmolLM2-135M against transformers on torch: greedy tokens in float32, one by one."""

import pytest
import torch

import jaxsvd

NEW_TOKENS = 64
END = 2  # of generation_config.json; it is the padding too
# Texts, questions, lists, code and a chat, of very different lengths.
PROMPTS = [
    "Gravity is",
    "The capital of France is",
    "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who",
    "Question: What is 12 plus 30?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Ingredients for pancakes:\n1. 200 g of flour\n2.",
    "<|im_start|>user\nName one colour.<|im_end|>\n<|im_start|>assistant\n",
    "The history of the printing press begins in the fifteenth century, when Johannes Gutenberg combined movable metal "
    "type, oil-based ink and a wooden press. Within fifty years, printers in more than two hundred towns had made "
    "millions of books. The most important consequence of this was",
]


@pytest.fixture(scope="module")
def lm(smollm):
    return jaxsvd.load(smollm, dtype="float32")


@pytest.fixture(scope="module")
def expected(smollm, lm):
    """What transformers generates for each prompt, the token that ended it included.

    It takes all prompts as one batch, padded on the left, which is four times faster than one by one.
    """
    import transformers

    torch.set_num_threads(1)  # its threads wait in a spin: ten times slower where another process wants the core
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    prompts = [lm.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)[:, width:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def check(completion, expected):
    assert completion.token_ids == expected
    assert completion.finish_reason == ("length" if len(expected) == NEW_TOKENS else "stop")


def test_some_prompts_end_early(expected):
    """Otherwise the tests below would show nothing about the end of a text."""
    assert any(len(tokens) < NEW_TOKENS for tokens in expected)
    assert any(len(tokens) == NEW_TOKENS for tokens in expected)


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_greedy_alone(lm, expected, row):
    check(lm.generate(PROMPTS[row], max_new_tokens=NEW_TOKENS), expected[row])


def test_greedy_as_one_ragged_batch(lm, expected):
    for completion, tokens in zip(lm.generate(PROMPTS, max_new_tokens=NEW_TOKENS), expected, strict=True):
        check(completion, tokens)
