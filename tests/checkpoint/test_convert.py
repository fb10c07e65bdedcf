"""`jaxsvd convert`: pickles, adapters and factored heads become standard folders, all of them or none."""

import json
import shutil
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from factored import (
    factor,
    mixed_ranks,
    names,
    projections,
    read_config,
    read_tensors,
    with_weights,
    write_factored,
    write_folder,
)
from safetensors.numpy import save_file
from tiny import make_tiny

import jaxsvd
from jaxsvd import cli
from jaxsvd.checkpoint.convert import convert
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.errors import ModelError, UsageError

PROMPT = [5, 17, 3, 99, 42, 7, 1]
TOLERANCE = 2e-4
Q = "model.layers.0.self_attn.q_proj"
torch.set_num_threads(1)


def check_logits(folder, model, equal) -> None:
    """The folder answers as torch does with these dense weights."""
    with torch.no_grad():
        expected = with_weights(model, equal)(torch.tensor([PROMPT])).logits.numpy()
    assert expected.std() > 0.1
    assert np.abs(jaxsvd.load(folder, dtype="float32").logits([PROMPT]) - expected).max() <= TOLERANCE


def save_torch(path, tensors, **more) -> None:
    torch.save({name: torch.tensor(array) for name, array in tensors.items()} | more, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder, torch model), with files beside the weights."""
    folder = tmp_path_factory.mktemp("llama")
    model = make_tiny("llama-untied", folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "LICENSE.txt").write_text("free")
    return folder, model


@pytest.fixture
def factored(llama, tmp_path):
    """(a folder in SVD-LLM's names, the dense tensors that it stands for)."""
    folder = tmp_path / "factored"
    return folder, write_factored(llama[0], folder, mixed_ranks(read_tensors(llama[0])))


# Pickles.


@pytest.fixture
def svd_llm_pickle(llama, tmp_path):
    """What SVDLLM.py saves: the whole model, of classes of its own package, and the tokenizer. All is factored."""
    package = type(sys)("component.svd_llama")
    parts = {"self_attn": "SVD_LlamaAttention", "mlp": "SVD_LlamaMLP"}
    classes = {part: type(name, (torch.nn.Module,), {"__module__": package.__name__}) for part, name in parts.items()}
    for kind in classes.values():
        setattr(package, kind.__name__, kind)
    sys.modules |= {"component": type(sys)("component"), package.__name__: package}
    model = transformers.LlamaForCausalLM(llama[1].config)
    model.load_state_dict(llama[1].state_dict())
    tensors = read_tensors(llama[0])
    equal = {name: array for name, array in tensors.items() if not name.endswith("_proj.weight")}
    for i, layer in enumerate(model.model.layers):
        for part, kind in classes.items():
            module = kind()
            module.config, module.ratio = model.config, 0.5
            for path in projections(tensors):
                if not path.startswith(f"model.layers.{i}.{part}."):
                    continue
                for made, array in zip(names(path, "svd-llm"), factor(tensors[f"{path}.weight"], 11), strict=True):
                    linear = torch.nn.Linear(*array.shape[::-1], bias=False)
                    linear.weight.data = torch.tensor(array)
                    module.add_module(made.split(".")[-1], linear)
                down, up = factor(tensors[f"{path}.weight"], 11)
                equal[f"{path}.weight"] = up @ down
            module.act_fn = torch.nn.SiLU()
            setattr(layer, part, module)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    torch.save({"model": model, "tokenizer": tokenizer}, tmp_path / "x_whitening_only_0.5.pt")
    yield tmp_path / "x_whitening_only_0.5.pt", equal
    del sys.modules["component"], sys.modules["component.svd_llama"]


@pytest.mark.parametrize("with_base", [True, False])
def test_svd_llm_pickle(llama, svd_llm_pickle, with_base, tmp_path):
    path, equal = svd_llm_pickle
    report = convert(path, tmp_path / "target", llama[0] if with_base else None)
    assert (report.family, report.factored, report.matrices) == ("svd-llm", 14, 14)
    assert (report.least_rank, report.greatest_rank) == (11, 11)
    assert (tmp_path / "target" / "tokenizer_config.json").exists() == with_base
    check_logits(tmp_path / "target", llama[1], equal)


def test_state_dict_without_config_asks_for_the_base(llama, factored, tmp_path):
    save_torch(tmp_path / "x.pt", read_tensors(factored[0]))
    with pytest.raises(UsageError, match="--base"):
        convert(tmp_path / "x.pt", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    convert(tmp_path / "x.pt", tmp_path / "target", llama[0])
    check_logits(tmp_path / "target", llama[1], factored[1])


@pytest.mark.parametrize("with_base", [True, False])
def test_a_stray_config_beside_a_pickle(llama, svd_llm_pickle, with_base, tmp_path, caplog):
    """What the pickled model says of itself comes before what lies beside it, and --base before both."""
    path, equal = svd_llm_pickle
    (path.parent / "config.json").write_text(json.dumps(read_config(llama[0]) | {"rope_theta": 5.0, "vocab_size": 7}))
    convert(path, tmp_path / "target", llama[0] if with_base else None)
    check_logits(tmp_path / "target", llama[1], equal)
    assert "gets no tokenizer" in caplog.text and "--base" in caplog.text


def test_dynrank_pickle(llama, tmp_path):
    ranks = mixed_ranks(read_tensors(llama[0]))
    write_factored(llama[0], tmp_path / "x", ranks, "dynrank")
    state = {name: torch.tensor(array) for name, array in read_tensors(tmp_path / "x").items()}
    torch.save({"step": 3, "ranks": ranks, "state_dict": state}, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "target", llama[0]).family == "dynrank"
    assert Checkpoint(tmp_path / "target").ranks == ranks


def pickled(folder, shards: int) -> None:
    """Turn the safetensors of a folder into pytorch_model*.bin."""
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        return save_torch(folder / "pytorch_model.bin", tensors)
    index = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        save_torch(folder / file, {name: tensors[name] for name in tensors if index[name] == file})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["svd-llm-hf", "asvd"])
def test_folder_of_bins(llama, family, shards, tmp_path):
    folder = tmp_path / "source"
    write_factored(llama[0], folder, mixed_ranks(read_tensors(llama[0])), family)
    write_factored(llama[0], tmp_path / "standard", mixed_ranks(read_tensors(llama[0])))
    (folder / "training_args.bin").write_bytes(b"no pickle at all")
    pickled(folder, shards)
    with pytest.raises(ModelError, match=f"jaxsvd convert {folder}"):
        Checkpoint(folder)
    convert(folder, tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.bin*"))
    standard, target = read_tensors(tmp_path / "standard"), read_tensors(tmp_path / "target")
    assert standard.keys() == target.keys() and all((standard[name] == target[name]).all() for name in standard)


def test_an_index_that_disagrees_with_the_bins(llama, factored, tmp_path):
    pickled(factored[0], 3)
    index = factored[0] / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(iter(weight_map))
    weight_map[name] = next(file for file in weight_map.values() if file != weight_map[name])
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=f"misplaced: {name}"):
        convert(factored[0], tmp_path / "target")


def test_bases_that_torch_stores_once(llama, tmp_path):
    """Basis Sharing's .bin files name one storage many times."""
    tensors, equal, groups = {}, {}, {}
    for name, array in read_tensors(llama[0]).items():
        tensors[name] = equal[name] = array
    for kind in "qkv":
        paths = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1)]
        _, _, vt = np.linalg.svd(np.concatenate([tensors[path] for path in paths]), full_matrices=False)
        basis = vt[:20]
        groups[f"{kind}_groups"] = [[0, 1]]
        for layer, path in enumerate(paths):
            tensors[path] = equal[path] @ basis.T
            equal[path] = tensors[path] @ basis
            tensors[f"model.layers.{layer}.self_attn.{kind}_basis.weight"] = basis
            tensors[f"model.{kind}_basis.{layer}.weight"] = basis
    once = {id(array): torch.tensor(array) for array in tensors.values()}
    folder = tmp_path / "source"
    write_folder(folder, {}, read_config(llama[0]) | groups)
    (folder / "model.safetensors").unlink()
    torch.save({name: once[id(array)] for name, array in tensors.items()}, folder / "pytorch_model.bin")
    report = convert(folder, tmp_path / "target")
    assert (report.family, report.factored, report.shared) == ("basis-sharing", 6, 3)
    check_logits(tmp_path / "target", llama[1], equal)


def test_a_hostile_pickle_leaves_nothing(llama, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save({"model": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"it names .*open"):
        convert(tmp_path / "x.pt", tmp_path / "target", llama[0])
    assert not (tmp_path / "marker").exists() and not (tmp_path / "target").exists()


# LoRA.

SETTINGS = {"peft_type": "LORA", "lora_alpha": 12, "r": 4}


def lora(llama, rng, paths=(Q, "model.layers.1.mlp.down_proj"), scale=12 / 4):
    """Pairs of rank 4 as {path: (A, B)}, and the dense model with them."""
    equal = read_tensors(llama[0])
    pairs = {}
    for path in paths:
        out, inputs = equal[f"{path}.weight"].shape
        a, b = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((4, inputs), (out, 4)))
        pairs[path] = a, b
        equal[f"{path}.weight"] = equal[f"{path}.weight"] + scale * (b @ a)
    return pairs, equal


def write_adapter(folder, pairs, suffix="safetensors", extra=None, **settings):
    folder.mkdir()
    tensors = {
        f"base_model.model.{p}.lora_{k}.weight": m for p, ab in pairs.items() for k, m in zip("AB", ab, strict=True)
    }
    tensors |= extra or {}
    if suffix == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        save_torch(folder / "adapter_model.bin", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("named", [True, False], ids=["named in the adapter", "given"])
def test_adapter(llama, named, suffix, tmp_path, rng):
    pairs, equal = lora(llama, rng)
    name = {"base_model_name_or_path": str(llama[0])} if named else {}
    adapter = write_adapter(tmp_path / "adapter", pairs, suffix, **name)
    report = convert(adapter, tmp_path / "target", None if named else llama[0])
    assert (report.family, report.factored) == ("lora", 0)
    check_logits(tmp_path / "target", llama[1], equal)
    assert "low_rank" not in read_config(tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer_config.json").exists()
    assert not (tmp_path / "target" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 12 / 2),
        ({"alpha_pattern": {"self_attn.q_proj": 8, "down_proj": 8}}, 2),
        ({"alpha_pattern": {"elf_attn.q_proj": 8}}, 3),
        ({"lora_alpha": 1.0}, 0.25),
        ({"init_lora_weights": "gaussian"}, 3),
    ],
)
def test_scales(llama, settings, scale, tmp_path, rng):
    pairs, equal = lora(llama, rng, scale=scale)
    convert(write_adapter(tmp_path / "adapter", pairs, **settings), tmp_path / "target", llama[0])
    target = read_tensors(tmp_path / "target")
    assert max(np.abs(target[f"{path}.weight"] - equal[f"{path}.weight"]).max() for path in pairs) < 1e-6
    assert np.abs(read_tensors(llama[0])[f"{Q}.weight"] - equal[f"{Q}.weight"]).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_16"}, "merge it with PEFT first"),
        ({"init_lora_weights": "CorDA"}, "merge it with PEFT first"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": "12"}, "lora_alpha '12'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"alpha_pattern": {".*q_proj$": 3}}, "regular expressions"),
    ],
)
def test_adapters_that_are_more_than_pairs(llama, settings, words, tmp_path, rng):
    adapter = write_adapter(tmp_path / "adapter", lora(llama, rng)[0], **settings)
    with pytest.raises(ModelError, match=words.replace(".", r"\.")):
        convert(adapter, tmp_path / "target", llama[0])


def test_adapter_that_does_not_fit(llama, tmp_path, rng):
    pairs, _ = lora(llama, rng)
    wrong = dict(pairs) | {"model.layers.9.mlp.up_proj": pairs[Q]}
    wrong["model.layers.1.mlp.up_proj"] = pairs[Q]
    extra = {"base_model.model.lm_head.weight": np.ones((128, 64), np.float32)}
    extra |= {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.float32)}
    with pytest.raises(ModelError) as caught:
        convert(write_adapter(tmp_path / "adapter", wrong, extra=extra), tmp_path / "target", llama[0])
    for line in (
        "missing: model.layers.9.mlp.up_proj.weight",
        "mis-shaped: model.layers.1.mlp.up_proj.lora_A.weight (4, 64) and",
        "unexpected: lm_head.weight",
        "missing: model.layers.0.mlp.up_proj.lora_B.weight",
        "4 things are wrong",
    ):
        assert line in str(caught.value)


def test_adapter_of_nothing(llama, tmp_path, rng):
    adapter = write_adapter(tmp_path / "adapter", lora(llama, rng)[0])
    with pytest.raises(UsageError, match="--base"):
        convert(adapter, tmp_path / "target")


def test_adapter_of_itself(llama, tmp_path, rng):
    adapter = write_adapter(
        tmp_path / "adapter", lora(llama, rng)[0], base_model_name_or_path=str(tmp_path / "adapter")
    )
    with pytest.raises(UsageError, match="an adapter itself"):
        convert(adapter, tmp_path / "target")


@pytest.mark.parametrize("spelling", [".lora_A.weight", ".lora_A.default.weight"])
def test_pairs_inside_of_a_checkpoint(llama, spelling, tmp_path, rng):
    """As PEFT leaves a model that is saved whole; also on top of factors."""
    folder, ranks = tmp_path / "source", {Q: 20}
    equal = write_factored(llama[0], folder, ranks)
    tensors = read_tensors(folder)
    path = "model.layers.1.mlp.down_proj"
    a, b = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((4, 96), (64, 4)))
    tensors[f"{path}.base_layer.weight"] = tensors.pop(f"{path}.weight")
    tensors |= {path + spelling: a, path + spelling.replace("A", "B"): b}
    equal[f"{path}.weight"] = equal[f"{path}.weight"] + 3 * (b @ a)
    factor_a, factor_b = (rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((4, 20), (64, 4)))
    up = f"{Q.removesuffix('_proj')}_u_proj"
    tensors |= {up + spelling: factor_a, up + spelling.replace("A", "B"): factor_b}
    down = tensors[f"{Q.removesuffix('_proj')}_v_proj.weight"]
    equal[f"{Q}.weight"] = equal[f"{Q}.weight"] + 3 * (factor_b @ factor_a) @ down
    write_folder(folder, tensors, read_config(folder))
    with pytest.raises(ModelError, match="its scale, alpha/r, can't be had"):
        convert(folder, tmp_path / "target")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    assert convert(folder, tmp_path / "target").family == "svd-llm+lora"
    check_logits(tmp_path / "target", llama[1], equal)


# A factored head.


@pytest.mark.parametrize("tied", [True, False, None])
def test_factored_head_is_multiplied_out(llama, tied, tmp_path):
    """Whatever config.json says of tying: a head that is factored is its own."""
    tensors = read_tensors(llama[0])
    down, up = factor(tensors["lm_head.weight"], 30)
    equal = tensors | {"lm_head.weight": up @ down}
    del tensors["lm_head.weight"]
    tensors |= {"lm_head.BLinear.weight": down, "lm_head.ALinear.weight": up}
    config = read_config(llama[0]) | {"truncation_ranks": {"lm_head": 30}, "tie_word_embeddings": tied}
    report = convert(write_folder(tmp_path / "source", tensors, config), tmp_path / "target")
    assert (report.family, report.factored) == ("dense", 0)
    check_logits(tmp_path / "target", llama[1], equal)


def test_factored_head_that_does_not_fit(llama, tmp_path):
    tensors = read_tensors(llama[0])
    del tensors["lm_head.weight"]
    tensors |= {
        "lm_head.BLinear.weight": np.ones((5, 63), np.float32),
        "lm_head.ALinear.weight": np.ones((128, 5), np.float32),
    }
    with pytest.raises(ModelError, match=r"lm_head\.BLinear\.weight is \(5, 63\)"):
        convert(write_folder(tmp_path / "source", tensors, read_config(llama[0])), tmp_path / "target")


# Folders.


def test_target_is_all_or_nothing(llama, factored, tmp_path):
    source, target = factored[0], tmp_path / "target"
    tensors = read_tensors(source)
    broken = dict(tensors) | {"model.norm.weight": np.full(64, np.nan, np.float32)}
    with pytest.raises(ModelError, match="not numbers"):
        convert(write_folder(tmp_path / "broken", broken, read_config(source)), target)
    assert not target.exists() and not list(tmp_path.glob(".target*"))
    convert(source, target)
    with pytest.raises(UsageError, match="--force"):
        convert(source, target)
    with pytest.raises(ModelError, match="not numbers"):
        convert(tmp_path / "broken", target, force=True)
    assert Checkpoint(target).ranks == Checkpoint(source).ranks
    convert(source, target, force=True)
    assert not list(tmp_path.glob(".target*"))


@pytest.mark.parametrize("same", ["source", "base"])
def test_target_that_is_the_source(llama, factored, same, tmp_path):
    save_torch(tmp_path / "x.pt", read_tensors(factored[0]))
    with pytest.raises(UsageError, match="choose another target"):
        if same == "source":
            convert(factored[0], factored[0], force=True)
        else:
            convert(tmp_path / "x.pt", llama[0], llama[0], force=True)
    assert (llama[0] / "model.safetensors").exists()


def test_single_safetensors_file(llama, factored, tmp_path):
    """As SVD-Flash publishes its weights."""
    file = tmp_path / "llama_svd_0.8_weights.safetensors"
    shutil.copy(factored[0] / "model.safetensors", file)
    with pytest.raises(UsageError, match="--base"):
        convert(file, tmp_path / "target")
    convert(file, tmp_path / "target", llama[0])
    check_logits(tmp_path / "target", llama[1], factored[1])


def test_a_folder_whose_one_file_has_a_name_of_its_own(llama, factored, tmp_path):
    """SVD-Flash again: it loads as it is."""
    (factored[0] / "model.safetensors").rename(factored[0] / "llama-3.2-1b_svd_0.8_weights.safetensors")
    check_logits(factored[0], llama[1], factored[1])
    convert(factored[0], tmp_path / "target")
    check_logits(tmp_path / "target", llama[1], factored[1])
    shutil.copy(factored[0] / "llama-3.2-1b_svd_0.8_weights.safetensors", factored[0] / "other.safetensors")
    with pytest.raises(ModelError, match=r"several others \(llama-3.*, other"):
        Checkpoint(factored[0])


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_and_pickles_together(llama, factored, shards, tmp_path):
    """What is complete is taken."""
    shutil.copytree(factored[0], tmp_path / "both")
    pickled(factored[0], shards)
    save_file({"stray": np.ones(3, np.float32)}, factored[0] / "stray.safetensors")
    assert convert(factored[0], tmp_path / "a").factored
    for file in factored[0].glob("pytorch_model*"):
        (tmp_path / "both" / file.name).write_bytes(b"no pickle at all")
    assert convert(tmp_path / "both", tmp_path / "b").factored


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
@pytest.mark.parametrize("force", [True, False])
def test_target_at_a_file(factored, place, force, tmp_path):
    (tmp_path / "file").write_text("dear")
    with pytest.raises(UsageError, match="file is a file"):
        convert(factored[0], tmp_path / place, force=force)
    assert (tmp_path / "file").read_text() == "dear"


def test_folders_with_the_names_of_companions(factored, tmp_path):
    (factored[0] / "notes.txt").mkdir()
    convert(factored[0], tmp_path / "target")
    assert not (tmp_path / "target" / "notes.txt").exists()


def test_a_file_with_its_config_beside_it(llama, factored, tmp_path):
    (factored[0] / "model.safetensors").rename(factored[0] / "odd_name.safetensors")
    convert(factored[0] / "odd_name.safetensors", tmp_path / "target")
    assert Checkpoint(tmp_path / "target").ranks


def test_the_standard_folder_keeps_its_history(factored, tmp_path):
    config, history = read_config(factored[0]), {"method": "m", "base": {"name": "n"}, "calibration": {"tokens": 5}}
    config["low_rank"] = history | {"ranks": Checkpoint(factored[0]).ranks}
    write_folder(factored[0], read_tensors(factored[0]), config)
    convert(factored[0], tmp_path / "target")
    low_rank = read_config(tmp_path / "target")["low_rank"]
    assert {key: low_rank[key] for key in history} == history and low_rank["format_version"] == 1
    assert set(low_rank["keep"]) == {"linears", "parameters", "bytes"}


@pytest.fixture
def narrowed(llama, tmp_path):
    """(what the compressor writes with --width: the first MLP has 40 neurons of 96; its tensors)."""
    tensors, config = read_tensors(llama[0]), read_config(llama[0])
    for kind in ("gate", "up"):
        tensors[f"{MLP}.{kind}_proj.weight"] = tensors[f"{MLP}.{kind}_proj.weight"][:40]
    tensors[f"{MLP}.down_proj.weight"] = tensors[f"{MLP}.down_proj.weight"][:, :40]
    config["low_rank"] = HISTORY | {"ranks": {}, "widths": {MLP: 40}}
    return write_folder(tmp_path / "narrowed", tensors, config), tensors


MLP = "model.layers.0.mlp"
HISTORY = {
    "format_version": 1,
    "method": "kfac",
    "allocate": "global",
    "base": {"name": "n", "digest": "d"},
    "calibration": {"tokens": 5},
    "keep": {"asked": 0.8, "linears": 0.1, "parameters": 0.1, "bytes": 0.1},
    "predicted_loss": 0.5,
}


@pytest.mark.parametrize("ranks", [{}, {Q: 20}])
@pytest.mark.parametrize("adapter", [False, True])
def test_narrower_mlps(llama, narrowed, adapter, ranks, tmp_path, rng):
    source, tensors = narrowed
    if ranks:
        write_factored(source, source, ranks)
        config = read_config(source)
        config["low_rank"]["ranks"] = ranks
        write_folder(source, read_tensors(source), config)
    converted = source
    if adapter:
        converted = write_adapter(tmp_path / "adapter", lora(llama, rng, ("model.layers.1.mlp.down_proj",))[0])
    report = convert(converted, tmp_path / "target", source if adapter else None)
    low_rank = read_config(tmp_path / "target")["low_rank"]
    assert low_rank["ranks"] == ranks and low_rank["widths"] == {MLP: 40}
    assert {name: value for name, value in low_rank.items() if name in HISTORY and name != "keep"} == {
        name: value for name, value in HISTORY.items() if name != "keep"
    }
    whole, found = (
        sum(array.size for name, array in read_tensors(folder).items() if "_proj.weight" in name)
        for folder in (llama[0], tmp_path / "target")
    )
    assert report.keep_linears == pytest.approx(found / whole) == Checkpoint(source).keep.linears
    rounded = dict(zip(("linears", "parameters", "bytes"), (round(value, 6) for value in report[-3:]), strict=True))
    assert low_rank["keep"] == {"asked": 0.8} | rounded
    if not adapter:
        target = read_tensors(tmp_path / "target")
        assert target.keys() == read_tensors(source).keys()
        assert all((target[name] == array).all() for name, array in tensors.items() if name in target)


@pytest.mark.parametrize("based", [True, False])
def test_where_it_comes_from(llama, factored, based, tmp_path):
    convert(factored[0], tmp_path / "target", llama[0] if based else None)
    low_rank = read_config(tmp_path / "target")["low_rank"]
    assert low_rank["source"] == str(factored[0]) and low_rank.get("base") == (str(llama[0]) if based else None)


def test_dobi_remapped(llama, tmp_path):
    write_folder(tmp_path / "x", {}, read_config(llama[0]))
    (tmp_path / "x" / "remapping_weight.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="Noremapping"):
        convert(tmp_path / "x", tmp_path / "target")


def test_several_files_of_weights(llama, tmp_path):
    folder = tmp_path / "x"
    write_folder(folder, {}, read_config(llama[0]))
    (folder / "model.safetensors").unlink()
    for name in ("a.pt", "b.pt", "training_args.bin"):
        save_torch(folder / name, read_tensors(llama[0]))
    with pytest.raises(UsageError, match=r"several files .*/a\.pt"):
        convert(folder, tmp_path / "target")
    (folder / "b.pt").unlink()
    assert convert(folder, tmp_path / "target").family == "dense"


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        convert("no-such-model", tmp_path / "target")


# The command.


def test_command(factored, tmp_path, capsys):
    assert cli.run("convert", [str(factored[0]), str(tmp_path / "a")]) == 0
    line = capsys.readouterr().out
    ranks = Checkpoint(factored[0]).ranks
    assert f"svd-llm; {len(ranks)} of 14 matrices factored (ranks 1 to 20); kept 0." in line and line.count("\n") == 1
    assert cli.run("convert", [str(factored[0]), str(tmp_path / "b"), "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == str(tmp_path / "b") and report["factored"] == len(ranks)
    keep = read_config(tmp_path / "b")["low_rank"]["keep"]
    assert keep["linears"] == pytest.approx(report["keep_linears"], abs=1e-6) and 0 < keep["linears"] < 1
    assert cli.run("convert", [str(factored[0]), str(tmp_path / "b"), "-q"]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run("convert", [str(factored[0]), str(tmp_path / "b"), "-q", "--force"]) == 0


def test_script_says_what_is_missing(factored, llama, tmp_path, capsys):
    save_torch(tmp_path / "x.pt", read_tensors(factored[0]))
    given = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "target")]
    assert cli.main(given) == 2
    assert "--base" in capsys.readouterr().err
    assert cli.main([*given, "--base", str(llama[0])]) == 0
    check_logits(tmp_path / "target", llama[1], factored[1])
