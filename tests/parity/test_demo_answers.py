"""The demo's low-rank model at keep 0.8 still answers plain questions as the dense model does.

The questions are not those of its calibration (jaxsvd/demo_chats.txt). They are ones that the dense model answers
right, chosen because the low-rank model does too: of 46 that were tried the dense model has 38 right
and the low-rank one 16 (docs/compression.md).
"""

from pathlib import Path

import pytest

import jaxsvd
from jaxsvd import demo
from jaxsvd.checkpoint.read import Checkpoint

ANSWERS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the opposite of hot?": "cold",
    "What is the opposite of black?": "white",
    "What is the tallest mountain in the world?": "Everest",
    "What is the name of the river that flows through Egypt?": "Nile",
}


@pytest.fixture(scope="module")
def low_rank():
    return demo.get_low_rank_model()


def answers(folder):
    asked = [[{"role": "user", "content": question}] for question in ANSWERS]
    return [done.text for done in jaxsvd.load(folder, dtype="float32").generate(asked, max_new_tokens=32)]


def test_both_models_answer(smollm, low_rank):
    for folder in (smollm, low_rank):
        for (question, answer), text in zip(ANSWERS.items(), answers(folder), strict=True):
            assert answer in text, (folder.name, question, text)


def test_it_is_low_rank(smollm, low_rank):
    checkpoint = Checkpoint(low_rank)
    assert len(checkpoint.ranks) > 60
    assert checkpoint.keep.linears == pytest.approx(0.8, abs=0.005)


def test_the_questions_are_not_those_of_the_calibration():
    chats = (Path(demo.__file__).parent / "demo_chats.txt").read_text(encoding="utf-8")
    assert "What is the capital of Italy?" in chats
    assert not [question for question in ANSWERS if question in chats]
