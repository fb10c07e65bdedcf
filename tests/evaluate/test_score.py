"""How likely tokens are, by Engine.score and LanguageModel.score, against transformers and the engine's own logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluating import reference
from safetensors.numpy import load_file, save_file
from tiny import MAX_POSITIONS, open_engine, prompts_of

import jaxsvd
from jaxsvd import kernels
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.engine import Engine


def check(scores, model, prompts):
    assert len(scores) == len(prompts)
    for score, prompt in zip(scores, prompts, strict=True):
        logprobs, greedy = reference(model, prompt)
        assert score.logprobs.shape == score.greedy.shape == (len(prompt) - 1,)
        assert (score.logprobs.dtype, score.greedy.dtype) == (np.float32, bool)
        np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-4)
        assert score.greedy.tolist() == greedy.tolist()


def greedy_text(engine, prompt, new):
    """The prompt and what greedily follows: tokens of which many are the likeliest."""
    blocks = engine.generate([prompt], [jaxsvd.SamplingParams()], new)
    return prompt + np.concatenate(list(blocks), axis=1)[0].tolist()


@pytest.mark.parametrize("tiny", ["llama-untied", "qwen3"], indirect=True)
def test_scores_are_those_of_transformers(tiny):
    folder, model = tiny
    engine = open_engine(folder)
    prompts = [*prompts_of(30, 2, 17, 1), greedy_text(engine, [5, 6, 7], 20)]
    scores = engine.score(prompts)
    check(scores, model, prompts)
    assert scores[-1].greedy[2:].all() and not scores[0].greedy.all()


@pytest.mark.parametrize("lengths", [(70, 5, 33), (33,), (34, 1), (65, 32, 64)], ids=str)
def test_prompts_longer_than_the_largest_bucket(tiny_llama, lengths):
    """One length per border: the token behind a chunk is predicted by the chunk before."""
    folder, model = tiny_llama
    prompts = prompts_of(*lengths)
    check(open_engine(folder, lengths="16,32/auto").score(prompts), model, prompts)


def test_the_last_token_needs_no_position(tiny_llama):
    folder, model = tiny_llama
    engine = open_engine(folder)
    (prompt,) = prompts_of(MAX_POSITIONS + 1)
    check(engine.score([prompt]), model, [prompt])
    assert [step.name for step in engine.compiled] == ["prefill of 512 tokens", "scores of 512 tokens"]
    with pytest.raises(jaxsvd.UsageError, match=r"prompt 1 has 514 tokens: the model has room for 513; shorten"):
        engine.score([[1], [*prompt, 1]])


def test_a_row_does_not_depend_on_its_batch_mates(tiny_llama):
    engine = open_engine(tiny_llama[0], lengths="16,32/auto")
    prompts = prompts_of(70, 5, 33)
    for prompt, score in zip(prompts, engine.score(prompts), strict=True):
        (alone,) = engine.score([prompt])
        np.testing.assert_allclose(alone.logprobs, score.logprobs, atol=1e-5)


def test_nothing_compiles_after_the_first_call(tiny_llama):
    engine = open_engine(tiny_llama[0], lengths="16,32/auto")
    engine.score(prompts_of(70, 5))
    known = list(engine.compiled)
    assert len({step.name for step in known}) == len(known) == 6  # prefill, cache, two extensions, two of scores
    for seed, lengths in enumerate([(66, 70), (80, 1), (81, 81)]):
        engine.score(prompts_of(*lengths, seed=seed))
    assert engine.compiled == known


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no prompt"), ([[1], []], "prompt 1 is empty"), ([[1, 128]], "id 128"), ([[1, 2, -1]], "id -1")],
)
def test_bad_prompts(tiny_llama, prompts, message):
    with pytest.raises(jaxsvd.UsageError, match=message):
        open_engine(tiny_llama[0]).score(prompts)


def test_logits_that_are_no_numbers_are_an_error(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_llama[0] / "config.json").read_bytes())
    tensors = {name: np.array(array) for name, array in load_file(tiny_llama[0] / "model.safetensors").items()}
    tensors["model.norm.weight"] *= np.float32(1e38)
    tensors["model.embed_tokens.weight"] *= np.float32(100)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(jaxsvd.JaxsvdError, match="not numbers"):
        open_engine(tmp_path).score(prompts_of(5))


def test_one_prompt_or_many_of_any_kind(worded):
    lm, model = jaxsvd.load(worded[0]), worded[1]
    text = "The quick brown fox"
    chat = [{"role": "user", "content": "Hi"}]
    ids = lm.encode(text)
    single = lm.score(text)
    check([single], model, [ids])
    check(lm.score([text, chat, ids[:4]]), model, [ids, lm.encode(chat), ids[:4]])
    assert isinstance(lm.score(ids), tuple) and isinstance(lm.score([ids]), list)
    check([lm.score(np.array(ids))], model, [ids])


def test_memory_is_that_of_one_row(tiny_llama):
    """Compiled, the step needs the logits of a row, however many rows there are."""
    engine, needed = open_engine(tiny_llama[0]), {}
    for batch in (1, 16):
        hidden = jax.ShapeDtypeStruct((batch, 512, 64), jnp.float32)
        targets = jax.ShapeDtypeStruct((batch, 512), jnp.int32)
        step = jax.jit(engine.score_tokens).lower(engine.leaves, hidden, targets).compile()
        needed[batch] = step.memory_analysis().temp_size_in_bytes
    logits = 512 * 128 * 4
    assert needed[16] < needed[1] + 2 * logits


def test_bfloat16_is_scored_in_float32(tiny_llama):
    folder, model = tiny_llama
    (prompt,) = prompts_of(40)
    (score,) = Engine(Checkpoint(folder).load(kernels.choose(), jnp.bfloat16)).score([prompt])
    assert score.logprobs.dtype == np.float32
    np.testing.assert_allclose(score.logprobs, reference(model, prompt)[0], atol=0.2)
