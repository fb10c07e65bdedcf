"""Checking accuracy, on models: what passes, what fails and is located, what is kept in golden files."""

import json
import logging
import math
import shutil
import sys

import numpy as np
import pytest
from evaluating import copy_model, write_tokenizer
from factored import mixed_ranks, read_config, read_tensors, write_factored, write_folder
from graphs import SHAPES, abstract_engine, cache_of, lint, shaped
from safetensors.numpy import load_file, save_file
from tiny import make_tiny, open_engine, prompts_of

import jaxsvd
from jaxsvd import cli
from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.errors import JaxsvdError, ModelError, UsageError
from jaxsvd.evaluate import accuracy, locate, reference, torch_reference
from jaxsvd.evaluate.matching import Tolerance

TIGHT = [Tolerance(None, 0.0, 1e-4)]
PROMPTS = ["Four score and seven", "nation"]
UP = "model.layers.1.mlp.up_proj"


def run(*arguments):
    return cli.run("check-accuracy", [str(argument) for argument in arguments])


def answer(capfd):
    return json.loads(capfd.readouterr().out)


@pytest.fixture(scope="module")
def low(worded, tmp_path_factory):
    """A copy of the worded model with matrices of many ranks, and its own tokenizer."""
    folder = tmp_path_factory.mktemp("low") / "model"
    write_factored(worded[0], folder, mixed_ranks(read_tensors(worded[0])))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def plant(monkeypatch):
    """Have models that are loaded to be tested multiply one projection by something, as a broken kernel would."""

    def planted(path, factor):
        load, matrix = jaxsvd.api.load, CheckpointWeights.matrix

        def wrong(self, name, *shape):
            found, bias = matrix(self, name, *shape)
            if name != path:
                return found, bias
            return type(found)(*found[:-1], (found[-1] * np.float32(factor)).astype(found[-1].dtype)), bias

        def load_wrongly(*args):
            with monkeypatch.context() as patch:
                patch.setattr(CheckpointWeights, "matrix", wrong)
                return load(*args)

        monkeypatch.setattr("jaxsvd.api.load", load_wrongly)

    return planted


# The decode path, token by token.


def greedy(_, logits):
    return logits.argmax(-1)


@pytest.fixture(scope="module")
def chunked(tiny_llama):
    return open_engine(tiny_llama[0], lengths="16/auto")


def check_steps(engine, prompts, logits, text):
    """The logits before each token of the text are those that the model has when it reads it all at once."""
    whole = engine.logits([prompt + row.tolist() for prompt, row in zip(prompts, text, strict=True)])
    for row, expected, prompt in zip(logits, whole, prompts, strict=True):
        np.testing.assert_allclose(row, expected[len(prompt) - 1 : len(prompt) + len(row) - 1], atol=2e-4)


def test_following_the_likeliest_is_generating(chunked):
    """`test_a_low_rank_model_is_what_its_reference_says` has the tokens of `generate`."""
    prompts = prompts_of(40, 3)
    logits = np.stack(list(chunked.follow(prompts, 6, greedy)), axis=1)
    check_steps(chunked, prompts, logits, logits.argmax(-1))


def test_a_forced_text_is_what_the_model_sees(chunked):
    prompts, text, seen = prompts_of(40, 3, seed=1), np.array(prompts_of(6, 6, seed=9)), []

    def force(i, logits):
        seen.append(logits)
        return text[:, i]

    found = np.stack(list(chunked.follow(prompts, 6, force)), axis=1)
    np.testing.assert_array_equal(np.stack(seen, 1), found[:, :5])  # the last needs no choice
    check_steps(chunked, prompts, found, text)


def test_following_has_the_limits_of_generating(tiny_llama):
    engine = open_engine(tiny_llama[0], lengths="16/auto")
    assert len(list(engine.follow(prompts_of(500), 12, greedy))) == 12
    for prompts, count, words in (
        (prompts_of(500), 13, "room for 512"),
        ([[]], 1, "empty"),
        (prompts_of(3), 0, "is 0"),
    ):
        with pytest.raises(UsageError, match=words):
            list(engine.follow(prompts, count, greedy))
    engine.leaves[0] = engine.leaves[0] * np.nan
    with pytest.raises(JaxsvdError, match="not numbers"):
        list(engine.follow(prompts_of(3), 1, greedy))


def test_the_step_compiles_for_neuron():
    import jax

    engine = abstract_engine(SHAPES["llama-3.2-1b"], 0.8)
    step = jax.jit(engine.decode_logits, donate_argnums=(1,))
    assert lint(step.trace(engine.leaves, cache_of(engine, 128), shaped((2,)))) == []


# Models end to end.


@pytest.mark.parametrize("source", reference.SOURCES)
def test_a_low_rank_model_is_what_its_reference_says(low, source):
    found = accuracy.check(low, "logits", PROMPTS, 6, source=source, tolerances=TIGHT, progress=False)
    assert found.passed and found.matching and not found.suspects
    assert [len(row) for row in found.matching.tokens] == [6, 6]
    assert found.deviations[0].error < 1e-5
    assert source in found.reference.source or found.reference.source == reference.REFERENCE
    tokens = accuracy.check(low, "tokens", PROMPTS, 6, source=source, progress=False)
    assert tokens.passed and tokens.differences == []


@pytest.mark.parametrize("source", reference.SOURCES)
def test_no_text_ends_early(low, tmp_path, source):
    """The tokens that end a text count on neither side, as where transformers is told of min_new_tokens."""
    usual = accuracy.check(low, "logits", PROMPTS, 3, progress=False).reference.tokens
    folder, end = tmp_path / "model", int(usual[0, 1])
    shutil.copytree(low, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 10**6]}))
    found = accuracy.check(folder, "logits", PROMPTS, 3, source=source, tolerances=TIGHT, progress=False)
    assert end in usual and end not in found.reference.tokens
    assert np.isneginf(found.reference.logits[..., end]).all()
    assert found.passed and all(token.actual != end for row in found.matching.tokens for token in row)
    # The text as it is generated ends where the reference goes on: there is nothing to compare behind that.
    assert accuracy.check(folder, "tokens", PROMPTS, 3, source=source, progress=False).differences == []


@pytest.mark.parametrize("kind", ["qwen3", "llama-biased"])
def test_transformers_and_xla_agree(kind, tmp_path):
    model = make_tiny(kind, tmp_path)
    checkpoint, prompts = Checkpoint(tmp_path), prompts_of(9, 2)
    ours, theirs = (reference.compute(checkpoint, ["", ""], prompts, 5, source) for source in reference.SOURCES)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-4)
    ids = prompts[1] + theirs.tokens[1].tolist()
    import torch

    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, 1:-1].numpy()
    np.testing.assert_allclose(theirs.logits[1], expected, atol=1e-4)


def test_transformers_gets_narrowed_mlps_their_width_back(worded, tmp_path):
    """Zeros in the place of the neurons that are gone change nothing."""
    tensors, config = read_tensors(worded[0]), read_config(worded[0])
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = tensors[f"model.layers.0.mlp.{name}_proj.weight"][:40]
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"][:, :40]
    config["low_rank"] = {"format_version": 1, "ranks": {}, "widths": {"model.layers.0.mlp": 40}}
    checkpoint = Checkpoint(write_folder(tmp_path / "narrow", tensors, config))
    ours, theirs = (reference.compute(checkpoint, [""], [[5, 6, 7]], 4, source) for source in reference.SOURCES)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-4)


@pytest.mark.parametrize("path", [UP, "model.layers.0.self_attn.k_proj"])
def test_a_planted_error_fails_and_is_located(low, plant, capfd, path):
    plant(path, 1.03)
    assert run(low, "-p", PROMPTS[0], "-p", PROMPTS[1], "--num-tokens", 4, "--tol", "all:0:1e-4", "-q") == 1
    out, err = capfd.readouterr()
    assert "FAILED: prompt 0, new token 0" in out
    assert f"{path} alone deviates from its weights by 0.03 (bound 0.02)" in out
    assert len(err.splitlines()) == 1 and path in err


def test_an_error_that_logits_do_not_show_fails_all_the_same(low, plant):
    plant(UP, 1.03)
    loose = [Tolerance(None, 0.0, 0.5)]
    found = accuracy.check(low, prompts=PROMPTS, count=2, tolerances=loose, divergence=9.0, progress=False)
    assert found.matching and found.matching.passed and not found.passed
    assert [suspect.path for suspect in found.suspects] == [UP]
    assert accuracy.check(
        low, prompts=PROMPTS, count=2, tolerances=loose, divergence=9.0, projection_tolerance=math.inf, progress=False
    ).passed


def test_an_mlp_is_blamed_where_none_of_its_projections_is():
    found = [locate.Deviation(path, error) for path, error in (("a.mlp", 0.5), ("a.mlp.up_proj", 0.01), ("b.mlp", 0.3))]
    assert [suspect.path for suspect in locate.suspects(found, 0.02)] == ["a.mlp", "b.mlp"]
    found.append(locate.Deviation("b.mlp.up_proj", math.nan))
    assert [suspect.path for suspect in locate.suspects(found, 0.02)] == ["a.mlp", "b.mlp.up_proj"]


def test_what_rounding_does_stays_below_the_tolerance_of_projections(tiny):
    found = locate.deviations(jaxsvd.load(tiny[0], "bfloat16").engine, Checkpoint(tiny[0]))
    assert 1e-4 < found[0].error < locate.PROJECTION_TOLERANCE / 3
    assert {deviation.path for deviation in found} >= Checkpoint(tiny[0]).matrices.keys()


def test_another_model_differs_in_tokens_too(worded, tmp_path, capfd):
    other = tmp_path / "other"
    make_tiny("llama-tied", other, seed=1)
    write_tokenizer(other)
    base = [worded[0], "--against", other, "-p", PROMPTS[0], "-p", PROMPTS[1], "--num-tokens", 5, "-q"]
    assert run(*base, "--mode", "tokens") == 1
    out, _ = capfd.readouterr()
    assert "the same text: 0 of 2" in out and "what compression changes" in out
    assert "FAILED: prompt 0, new token 0:" in out and "(2 of 2 texts differ)" in out
    assert run(*base, "--mode", "tokens", "--json") == 1
    found = answer(capfd)
    assert (found["mode"], found["measures"], found["against"]) == ("tokens", "compression", str(other))
    expected, actual = (
        [completion.token_ids for completion in jaxsvd.load(folder).generate(PROMPTS, 5, ignore_eos=True)]
        for folder in (other, worded[0])
    )
    assert [row["expected_token_ids"] for row in found["prompts"]] == expected
    for difference, theirs, ours in zip(found["differences"], expected, actual, strict=True):
        at = difference["position"]
        assert theirs[:at] == ours[:at]
        assert (difference["expected"], difference["actual"]) == (theirs[at], ours[at])
    assert run(*base, "--json") == 1
    found = answer(capfd)
    assert found["restarts"] and found["measures"] == "compression" and found["suspects"] == []


def test_against_the_dense_model_measures_compression(worded, low, capfd):
    base = [low, "-p", PROMPTS[0], "--num-tokens", 3, "--json", "-q"]
    assert run(*base) == 0
    assert answer(capfd)["measures"] == "implementation"
    assert run(*base, "--against", worded[0]) == 1
    found = answer(capfd)
    assert found["measures"] == "compression"
    dense = jaxsvd.load(worded[0]).generate(PROMPTS[0], 3, ignore_eos=True).token_ids
    assert found["prompts"][0]["expected_token_ids"] == dense


# Golden files.


@pytest.fixture(scope="module")
def saved(low, tmp_path_factory):
    file = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    assert run(low, "-p", PROMPTS[0], "-p", PROMPTS[1], "--num-tokens", 5, "--save-golden", file, "-q") == 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    return file


@pytest.fixture
def golden(saved, tmp_path, capfd):
    capfd.readouterr()
    return shutil.copy(saved, tmp_path / saved.name)


def test_a_golden_file_takes_the_place_of_the_reference(low, golden, capfd, monkeypatch):
    monkeypatch.setattr(reference, "compute", lambda *_: pytest.fail("computed"))
    assert run(low, "--golden", golden, "--tol", "all:0:1e-6", "--json", "-q") == 0
    found = answer(capfd)
    assert found["num_tokens"] == 5 and [row["prompt"] for row in found["prompts"]] == PROMPTS
    assert "golden.safetensors" in found["reference"] and "XLA" in found["reference"]
    assert run(low, "--golden", golden, "--num-tokens", 2, "--mode", "tokens", "--json", "-q") == 0
    assert answer(capfd)["num_tokens"] == 2
    assert run(low, "--golden", golden, "--num-tokens", 6, "-q") == 2
    assert "has 5 tokens a prompt: 6 were asked for" in capfd.readouterr().err


def test_a_golden_file_finds_what_has_changed(low, golden, plant, capfd):
    plant(UP, 1.03)
    assert run(low, "--golden", golden, "-q") == 1
    assert UP in capfd.readouterr().out


def test_a_stale_golden_file_is_refused(low, golden, tmp_path, capfd):
    newer = copy_model(low, tmp_path / "newer")
    tensors = read_tensors(newer)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.001)
    save_file(tensors, newer / "model.safetensors")
    assert run(newer, "--golden", golden, "-q") == 2
    assert "its weights have the digest" in capfd.readouterr().err


def test_a_foreign_golden_file_is_refused_but_as_that_of_its_own_model(worded, low, golden, tmp_path, capfd):
    changed = copy_model(low, tmp_path / "changed")
    (changed / "config.json").write_text(json.dumps(read_config(low) | {"rms_norm_eps": 1e-3}))
    assert run(changed, "--golden", golden, "-q") == 2
    assert "its rms_norm_eps is 1e-06, here it is 0.001" in capfd.readouterr().err
    assert run(worded[0], "--golden", golden, "-q") == 2
    assert "--against" in capfd.readouterr().err
    assert run(worded[0], "--golden", golden, "--against", low, "--json", "-q") == 1
    assert answer(capfd)["measures"] == "compression"


def broken(file, change):
    """The golden file with its tensors and metadata changed."""
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    change(tensors, said)
    save_file(tensors, file, metadata=said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, said: said.update(format="x"), "no golden file"),
        (lambda tensors, said: said.pop("digest"), "does not say digest"),
        (lambda tensors, said: said.update(config="{"), "its config can't be read"),
        (lambda tensors, said: said.update(texts='["one"]'), "do not fit together"),
        (lambda tensors, said: tensors.pop("logits"), "do not fit together"),
        (lambda tensors, said: tensors.update(logits=tensors["logits"][:, :, :9].copy()), "do not fit together"),
        (lambda tensors, said: tensors["logits"].fill(np.nan), "not those of its logits"),
        (lambda tensors, said: tensors["tokens"].fill(1), "not those of its logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_golden_file_is_refused(low, golden, change, words):
    broken(golden, change)
    with pytest.raises(UsageError, match=words):
        reference.load_golden(golden, Checkpoint(low))


def test_a_file_that_is_no_golden_file_is_refused(low, tmp_path):
    (tmp_path / "text").write_text("text")
    for file in (low / "model.safetensors", tmp_path / "text", tmp_path / "none"):
        with pytest.raises(UsageError, match="--save-golden"):
            reference.load_golden(file, Checkpoint(low))


def test_a_golden_file_is_whole_or_not_there(low, tmp_path, monkeypatch):
    found = reference.compute(Checkpoint(low), ["a"], [[5]], 1)

    def full(_, path, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space"):
        reference.save_golden(found, Checkpoint(low), tmp_path / "golden.safetensors")
    assert list(tmp_path.iterdir()) == []


# The command.


def test_the_table_says_it_all_and_progress_is_on_stderr(low, capfd):
    assert run(low, "-p", PROMPTS[0], "--num-tokens", 3, "--tol", "all:0:0.5") == 0
    out, err = capfd.readouterr()
    for words in (
        str(low),
        "(XLA, float32 on CPU)",
        "the same checkpoint (XLA, float32 on CPU)",
        "1, 3 new tokens each",
    ):
        assert words in out
    rows = [line.split()[0] for line in out.splitlines() if line.endswith("pass")]
    assert rows == ["k", "divergence", "projection"]
    assert out.splitlines()[-1] == "PASSED" and "compiled logits of one decoded token" in err


def test_every_flag_changes_what_it_says(low, worded, tmp_path, capfd):
    def check(*extra, code=0):
        assert run(low, "--json", "-q", "--num-tokens", 1, *extra) == code
        return answer(capfd)

    base = check()
    assert [row["prompt"] for row in base["prompts"]] == [accuracy.PROMPT]
    assert [(row["k"], row["bound"]) for row in base["tolerances"]] == [
        ("5", 0.01), ("50", 0.02), ("1000", 0.03), ("all", 0.05), ("divergence", 0.001)
    ]  # fmt: skip
    assert (base["subject"], base["reference"], base["passed"]) == (reference.REFERENCE, reference.REFERENCE, True)
    (tmp_path / "prompt").write_text("nation")
    rules = ("--tol", "all:0:0.1", "--tol", "7:0.5:0.2", "--divergence-tol", 0.3, "--projection-tol", 0.7)
    found = check("--prompt", PROMPTS[0], "--prompt-file", tmp_path / "prompt", "--num-tokens", 3, *rules)
    assert [row["prompt"] for row in found["prompts"]] == PROMPTS and found["num_tokens"] == 3
    assert [(row["k"], row["atol"], row["bound"]) for row in found["tolerances"]] == [
        ("7", 0.5, 0.2), ("all", 0, 0.1), ("divergence", None, 0.3)
    ]  # fmt: skip
    assert found["projection_tolerance"] == 0.7
    found = check("--tol-map", "{5: (1e-5, 0.02)}", "--divergence-tol", 0.005, "--reference", "transformers")
    assert [(row["k"], row["bound"]) for row in found["tolerances"]] == [("5", 0.02), ("divergence", 0.005)]
    assert "transformers" in found["reference"]
    assert check("--mode", "tokens")["differences"] == []
    loose = ("--tol", "all:0:0.5", "--divergence-tol", 9)
    found = check("--round-weights", "bfloat16", *loose)
    assert found["subject"] == "XLA, float32 on CPU, weights rounded to bfloat16"
    assert 1e-5 < found["tolerances"][0]["max_error"] < 0.05 and 1e-3 < found["projections"][0]["error"] < 0.02
    assert check("--round-weights", "float16", *loose)["projections"][0]["error"] < found["projections"][0]["error"] / 4
    strict = check("--dtype", "bfloat16", "--projection-tol", 1e-6, *loose, code=1)
    assert strict["subject"] == "XLA, bfloat16 on CPU" and len(strict["suspects"]) > 2


def test_json_has_every_token(low, capfd):
    assert (
        run(low, "-p", PROMPTS[0], "-p", PROMPTS[1], "--num-tokens", 4, "--round-weights", "float16", "--json", "-q")
        == 0
    )
    found = answer(capfd)
    assert [len(row) for row in found["tokens"]] == [4, 4]
    for i, row in enumerate(found["tolerances"][:-1]):
        errors = [token["errors"][row["k"]] for tokens in found["tokens"] for token in tokens]
        assert row["max_error"] == max(errors) > 0, i
        assert row["mean_error"] == pytest.approx(np.mean(errors))
        assert found["tokens"][row["prompt"]][row["position"]]["errors"][row["k"]] == row["max_error"]
    assert [[token["expected"] for token in row] for row in found["tokens"]] == [
        row["expected_token_ids"] for row in found["prompts"]
    ]


def test_the_backend_arrives(low, monkeypatch):
    seen, load = [], jaxsvd.api.load
    monkeypatch.setattr("jaxsvd.api.load", lambda *args: seen.append(args[1:3]) or load(*args))
    assert run(low, "--num-tokens", 1, "--backend", "xla", "--dtype", "float32", "-q") == 0
    assert seen == [("float32", "xla")]


def test_a_check_that_can_not_fail_says_so(low, caplog):
    with caplog.at_level(logging.WARNING, "jaxsvd"):
        accuracy.check(low, count=1, source="transformers", progress=False)
        assert not caplog.records
        accuracy.check(low, count=1, progress=False)
    assert "they can't differ" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "--mode", "vibes"], "logits, tokens"),
        (["MODEL", "--mode", "tokens", "--tol", "5:0:1"], "belong to --mode logits"),
        (["MODEL", "--mode", "tokens", "--divergence-tol", "0.1"], "belong to --mode logits"),
        (["MODEL", "--mode", "tokens", "--projection-tol", "0.1"], "belong to --mode logits"),
        (["MODEL", "--tol", "5:0"], "K:ATOL:RTOL"),
        (["MODEL", "--tol", "5:0:1", "--tol", "5:0:2"], "given twice"),
        (["MODEL", "--tol-map", "{}"], "no tolerance"),
        (["MODEL", "--divergence-tol", "nan"], "divergence tolerance is nan"),
        (["MODEL", "--projection-tol", "-1"], "projections' tolerance is -1"),
        (["MODEL", "--num-tokens", "0"], "number of tokens is 0"),
        (["MODEL", "--num-tokens", "600"], "room for 512"),
        (["MODEL", "-p", " "], "prompt is empty"),
        (["MODEL", "--reference", "oracle"], "jaxsvd, transformers"),
        (["MODEL", "--golden", "none.safetensors"], "can't be read"),
        (["MODEL", "--golden", "none.safetensors", "-p", "x"], "has its own prompts"),
        (["MODEL", "--golden", "none.safetensors", "--save-golden", "x.safetensors"], "has its own prompts"),
        (["MODEL", "--save-golden", "golden.npz"], ".safetensors"),
        (["MODEL", "--save-golden", "/no/such/folder/x.safetensors"], "no folder"),
        (["MODEL", "--round-weights", "int8"], "bfloat16, float16"),
        (["MODEL", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["MODEL", "--backend", "abacus"], "backend"),
        (["MODEL", "--against", "no-such-model"], "no-such-model"),
        (["no-such-model"], "qwen3-4b"),
        (["TINY"], "tokenizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    low, tiny_llama, tmp_path, capfd, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": low, "TINY": tiny_llama[0]}
    assert run(*[named.get(argument, argument) for argument in arguments], "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and "Traceback" not in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_models_of_other_tokens_are_refused(low, worded, tmp_path):
    from string import printable

    other = copy_model(worded[0], tmp_path / "other")
    write_tokenizer(other, order=printable[::-1])
    with pytest.raises(UsageError, match="other tokenizers"):
        accuracy.check(low, against=other, count=1)
    bigger = tmp_path / "bigger"
    shutil.copytree(other, bigger)
    tensors = read_tensors(bigger)
    tensors["model.embed_tokens.weight"] = np.repeat(tensors["model.embed_tokens.weight"], 2, 0)
    write_folder(bigger, tensors, read_config(bigger) | {"vocab_size": 256})
    with pytest.raises(UsageError, match="vocabularies of 128 and 256"):
        accuracy.check(low, against=bigger, count=1)


def test_without_torch_the_reference_transformers_is_refused(low, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(low, "--reference", "transformers", "-q") == 2
    assert "take the reference jaxsvd" in capfd.readouterr().err


def test_without_a_cpu_there_is_no_reference(low, monkeypatch):
    def devices(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr("jax.devices", devices)
    with pytest.raises(UsageError, match="cuda,cpu"):
        reference.compute(Checkpoint(low), ["a"], [[5]], 1)


def test_weights_too_large_to_be_rounded_are_refused(worded, tmp_path):
    big = copy_model(worded[0], tmp_path / "big")
    tensors = read_tensors(big)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, big / "model.safetensors")
    with pytest.raises(UsageError, match="too large for float16"):
        accuracy.check(big, count=1, round_weights="float16", progress=False)


def test_torch_tensors_are_those_of_the_checkpoint(low, worded):
    dense = torch_reference.dense_tensors(Checkpoint(worded[0]))
    for name, array in read_tensors(worded[0]).items():
        np.testing.assert_array_equal(dense[name], array)
    assert torch_reference.dense_tensors(Checkpoint(low)).keys() == dense.keys()


def test_a_golden_file_of_another_model_is_a_model_error(worded, golden):
    with pytest.raises(ModelError, match="golden for the model model"):
        reference.load_golden(golden, Checkpoint(worded[0]))


# A real model.


@pytest.mark.slow
def test_smollm_low_rank_with_rounded_weights_passes_the_seeds_map(smollm, tmp_path, capfd, plant):
    """Its factors as float32 numbers that bfloat16 does not have: U·D and D⁻¹·V have the same product."""
    from jaxsvd.demo import get_low_rank_model

    source, folder, rng = get_low_rank_model(), tmp_path / "model", np.random.default_rng(0)
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for path, rank in Checkpoint(source).ranks.items():
        stem, scale = path.removesuffix("_proj"), rng.uniform(0.7, 1.4, rank).astype(np.float32)
        up, down = f"{stem}_u_proj.weight", f"{stem}_v_proj.weight"
        tensors[up] = tensors[up].astype(np.float32) * scale
        tensors[down] = np.ascontiguousarray(tensors[down].astype(np.float32) / scale[:, None])
    save_file(tensors, folder / "model.safetensors")
    base = [folder, "--tol-map", "{5: (1e-5, 0.02)}", "--divergence-tol", 0.005, "--num-tokens", 16, "--json", "-q"]
    prompts = ["The Earth goes around the", "Water boils at", "I believe the meaning of life is"]
    base += [argument for prompt in prompts for argument in ("-p", prompt)]
    golden = tmp_path / "golden.safetensors"
    assert run(*base, "--round-weights", "bfloat16", "--save-golden", golden) == 0
    found = answer(capfd)
    assert found["passed"] and 1e-4 < found["tolerances"][0]["max_error"] < 0.02
    assert found["projections"][0]["error"] > 1e-3
    path = "model.layers.10.mlp.down_proj"
    plant(path, 1.03)
    arguments = [value for value in base if value not in ("-p", *prompts)]
    assert run(*arguments, "--round-weights", "bfloat16", "--golden", golden) == 1
    assert answer(capfd)["suspects"] == [path]
