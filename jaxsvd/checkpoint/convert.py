"""Any public low-rank checkpoint, pickled or not, into the folder that jaxsvd's own compressor would write."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxsvd import hub
from jaxsvd.checkpoint import torchfiles
from jaxsvd.checkpoint.families import GROUPS, LAYOUTS
from jaxsvd.checkpoint.files import INDEX, SINGLE, TensorFiles, Tensors, sharded
from jaxsvd.checkpoint.merge import has_pairs, merged, with_whole_head
from jaxsvd.checkpoint.read import Checkpoint, unwrapped
from jaxsvd.checkpoint.torchfiles import PickledTensors
from jaxsvd.checkpoint.write import FORMAT_VERSION, TensorWriter, atomic_folder, copy_companions, write_json
from jaxsvd.config import read_json
from jaxsvd.errors import ModelError, UsageError
from jaxsvd.progress import bar
from jaxsvd.tokenizer import has_tokenizer

logger = logging.getLogger("jaxsvd")

_SETTINGS = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("*.pt", "*.pth", "*.bin")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What the families' configs say of their tensors, and of the code that would read them; here `low_rank` says it.
_FAMILY_KEYS = {
    *(key for layout in LAYOUTS for key in layout.keys),
    *(key for keys in GROUPS.values() for key in keys.values()),
    *(f"num_basis_{name}" for keys in GROUPS.values() for name in keys),
    *("svd_ranks", "rank_dict", "low_rank_method", "low_rank_schema", "low_rank_format_version", "auto_map"),
}


class Report(NamedTuple):
    """What `convert` found and wrote.

    `family` is "dense" where nothing is factored; the ranks are the least and the greatest, None without any; the
    fractions are those kept of the projections, of all parameters and of bytes, a shared factor counted once.
    """

    target: Path
    family: str
    factored: int
    matrices: int
    shared: int
    least_rank: int | None
    greatest_rank: int | None
    keep_linears: float
    keep_parameters: float
    keep_bytes: float


class _Source(NamedTuple):
    tensors: Tensors
    raw: dict[str, Any]
    companions: tuple[Path, ...]  # folders with tokenizers and the like; the later ones win
    pairs: bool = False  # whether LoRA pairs were merged


def convert(
    source: str | Path,
    target: str | Path,
    base: str | Path | None = None,
    *,
    force: bool = False,
    progress: bool | None = None,
) -> Report:
    """Write a low-rank checkpoint of any known family as an ordinary HF folder with SVD-LLM's tensor names.

    Args:
        source: a folder, or a single .pt, .bin or .safetensors file. Of pickles, weights are read and nothing is run.
        target: the folder to write; it appears only when it is complete and has been opened.
        base: the model that it was made from, for the config and the tokenizer where the source has none, or for the
            weights that an adapter of LoRA pairs is added to.
        force: replace `target` if it exists.
        progress: a progress bar on stderr; by default where stderr is a terminal.

    Raises UsageError for arguments that can't be used, ModelError for a source that can't be read.
    """
    target = Path(target)
    opened = _open(source, hub.resolve(base) if base else None)
    if target.resolve() in {folder.resolve() for folder in (opened.tensors.folder, *opened.companions)}:
        raise UsageError(f"{target} is what is to be converted: choose another target")
    tensors, raw = with_whole_head(opened.tensors, unwrapped(opened.raw))
    checkpoint = Checkpoint(tensors.folder, tensors, raw)
    families = sorted({stored.layout for stored in checkpoint.matrices.values() if stored.layout})
    family = "+".join(families + ["lora"] * opened.pairs) or "dense"
    with atomic_folder(target, force) as partial:
        total = len(checkpoint.arrays) + len(checkpoint.matrices)
        with bar("converting", total, "tensor", progress) as shown:
            _write(checkpoint, partial, shown.update)
        for folder in opened.companions:
            copy_companions(folder, partial)
        if not has_tokenizer(partial):
            logger.warning(
                "%s gets no tokenizer: copy one there, or give a folder that has one with --base (base=…)", target
            )
        origin = {"source": str(source)} | ({"base": str(base)} if base else {})
        write_json(partial / "config.json", _config(checkpoint, family, origin))
        written = Checkpoint(partial)
        if (written.ranks, written.shared) != (checkpoint.ranks, checkpoint.shared):
            raise ModelError(f"what was written of {source} reads differently: this is a bug of jaxsvd, report it")
    ranks, keep = checkpoint.ranks.values(), checkpoint.keep
    extremes = (min(ranks), max(ranks)) if ranks else (None, None)
    return Report(target, family, len(ranks), len(checkpoint.matrices), len(checkpoint.shared), *extremes, *keep)


def _open(source: str | Path, base: Path | None) -> _Source:
    path = Path(source).expanduser()
    path = path if path.exists() else hub.resolve(source)
    if path.is_dir() and (adapter := next((path / name for name in _ADAPTERS if (path / name).exists()), None)):
        return _open_adapter(adapter, base)
    tensors = _tensors(path)
    folder = tensors.folder
    pickled = tensors.config if isinstance(tensors, PickledTensors) else None
    # A folder knows best what it holds. What lies beside a single file may belong to anything.
    order = (folder, base, pickled) if path.is_dir() else (base, pickled, folder)
    home = next((c for c in order if c and (isinstance(c, dict) or (c / "config.json").exists())), None)
    if home is None:
        raise UsageError(
            f"{path} comes without a config.json, as SVD-LLM's pickles do: name the folder of the model that it was "
            "made from with --base (base=…), for its config and its tokenizer"
        )
    raw = home if isinstance(home, dict) else read_json(home / "config.json")
    companions = tuple(place for place in (base, folder if path.is_dir() or home == folder else None) if place)
    if not has_pairs(tensors):
        return _Source(tensors, raw, companions)
    beside = folder / _SETTINGS
    settings = read_json(beside) if beside.exists() else raw
    return _Source(merged(tensors, tensors, settings), raw, companions, pairs=True)


def _open_adapter(file: Path, base: Path | None) -> _Source:
    """A PEFT folder: pairs, and the name of the model that they belong to."""
    folder = file.parent
    settings = read_json(folder / _SETTINGS)
    named = settings.get("base_model_name_or_path")
    if base is None and not (isinstance(named, str) and named):
        raise UsageError(f"{folder} is an adapter that does not say of which model: name its folder with --base")
    model = hub.resolve(base or str(named))
    if any((model / name).exists() for name in _ADAPTERS):
        raise UsageError(f"{folder} belongs to {model}, which is an adapter itself: convert that one first")
    below = _open(model, None)
    tensors = merged(below.tensors, _tensors(file), settings)
    return _Source(tensors, below.raw, (*below.companions, folder), pairs=True)


def _tensors(path: Path) -> Tensors:
    """The weights of a file or a folder: safetensors where they are complete, else pickles, else what there is."""
    if path.is_file():
        kind = TensorFiles if path.suffix == ".safetensors" else PickledTensors
        return kind(path.parent, [path])
    if (path / "remapping_weight.pt").exists():
        raise ModelError(
            f"{path} holds Dobi-SVD's remapped 8-bit weights (remapping_weight.pt), which jaxsvd does not read: get "
            "the model's Noremapping version"
        )
    if sharded(path, INDEX, SINGLE)[0]:
        return TensorFiles(path)
    files, weight_map = sharded(path, torchfiles.INDEX, torchfiles.SINGLE)
    files = files or sorted(path.glob("pytorch_model-*.bin"))
    if not files and any(path.glob("*.safetensors")):
        return TensorFiles(path)
    if not files:
        files = sorted(file for pattern in _PICKLES for file in path.glob(pattern))
        files = [file for file in files if not file.name.startswith(_NO_WEIGHTS)]
        if len(files) > 1:
            raise UsageError(f"{path} holds several files of weights: give one, such as {files[0]}")
    return PickledTensors(path, files, weight_map) if files else TensorFiles(path)


def _write(checkpoint: Checkpoint, partial: Path, progress: Callable[[int], Any]) -> None:
    """Write all tensors under their standard names, a shared factor below its owner."""
    writer, shared = TensorWriter(partial), checkpoint.shared

    def put(name: str, stored: str) -> None:
        writer.add(name, checkpoint.files.read(stored))

    for name in checkpoint.arrays:
        put(name, name)
        progress(1)
    for path, stored in checkpoint.matrices.items():
        stem = path.removesuffix("_proj")
        if stored.weight:
            put(f"{path}.weight", stored.weight)
        if stored.down and path not in shared:
            put(f"{stem}_v_proj.weight", stored.down)
        if stored.up:
            put(f"{stem}_u_proj.weight", stored.up)
        if stored.bias:
            put(f"{path}.bias", stored.bias)
        progress(1)
    writer.close()


def _config(checkpoint: Checkpoint, family: str, origin: dict[str, str]) -> dict[str, Any]:
    """The source's config.json as transformers knows it, with a `low_rank` entry such as the compressor writes."""
    raw, architecture = checkpoint.raw, checkpoint.config.architecture
    config = {key: value for key, value in raw.items() if key not in _FAMILY_KEYS | {"low_rank"}} | {
        "model_type": architecture,
        "architectures": [_CLASSES[architecture]],
        "tie_word_embeddings": checkpoint.config.tied,
    }
    # A folder of the standard format knows its history better than its tensors do.
    before = raw.get("low_rank") or {}
    if not checkpoint.ranks and not before:
        return config
    keep = {name: round(value, 6) for name, value in checkpoint.keep._asdict().items()}
    asked = before["keep"] if isinstance(before.get("keep"), dict) else {}
    low_rank = {"format_version": FORMAT_VERSION, "method": family} | origin | before
    low_rank |= {"keep": asked | keep, "ranks": checkpoint.ranks, "shared": checkpoint.shared}
    return config | {"low_rank": {key: value for key, value in low_rank.items() if key != "shared" or value}}
