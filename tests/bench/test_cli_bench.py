"""jaxsvd bench: every flag changes what it says, one object of JSON, errors in one line."""

import dataclasses
import json
import sys

import jax
import pytest
from evaluating import with_rank

from jaxsvd import api, cli, kernels
from jaxsvd.bench import machine, measure

SHORT = ["--prompt", 4, "--new", 4, "--runs", 2, "--warmup", 0, "--bandwidth", 10]


def run(*arguments):
    return cli.run("bench", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def low(tiny_llama, tmp_path_factory):
    """One matrix of rank 16."""
    return with_rank(tiny_llama[0], tmp_path_factory.mktemp("cli") / "low")


@pytest.fixture
def answer(low, capfd):
    """The JSON of a run on `low`, or on the model that is given first."""

    def ask(*arguments, model=low):
        assert run(model, *SHORT, *arguments, "--json", "-q") == 0
        out, err = capfd.readouterr()
        assert err == "" and len(out.splitlines()) == 1
        return json.loads(out)

    return ask


def models_of(found):
    return [(each["role"], each["backend"]) for each in found["batches"][0]["models"]]


def test_the_table_comes_before_the_json(low, tiny_llama, capfd):
    assert run(low, *SHORT, "--compare", tiny_llama[0]) == 0
    out, err = capfd.readouterr()
    *table, last = out.splitlines()
    found = json.loads(last)
    text = "\n".join(table)
    for words in (
        *("first token, ms", "prefill, TFLOP/s", "decode, ms a token", "floor / measured", "generated tokens/s"),
        *("kernels a token", "weights, MB", "step memory, MB", "peak memory", "10.0 GB/s (given)", "low (xla)"),
        *("e2e_model time wo svd:  ", "e2e_model time with svd:  "),
        f"E2E Speedup:  {found['batches'][0]['speedups'][0]['e2e_nxdi']}",
        f"at most {found['batches'][0]['speedups'][0]['byte_ratio_bound']:.3f}",
    ):
        assert words in text, words
    assert "round 2 of 2" in err
    assert "±" in next(line for line in table if line.startswith("end to end"))


def test_the_json_says_what_ran_where(answer, low):
    found = answer()
    assert str(low) in found["command"] and "--bandwidth 10" in found["command"]
    assert found["device"] == jax.local_devices()[0].device_kind and found["versions"]["jax"] == jax.__version__
    assert found["commit"] is None or len(found["commit"]) >= 40
    assert (found["prompt"], found["new"], found["runs"], found["warmup"], found["dtype"]) == (4, 4, 2, 0, "float32")
    (entry,) = found["batches"][0]["models"]
    assert entry["model"] == str(low) and entry["keep"] < 1 < entry["byte_ratio_bound"]
    assert entry["prefill_ms"]["n"] == 2 and entry["prefill_ms"]["deviation"] >= 0
    assert list(entry["nxdi_compat"]) == ["e2e_model", "context_encoding_model", "token_generation_model"]
    assert entry["launches_per_token"] > 10 and entry["step_memory"] > entry["weight_bytes"] > 0
    assert entry["floor_share"] == pytest.approx(entry["floor_ms"] / entry["ms_per_token"]["median"])
    assert found["batches"][0]["speedups"] == [] and found["peak_bytes"] > 0


def test_compare(answer, low, tiny_llama):
    found = answer("--compare", tiny_llama[0])
    assert models_of(found) == [("model", "xla"), ("compare", "xla")]
    ours, theirs = found["batches"][0]["models"]
    (gain,) = found["batches"][0]["speedups"]
    assert gain["over"] == str(tiny_llama[0]) and theirs["keep"] == 1
    assert gain["byte_ratio_bound"] == theirs["step_bytes"] / ours["step_bytes"] == ours["byte_ratio_bound"]
    means = [each["nxdi_compat"]["e2e_model"]["latency_ms_avg"] for each in (ours, theirs)]
    assert gain["e2e_nxdi"] == means[1] / means[0] and gain["decode"]["n"] == 2


def test_random_weights(answer, tiny_llama, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_llama[0] / "config.json").read_bytes())  # and no weights
    dense = answer("--random", model=tmp_path)
    assert models_of(dense) == [("model", "xla")] and dense["batches"][0]["models"][0]["keep"] == 1
    found = answer("--random", "--keep", 0.5, "--rank-multiple", 16, model=tmp_path)
    assert models_of(found) == [("model", "xla"), ("compare", "xla")]
    keeps = [each["keep"] for each in found["batches"][0]["models"]]
    assert keeps[1] == 1 and keeps[0] == pytest.approx(0.5, abs=0.1)
    other = answer("--random", "--keep", 0.9, "--rank-multiple", 16, model=tmp_path)
    assert other["batches"][0]["models"][0]["keep"] > keeps[0]
    # At keep 0.5, a rank of 32 is not below break-even but in the MLP.
    wide = answer("--random", "--keep", 0.5, "--rank-multiple", 32, model=tmp_path)
    assert wide["batches"][0]["models"][0]["keep"] > keeps[0]


@pytest.mark.parametrize("flag", ["--batch", "--batch-size"])
def test_batch_sizes(answer, flag):
    found = answer(flag, 1, 3, 1)
    assert [batch["batch"] for batch in found["batches"]] == [1, 3]
    one, three = (batch["models"][0] for batch in found["batches"])
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values of two layers, two heads of 16, in float32
    assert three["step_bytes"] - one["step_bytes"] == 2 * (4 + 2) * per_token


@pytest.mark.parametrize("flag", ["--prompt", "--max-context-length"])
def test_prompt_and_new_tokens(answer, flag):
    base, found = answer(), answer(flag, 8, "--new", 6)
    assert (found["prompt"], found["new"]) == (8, 6)
    assert found["batches"][0]["models"][0]["step_bytes"] > base["batches"][0]["models"][0]["step_bytes"]


def test_the_whole_length(low, capfd):
    short = ["--runs", 1, "--warmup", 0, "--bandwidth", 10, "--json", "-q"]
    assert run(low, "--prompt", 4, "--seq-len", 9, *short) == 0
    assert json.loads(capfd.readouterr().out)["new"] == 5
    assert run(low, "--prompt", 4, *short) == 0
    assert json.loads(capfd.readouterr().out)["new"] == 64


def test_runs_and_warmup(answer, monkeypatch):
    calls, inner = [], measure._run
    monkeypatch.setattr(measure, "_run", lambda *given: calls.append(1) or inner(*given))
    assert answer()["batches"][0]["models"][0]["e2e_ms"]["n"] == 2
    assert len(calls) == 2 + 2  # to compile, cold and warm; and the runs
    assert answer("--runs", 3, "--warmup", 4)["batches"][0]["models"][0]["e2e_ms"]["n"] == 3
    assert len(calls) == 4 + 2 + 4 + 3


def test_dtype(answer):
    half, full = answer("--dtype", "bfloat16"), answer()
    assert half["dtype"] == "bfloat16"
    assert 2 * half["batches"][0]["models"][0]["weight_bytes"] == full["batches"][0]["models"][0]["weight_bytes"]


def test_xla_runs_in_turns_with_another_backend(answer, tiny_llama, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other(kernels.xla.XLA):
        name: str = "other"

    chosen = kernels.choose
    monkeypatch.setattr(
        kernels, "choose", lambda name="auto", *_, **__: Other("cpu") if name == "other" else chosen(name)
    )
    found = answer("--backend", "other")
    assert models_of(found) == [("model", "other"), ("model", "xla")]
    assert [gain["backend"] for gain in found["batches"][0]["speedups"]] == ["xla"]
    found = answer("--backend", "other", "--compare", tiny_llama[0])
    assert models_of(found) == [("model", "other"), ("compare", "other"), ("model", "xla"), ("compare", "xla")]
    assert len(found["batches"][0]["speedups"]) == 3
    assert models_of(answer("--backend", "xla")) == [("model", "xla")]


def test_buckets(answer):
    entry = answer("--buckets", "8/32,64")["batches"][0]["models"][0]
    assert list(entry["buckets"]["prefill"]) == [8] and list(entry["buckets"]["decode"]) == [32, 64]
    other = answer("--buckets", "off", "--max-length", 48)["batches"][0]["models"][0]
    assert list(other["buckets"]["decode"]) == [48] and not other["compiled_ahead"]


def test_artifacts(answer, low, tiny_llama, tmp_path):
    api.compile_ahead(low, tmp_path / "steps", "float32", buckets="8/32", modes=["greedy"])
    found = answer("--artifacts", tmp_path / "steps", "--compare", tiny_llama[0], "--dtype", "float32")
    held, other = found["batches"][0]["models"]
    assert held["compiled_ahead"] and held["compilation"] == {"cold": None, "warm": 0}
    assert list(held["buckets"]["prefill"]) == [8]
    assert not other["compiled_ahead"] and other["compilation"]["warm"] > 0


def test_bandwidth(answer, monkeypatch):
    floors = [answer("--bandwidth", rate)["batches"][0]["models"][0]["floor_ms"] for rate in (10, 20)]
    assert floors[0] == pytest.approx(2 * floors[1])
    monkeypatch.setitem(machine.COPY_RATES, jax.local_devices()[0].device_kind, 40.0)
    arguments = [argument for argument in SHORT if argument not in ("--bandwidth", 10)]
    monkeypatch.setattr(sys.modules[__name__], "SHORT", arguments)
    found = answer()
    assert found["bandwidth_gb_per_s"] == 40 and "measured before" in found["bandwidth_source"]
    assert found["batches"][0]["models"][0]["floor_ms"] == pytest.approx(floors[0] / 4)


def test_samples(answer):
    assert "samples_seconds" not in answer()["batches"][0]["models"][0]
    entry = answer("--samples")["batches"][0]["models"][0]
    runs = entry["samples_seconds"]
    assert [set(each) for each in runs] == [{"prefill", "first_token", "total", "blocks"}] * 2
    assert 1e3 * max(each["total"] for each in runs) == entry["e2e_ms"]["greatest"]


def test_files(answer, low, tiny_llama, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self) or save(self, path))
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    found = answer("--out", out, "--plot", plot, "--batch", 1, 2, "--compare", tiny_llama[0])
    assert json.loads(out.read_text("utf-8")) == found
    assert plot.read_bytes().startswith(b"\x89PNG")
    decode, prefill, whole = drawn[0].axes
    assert [axes.get_title() for axes in (decode, prefill, whole)] == [
        *("decode, ms a token", "prefill, ms", "end to end, ms"),
    ]
    medians = [each["e2e_ms"]["greatest"] for batch in found["batches"] for each in batch["models"]]
    assert [max(line.get_ydata()) for line in whole.lines[::2]] == pytest.approx(medians)
    assert {text.get_text() for text in decode.get_legend().get_texts()} == {
        *("low (xla)", f"{tiny_llama[0].name} (xla)", "floor"),
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "qwen3-4b"),
        (["no-such-model", "--random"], "the shape of 'no-such-model' is not known"),
        (["MODEL", "--keep", "0.8"], "add --random"),
        (["MODEL", "--rank-multiple", "8"], "add --random"),
        (["MODEL", "--random", "--rank-multiple", "8"], "give --keep"),
        (["MODEL", "--random", "--compare", "MODEL"], "--keep instead of --compare"),
        (["MODEL", "--random", "--keep", "1.5"], "between 0 and 1"),
        (["MODEL", "--random", "--keep", "0.8"], "lower --keep or --rank-multiple"),
        (["MODEL", "--random", "--artifacts", "DIR"], "leave one of them out"),
        (["MODEL", "--prompt", "8", "--seq-len", "8"], "more than the prompt's 8"),
        (["MODEL", "--prompt", "500"], "room for 512"),
        (["MODEL", "--batch", "0"], "batch is 0"),
        (["MODEL", "--runs", "0"], "runs is 0"),
        (["MODEL", "--dtype", "int8"], "bfloat16, float16"),
        (["MODEL", "--backend", "abacus"], "abacus"),
        (["MODEL", "--bandwidth", "0"], "above 0"),
        (["MODEL", "--out", "/no/such/folder/x.json"], "no folder /no/such/folder"),
        (["MODEL", "--out", "/"], "it is a folder"),
        (["MODEL", "--plot", "plot.xyz"], "ends in .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_exit_code_2(low, capfd, arguments, words):
    given = [low if argument == "MODEL" else argument for argument in arguments]
    assert run(*given, *([] if "--bandwidth" in given else ["--bandwidth", 10]), "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


def test_new_and_the_whole_length_exclude_each_other(low, capfd):
    with pytest.raises(SystemExit, match="2"):
        run(low, "--new", 4, "--seq-len", 8)
    assert "not allowed with" in capfd.readouterr().err
