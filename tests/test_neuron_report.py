"""The report of what the Trainium kernels cost."""

import json

import pytest

from jaxsvd import cli, neuron_report
from jaxsvd.neuron_report import MODELS, groups_of


@pytest.fixture(scope="module")
def rows():
    return neuron_report.measure(["trn2"], ["qwen3-4b"], chain=False, progress=False)


def find(rows, group, way, tokens):
    (row,) = [row for row in rows if (row["group"], row["way"], row["tokens"]) == (group, way, tokens)]
    return row


def test_every_group_is_there_each_way(rows):
    assert {(row["group"], row["way"]) for row in rows} == {
        ("mlp", "fused"),
        *((group.name, way) for group in groups_of(MODELS["qwen3-4b"]) for way in ("fused", "pair", "dense")),
    }
    assert {row["tokens"] for row in rows} == {1, 16, 1024}


def test_compulsory_bytes_are_the_weights_and_the_activations(rows):
    row = find(rows, "qkv", "fused", 16)
    weights = 1280 * (2560 + 4096) + 2 * 640 * (2560 + 1024)
    assert row["compulsory_bytes"] == 2 * (weights + 16 * (2560 + 4096 + 2 * 1024)) == row["hbm_bytes"]
    dense = find(rows, "qkv", "dense", 16)
    assert dense["hbm_bytes"] == 2 * (2560 * 6144 + 16 * (2560 + 6144))


def test_fused_is_never_worse_on_a_models_layers(rows):
    for group in ("qkv", "o", "gate,up", "down"):
        for tokens in (1, 16, 1024):
            fused, pair, dense = (find(rows, group, way, tokens) for way in ("fused", "pair", "dense"))
            assert fused["hbm_bytes"] <= pair["hbm_bytes"] and fused["hbm_bytes"] < dense["hbm_bytes"]
            times = [row["modelled_lower_bound_seconds"]["total"] for row in (fused, pair, dense)]
            assert times == sorted(times)


def test_the_command(tmp_path, capsys):
    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    options = ["--target", "trn1", "--model", "llama-3.2-1b", "--no-chain", "-q"]
    assert cli.run("neuron-report", [*options, "--out", str(out), "--plot", str(plot)]) == 0
    printed, saved = capsys.readouterr().out, json.loads(out.read_text())
    assert "trn1" in printed and "trn2" not in printed and "qwen3" not in printed and "chain" not in printed
    assert len(saved["rows"]) == 4 * 3 * 3 + 3 and "nothing was run on Trainium" in saved["note"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.run("neuron-report", [*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved


def test_the_chain_is_left_out_where_that_is_said(monkeypatch, capsys):
    """It takes minutes: here it is only asked for."""
    asked = []
    monkeypatch.setattr(neuron_report, "measure", lambda *given, **_: asked.append(given) or [])
    for extra in ([], ["--no-chain"]):
        assert cli.run("neuron-report", ["--target", "trn2", "--model", "qwen3-4b", *extra, "--json", "-q"]) == 0
    assert asked == [(["trn2"], ["qwen3-4b"], chain) for chain in (True, False)]


def test_unknown_names_are_refused(capsys):
    assert cli.run("neuron-report", ["--target", "trn9", "-q"]) == 2
    assert cli.run("neuron-report", ["--model", "gpt", "-q"]) == 2
    assert "choose among llama-3.2-1b" in capsys.readouterr().err


def test_the_measured_figures_stand_beside_the_chain(rows):
    measured = neuron_report._measured("trn1", "chain", "pair", 32768)
    assert measured["neuronmm_measured_ms"] == 116.8 and measured["neuronmm_measured_compiler_ms"] == 100.1
    assert not neuron_report._measured("trn2", "chain", "pair", 32768)
    printed = neuron_report.table([rows[0] | measured])
    assert "measured: NeuronMM 116.8 ms, 22.3 GiB; AWS's compiler 100.1 ms, 17.0 GiB" in printed


def test_the_block_of_tokens_is_reported():
    group = neuron_report.Group("xuv", 8192, ((1024, 4096),), "xuv")
    blocks = {row["way"]: row.get("token_block") for row in neuron_report._measure("trn2", "chain", group, 1100)}
    assert blocks["fused"] == 550  # two blocks
    assert blocks["pair"] is None
