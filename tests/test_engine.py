"""The engine and what is called from a notebook, over the tiny models and SmolLM2."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import MAX_POSITIONS, open_engine, prompts_of

import jaxsvd
from jaxsvd.errors import JaxsvdError, UsageError
from jaxsvd.sampling import MODES, SamplingParams

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=3)
PENALISED = SamplingParams(temperature=1.2, repetition_penalty=1.3, presence_penalty=0.5, seed=2**64 - 1)
SAMPLED_AND_PENALISED = SamplingParams(temperature=0.5, top_k=3, min_p=0.1, presence_penalty=1.0, seed=5)


def run(engine, prompts, rows=None, new=10):
    blocks = list(engine.generate(prompts, rows or [GREEDY] * len(prompts), new))
    tokens = np.concatenate(blocks, axis=1)
    assert tokens.shape == (len(prompts), new)
    assert tokens.dtype == np.int32
    assert blocks[0].shape[1] == 1
    return tokens.tolist()


@pytest.fixture(scope="module")
def engine(tiny_llama):
    return open_engine(tiny_llama[0])


@pytest.fixture(scope="module")
def chunked(tiny_llama):
    return open_engine(tiny_llama[0], lengths="16,32/auto")


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return jaxsvd.load(tiny_llama[0])


@pytest.fixture(scope="module")
def smol(source):
    return jaxsvd.load(source)


# Batches, chunks and blocks change nothing.


def test_a_ragged_batch_is_its_rows_alone(tiny):
    engine = open_engine(tiny[0])
    prompts = prompts_of(30, 3, 17)
    together = run(engine, prompts)
    assert [run(engine, [prompt])[0] for prompt in prompts] == together


def test_a_sampled_batch_is_its_rows_alone(engine):
    prompts, rows = prompts_of(30, 3, 17), [GREEDY, SAMPLED, PENALISED]
    together = run(engine, prompts, rows)
    assert [run(engine, [prompt], [row])[0] for prompt, row in zip(prompts, rows, strict=True)] == together


def test_the_order_of_rows_does_not_matter(engine):
    prompts, rows = prompts_of(30, 3, 17), [GREEDY, SAMPLED, PENALISED]
    assert run(engine, prompts[::-1], rows[::-1]) == run(engine, prompts, rows)[::-1]


def test_greedy_tokens_are_those_of_the_logits(engine):
    (prompt,) = prompts_of(20)
    (tokens,) = run(engine, [prompt])
    logits = engine.logits([prompt + tokens])[0]
    assert logits[19:29].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("lengths", [(70,), (70, 5, 33), (64, 32)], ids=str)
def test_prefill_in_chunks(engine, chunked, lengths):
    prompts = prompts_of(*lengths)
    assert run(chunked, prompts, new=6) == run(engine, prompts, new=6)
    logits = engine.logits(prompts)
    np.testing.assert_allclose(chunked.logits(prompts), logits, atol=2e-4)
    assert logits.shape == (len(lengths), max(lengths), 128)
    for row, length in zip(logits, lengths, strict=True):
        assert row[:length].any(-1).all()
        assert not row[length:].any()


@pytest.mark.parametrize("rows", [[GREEDY, GREEDY], [SAMPLED, PENALISED]], ids=["greedy", "sampled"])
def test_steps_per_dispatch(tiny_llama, rows):
    prompts = prompts_of(5, 12)
    results = [run(open_engine(tiny_llama[0], steps_per_dispatch=steps), prompts, rows, 16) for steps in (1, 3, 8)]
    assert results[0] == results[1] == results[2]


def test_fewer_tokens_are_the_beginning_of_more(tiny_llama):
    engine = open_engine(tiny_llama[0], steps_per_dispatch=3)
    prompts = prompts_of(5, 12)
    most = run(engine, prompts, new=9)
    for new in (1, 2, 3, 4, 5, 8):
        assert run(engine, prompts, new=new) == [row[:new] for row in most]


def test_generation_fills_the_model_to_its_last_position(engine):
    (prompt,) = prompts_of(MAX_POSITIONS - 5)
    tokens = run(engine, [prompt], new=5)
    assert tokens == [engine.logits([prompt + tokens[0]])[0, -6:-1].argmax(-1).tolist()]


def test_generation_stops_when_its_iterator_is_closed(engine):
    blocks = engine.generate(prompts_of(5), [GREEDY], 400)
    assert next(blocks).shape == (1, 1)
    assert next(blocks).shape == (1, engine.steps_per_dispatch)
    blocks.close()
    assert list(blocks) == []


# Compilation.


def test_nothing_compiles_after_the_first_call(tiny_llama, xla_compilations):
    engine = open_engine(tiny_llama[0])
    for lengths, rows in (((5, 12), [GREEDY, GREEDY]), ((20,), [PENALISED])):
        run(engine, prompts_of(*lengths), rows)
        engine.logits(prompts_of(*lengths))
    known = list(engine.compiled)
    assert known
    assert xla_compilations
    xla_compilations.clear()
    for seed in range(1, 4):
        for lengths, rows in (((16, 1), [GREEDY, GREEDY]), ((31,), [SAMPLED_AND_PENALISED])):
            run(engine, prompts_of(*lengths, seed=seed), rows)
            engine.logits(prompts_of(*lengths, seed=seed))
    assert engine.compiled == known
    assert xla_compilations == []


def test_other_lengths_of_text_compile_nothing(tiny_llama, xla_compilations):
    """The same buckets and cache serve every max_new_tokens, chunked prompts too."""
    engine = open_engine(tiny_llama[0], lengths="16,32/auto", steps_per_dispatch=4)
    run(engine, prompts_of(70), new=9)
    known = list(engine.compiled)
    xla_compilations.clear()
    for new in (1, 5, 8, 10, 11, 12):
        run(engine, prompts_of(80, seed=new), new=new)
    assert engine.compiled == known
    assert xla_compilations == []


@pytest.mark.parametrize("new", [1, 9, 12])
def test_compiled_lists_all_that_is_compiled(tiny_llama, xla_compilations, new):
    jax.clear_caches()  # what other tests have compiled counts here as well
    engine = open_engine(tiny_llama[0])
    xla_compilations.clear()
    run(engine, prompts_of(5, 7), [GREEDY, PENALISED], new)
    engine.logits(prompts_of(6))
    assert len(xla_compilations) == len(engine.compiled)


def test_compilation_is_logged(tiny_llama, caplog):
    engine = open_engine(tiny_llama[0])
    with caplog.at_level(logging.INFO, "jaxsvd"):
        run(engine, prompts_of(5))
    records = [record for record in caplog.records if record.name == "jaxsvd" and "compiled" in record.message]
    assert len(records) == len(engine.compiled)
    assert {record.levelno for record in records} == {logging.INFO}
    for step, record in zip(engine.compiled, records, strict=True):
        assert step.name in record.message
        assert step.seconds > 0
    names = " ".join(step.name for step in engine.compiled)
    assert all(word in names for word in ("prefill of 16", "cache 128 of 16", "first token", "decode of 8"))


def test_caches_are_donated(tiny_llama, monkeypatch):
    """Neither a decode nor an extension keeps the cache that it was given: memory holds one."""
    engine = open_engine(tiny_llama[0], lengths="16/auto", steps_per_dispatch=2)
    inner, seen = engine._run, []

    def watched(call):
        result = inner(call)
        old = [leaf for leaf in jax.tree.leaves(call.args[1:]) if isinstance(leaf, jax.Array) and leaf.ndim == 3]
        seen.append((call.step.__name__, [leaf.is_deleted() for leaf in old]))
        return result

    monkeypatch.setattr(engine, "_run", watched)
    run(engine, prompts_of(40), [PENALISED], 7)
    for name, count in (("decode", 3), ("extend", 2)):
        deleted = [flags for step, flags in seen if step == name]
        assert len(deleted) == count
        assert all(len(flags) == 4 and all(flags) for flags in deleted)  # keys and values of two layers
    assert not any(leaf.is_deleted() for leaf in engine.leaves)


def test_a_cache_is_as_long_as_its_text(tiny_llama):
    """Each step attends to the smallest bucket that holds the text so far, whatever is still to come."""
    engine = open_engine(tiny_llama[0], lengths="16,32/32,64,128", steps_per_dispatch=4)
    (tokens,) = run(engine, prompts_of(20), new=100)
    names = [step.name for step in engine.compiled if step.name.startswith("decode")]
    assert names == [f"decode of 4 tokens, cache {capacity}" for capacity in (32, 64, 128)]
    assert tokens == run(open_engine(tiny_llama[0], lengths="off"), prompts_of(20), new=100)[0]


def test_a_cache_grows_layer_by_layer(tiny_llama, monkeypatch):
    engine = open_engine(tiny_llama[0], lengths="16/16,32")
    inner, alive = engine._run, []

    def watched(call):
        if call.step.__name__ == "grow":
            alive.append(sum(array.shape[1] == 16 for array in jax.live_arrays() if array.ndim == 3))
        return inner(call)

    monkeypatch.setattr(engine, "_run", watched)
    others = sum(array.shape[1] == 16 for array in jax.live_arrays() if array.ndim == 3)
    run(engine, prompts_of(16), new=5)
    assert [count - others for count in alive] == [4, 3, 2, 1]


def test_calls_are_all_that_generate_runs(tiny_llama):
    engine = open_engine(tiny_llama[0], lengths="16,32/48,64,128", steps_per_dispatch=3)
    for call in engine.calls(2, MODES.values()):
        assert call.key not in engine._steps
        compiled = engine.compile(call)
        assert compiled.out_tree == jax.tree.structure(call.gives)
        engine._steps[call.key] = compiled
    known = list(engine.compiled)
    for length in (1, 16, 17, 31, 32, 33, 48, 49, 64, 65, 97, 120):
        for rows in ([GREEDY, GREEDY], [GREEDY, SAMPLED], [SAMPLED_AND_PENALISED, GREEDY]):
            run(engine, prompts_of(length, 5), rows, new=min(40, 128 - length))
    assert engine.compiled == known


def test_step_bytes_are_weights_and_cache(engine):
    weights = sum(leaf.nbytes for leaf in engine.leaves)
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, bytes
    assert engine.step_bytes(0) == weights
    assert engine.step_bytes(10) == weights + 10 * per_token


# What is refused.


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 1, "no prompt"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1, 128]], 1, "token id 128.*0 to 127"),
        ([[3], [1, -1]], 1, "prompt 1 has token id -1"),
        ([[1, 2**40]], 1, f"token id {2**40}"),
        ([[1] * (MAX_POSITIONS - 4)], 5, "room for 512"),
        ([[1], [1] * (MAX_POSITIONS + 1)], 1, "prompt 1 has 513 tokens"),
        ([[1]], 0, "max_new_tokens is 0"),
        ([[1]], -3, "max_new_tokens is -3"),
    ],
)
def test_bad_prompts(engine, prompts, new, message):
    with pytest.raises(UsageError, match=message):
        next(engine.generate(prompts, [GREEDY] * len(prompts), new))


def test_bad_prompts_for_logits(engine):
    for prompts, message in (([], "no prompt"), ([[]], "empty"), ([[128]], "128"), ([[1] * 513], "room for 512")):
        with pytest.raises(UsageError, match=message):
            engine.logits(prompts)


def test_bad_buckets(tiny_llama):
    with pytest.raises(UsageError, match="buckets are '32,16'"):
        open_engine(tiny_llama[0], lengths="32,16")


def test_buckets_bound_the_text(tiny_llama):
    engine = open_engine(tiny_llama[0], lengths="16,32/64")
    run(engine, prompts_of(54), new=10)
    with pytest.raises(
        UsageError, match=r"54 tokens and 11 are to follow: the buckets have room for 64.*longer buckets"
    ):
        run(engine, prompts_of(54), new=11)
    with pytest.raises(UsageError, match="65 tokens: the buckets have room for 64"):
        engine.logits(prompts_of(65))


def test_bad_steps_per_dispatch(tiny_llama):
    with pytest.raises(UsageError, match="steps_per_dispatch"):
        open_engine(tiny_llama[0], steps_per_dispatch=0)
    for steps in (0, -1):
        with pytest.raises(UsageError, match="steps_per_dispatch"):
            jaxsvd.load(tiny_llama[0], steps_per_dispatch=steps)


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"dtype": 5}, {"dtype": np.float64}, {"dtype": "bf16"}], ids=str
)
def test_unknown_dtypes(tiny_llama, options):
    with pytest.raises(UsageError, match=r"there is no dtype.*float32, bfloat16"):
        jaxsvd.load(tiny_llama[0], **options)


def test_unknown_backend(tiny_llama):
    with pytest.raises(UsageError, match="there is no backend 'cuda'"):
        jaxsvd.load(tiny_llama[0], backend="cuda")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1, 2], {"max_new_tokens": 0}, "max_new_tokens"),
        ([], {}, "prompt"),
        ([[]], {}, "empty"),
        ([[1, 2], []], {}, "empty"),
        ([1.5, 2.5], {}, "prompt"),
        ([True, False], {}, "prompt"),
        (np.zeros((2, 2, 2), int), {}, "prompt"),
        ([[1, [2, 3]]], {}, "prompt"),
        (5, {}, "prompts must be"),
        ({"role": "user"}, {}, "prompts must be"),
        ([1, 2], {"temprature": 1.0}, "temprature"),
        ([1, 2], {"temperature": -1.0}, "temperature"),
        ([1, 2], {"temperature": [1.0, 2.0]}, "temperature has 2 values for 1"),
        ([1, 2], {"stop": ""}, "stop"),
        ([1, 2], {"stop": ["a", ""]}, "stop"),
        ([1, 2], {"stop": [3]}, "stop"),
        ([1, 2], {"stop_token_ids": [1.5]}, "stop_token_ids"),
        ([1, 2], {"stop_token_ids": ["a"]}, "stop_token_ids"),
        ([1, 500], {}, "500"),
    ],
    ids=str,
)
def test_bad_calls(lm, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        lm.generate(prompt, **options)


def test_text_without_a_tokenizer(lm):
    for prompt, options in (("text", {}), ([{"role": "user", "content": "Hi"}], {}), ([1, 2], {"stop": "x"})):
        with pytest.raises(jaxsvd.ModelError, match="tokenizer"):
            lm.generate(prompt, **options)


# The ends of texts.


def copy_with(folder, target, name="generation_config.json", **changes):
    """A copy of a model folder, one of its JSON files changed."""
    shutil.copytree(folder, target)
    path = target / name
    raw = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | changes), "utf-8")
    return target


PROMPT = prompts_of(9, seed=4)[0]


def test_without_an_end_token_a_text_has_its_length(lm):
    completion = lm.generate(PROMPT, max_new_tokens=21)
    assert len(completion.token_ids) == 21
    assert (completion.finish_reason, completion.text) == ("length", "")


def first_index(tokens, least):
    """An index of at least `least` where a token occurs for the first time."""
    return next(i for i in range(least, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_of_the_model(lm, tiny_llama, tmp_path, name):
    tokens = lm.generate(PROMPT, max_new_tokens=20).token_ids
    at = first_index(tokens, 3)
    folder = copy_with(tiny_llama[0], tmp_path / "model", name, eos_token_id=[127 - tokens[at], tokens[at]])
    if name == "config.json":
        (folder / "generation_config.json").unlink(missing_ok=True)
    ending = jaxsvd.load(folder)
    completion = ending.generate(PROMPT, max_new_tokens=20)
    wanted = next(i for i, token in enumerate(tokens) if token in (tokens[at], 127 - tokens[at]))
    assert completion.token_ids == tokens[: wanted + 1]
    assert completion.finish_reason == "stop"
    ignoring = ending.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert (ignoring.token_ids, ignoring.finish_reason) == (tokens, "length")


def test_generation_config_is_asked_before_config(lm, tiny_llama, tmp_path):
    tokens = lm.generate(PROMPT, max_new_tokens=20).token_ids
    folder = copy_with(tiny_llama[0], tmp_path / "model", "config.json", eos_token_id=tokens[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[first_index(tokens, 3)]}))
    assert len(jaxsvd.load(folder).generate(PROMPT, max_new_tokens=20).token_ids) == first_index(tokens, 3) + 1


def test_stop_token_ids(lm):
    tokens = lm.generate(PROMPT, max_new_tokens=20).token_ids
    at = first_index(tokens, 4)
    completion = lm.generate(PROMPT, max_new_tokens=20, stop_token_ids=[tokens[at]])
    assert (completion.token_ids, completion.finish_reason) == (tokens[: at + 1], "stop")
    # The last token that is allowed may be the one that stops.
    completion = lm.generate(PROMPT, max_new_tokens=at + 1, stop_token_ids=[tokens[at]], ignore_eos=True)
    assert (len(completion.token_ids), completion.finish_reason) == (at + 1, "stop")


def test_rows_end_one_by_one(lm):
    prompts = [PROMPT, *prompts_of(5, 13)]
    free = [completion.token_ids for completion in lm.generate(prompts, max_new_tokens=20)]
    stop = free[0][first_index(free[0], 2)]
    for tokens, completion in zip(free, lm.generate(prompts, max_new_tokens=20, stop_token_ids=[stop]), strict=True):
        wanted = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert completion.token_ids == wanted
        assert completion.finish_reason == ("stop" if stop in tokens else "length")


# Weights that are finite but too large.


def scaled(folder, target, factors):
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = {name: np.array(array) for name, array in load_file(path).items()}
    for name, factor in factors.items():
        tensors[name] *= np.float32(factor)
    assert all(np.isfinite(array).all() for array in tensors.values())
    save_file(tensors, path, metadata={"format": "pt"})
    return target


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    "factors",
    [
        {"model.norm.weight": 1e38, "model.embed_tokens.weight": 100},
        {f"{LAYER}.mlp.up_proj.weight": 1e30, f"{LAYER}.mlp.gate_proj.weight": 1e30},
        {f"{LAYER}.self_attn.q_proj.weight": 1e30, f"{LAYER}.self_attn.k_proj.weight": 1e30},
        {f"{LAYER}.mlp.down_proj.weight": 1e30},
        {"model.embed_tokens.weight": 1e30},
    ],
    ids=lambda factors: " and ".join(name.removeprefix("model.") for name in factors),
)
def test_overflow_is_an_error(tiny_llama, tmp_path, factors):
    lm = jaxsvd.load(scaled(tiny_llama[0], tmp_path / "model", factors))
    with pytest.raises(JaxsvdError, match="not numbers"):
        lm.generate(PROMPT, max_new_tokens=5)


# The calls of a notebook.


def test_prompts_of_every_kind_of_ids(lm):
    wanted = lm.generate(PROMPT, max_new_tokens=5)
    assert isinstance(wanted, jaxsvd.Completion)
    for one in (tuple(PROMPT), np.array(PROMPT), np.array(PROMPT, np.uint8), jnp.array(PROMPT)):
        assert lm.generate(one, max_new_tokens=5).token_ids == wanted.token_ids
    for several in ([PROMPT, PROMPT], np.array([PROMPT, PROMPT]), [np.array(PROMPT), tuple(PROMPT)]):
        completions = lm.generate(several, max_new_tokens=5)
        assert [completion.token_ids for completion in completions] == [wanted.token_ids] * 2
    assert len(lm.generate([PROMPT], max_new_tokens=5)) == 1


def test_logits_of_every_kind_of_ids(lm):
    wanted = lm.logits(PROMPT)
    assert (wanted.shape, wanted.dtype) == ((1, 9, 128), np.float32)
    for ids in (np.array(PROMPT), [PROMPT], np.array([PROMPT]), (tuple(PROMPT),)):
        np.testing.assert_array_equal(lm.logits(ids), wanted)
    ragged = lm.logits([PROMPT, PROMPT[:4]])
    np.testing.assert_allclose(ragged[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(ragged[1, :4], wanted[0, :4], atol=1e-5)
    assert not ragged[1, 4:].any()


def test_options_per_row(lm):
    prompts = [PROMPT, *prompts_of(5, 13)]
    together = lm.generate(prompts, max_new_tokens=8, temperature=[0.0, 1.0, 1.0], seed=[0, 1, 2], top_p=0.9)
    for i, options in enumerate([{}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2}]):
        alone = lm.generate(prompts[i], max_new_tokens=8, top_p=0.9, **options)
        assert alone.token_ids == together[i].token_ids


def test_load_by_dtype(tiny_llama):
    wanted = jaxsvd.load(tiny_llama[0]).logits(PROMPT)
    for dtype in ("bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16), "float16"):
        lm = jaxsvd.load(tiny_llama[0], dtype=dtype)
        assert {leaf.dtype for leaf in lm.engine.leaves} == {jnp.dtype(dtype)}
    assert np.abs(lm.logits(PROMPT) - wanted).max() < 0.1 * np.abs(wanted).max()
    assert len(jaxsvd.load(tiny_llama[0], dtype="bfloat16").generate(PROMPT, max_new_tokens=9).token_ids) == 9


@pytest.mark.parametrize("new", [1, 2, 40])
def test_statistics_are_plausible(tiny_llama, new):
    lm = jaxsvd.load(tiny_llama[0], buckets="16/32,64")  # some texts move to a longer cache, which compiles
    cold = lm.generate([PROMPT, PROMPT[:4]], max_new_tokens=new)[1].stats
    warm = lm.generate([PROMPT, PROMPT[:4]], max_new_tokens=new)[1].stats
    assert cold.compile_seconds > 0
    assert warm.compile_seconds == 0
    for stats in (cold, warm):
        assert (stats.prompt_tokens, stats.new_tokens) == (13, 2 * new)
        assert stats.load_seconds == lm.load_seconds > 0
        assert 0 < stats.first_token_seconds <= stats.total_seconds - stats.compile_seconds
        rest = stats.total_seconds - stats.compile_seconds - stats.first_token_seconds
        if new == 1:
            assert (stats.decode_tokens_per_second, stats.bandwidth) == (0, 0)
        else:
            assert stats.decode_tokens_per_second == pytest.approx(2 * (new - 1) / rest, rel=0.05)
            assert stats.bandwidth == pytest.approx(stats.bytes_per_step * (new - 1) / rest, rel=0.05)
        assert stats.bytes_per_step == lm.engine.step_bytes(13 + 2 * new)
        assert stats.peak_bytes > 10**7


# SmolLM2's tokenizer, and two of its layers: they write nonsense, of every kind of token.


def test_load_and_generate(source, smol):
    prompt = "The capital of France is"
    text = jaxsvd.load_and_generate(source, prompt, dtype="float32", progress=False, max_new_tokens=6)
    assert text == smol.generate(prompt, max_new_tokens=6).text


CHAT = [{"role": "user", "content": "Name three primary colours."}]


def test_strings_chats_and_ids_in_one_batch(smol):
    ids = smol.encode("Once upon a time")
    together = smol.generate(["Once upon a time", CHAT, ids], max_new_tokens=12)
    assert [completion.token_ids for completion in together[:1]] == [together[2].token_ids]
    assert together[0].text == smol.tokenizer.decode(together[0].token_ids)
    alone = smol.generate(CHAT, max_new_tokens=12)
    assert (alone.text, alone.token_ids) == (together[1].text, together[1].token_ids)
    assert isinstance(smol.generate([CHAT], max_new_tokens=1), list)


@pytest.mark.parametrize("prompt", ["Write three emoji: 🙂", CHAT, "def fibonacci(n):\n"], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 1, "stop": ["\n", "."]}], ids=str)
def test_a_stream_joins_to_the_text(smol, prompt, options):
    pieces = list(smol.stream(prompt, max_new_tokens=24, **options))
    assert "".join(pieces) == smol.generate(prompt, max_new_tokens=24, **options).text
    assert all(pieces)


def test_a_chat_ends_by_itself(smollm):
    completion = jaxsvd.load(smollm).generate(
        [{"role": "user", "content": "What is 2+2? Answer with one number."}], 100
    )
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == 2
    assert "<|im_end|>" not in completion.text


def test_stop_strings_span_tokens(smol):
    prompt = "The first five numbers are one,"
    free = smol.generate(prompt, max_new_tokens=20)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    stop = free.text[7:12]  # somewhere, whatever the tokens
    completion = smol.generate(prompt, max_new_tokens=20, stop=["never there", stop])
    assert completion.text == free.text[: free.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
    assert len(completion.token_ids) < 20
    # What was held back for a stop string that did not come is there in the end.
    held = smol.generate(prompt, max_new_tokens=20, stop=free.text[-3:] + "never")
    assert (held.text, held.finish_reason) == (free.text, "length")


def test_an_empty_text_is_no_prompt(smol):
    with pytest.raises(UsageError, match="empty"):
        smol.generate("")
