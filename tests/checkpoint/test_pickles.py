"""What torch.save wrote is read without torch, and nothing that a pickle asks for is done."""

import builtins
import collections
import copyreg
import mmap
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from jaxsvd.checkpoint.torchfiles import PickledTensors
from jaxsvd.errors import ModelError


def read(path) -> PickledTensors:
    return PickledTensors(Path(path).parent, [Path(path)])


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        read(path)
    return str(caught.value)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# What torch writes.

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict(dtype, protocol, tmp_path):
    whole = torch.randn(6, 10).to(dtype)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[2:5],
        "strided": whole[1::2, 3:9:3],
        "vector": whole[3],
        "scalar": whole[2, 2],
        "empty": whole[:0],
    }
    torch.save(collections.OrderedDict(tensors), tmp_path / "x.pt", pickle_protocol=protocol)
    found = read(tmp_path / "x.pt")
    assert found.entries.keys() == tensors.keys() and found.problems == []
    for name, tensor in tensors.items():
        array = found.read(name)
        assert found.entries[name].shape == tuple(tensor.shape) and found.entries[name].dtype == DTYPES[dtype]
        assert array.dtype == as_numpy(whole).dtype and array.shape == tuple(tensor.shape) and array.flags.c_contiguous
        np.testing.assert_array_equal(array, as_numpy(tensor))


class Block(torch.nn.Module):
    """Its class is pickled by name; reading must not look for it."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(4, 3)
        self.norm = torch.nn.LayerNorm(4)
        self.inner = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False), torch.nn.SiLU()])
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)


@pytest.fixture
def block():
    """A module whose class says that it comes from SVD-LLM's package."""
    Block.__module__ = "component.svd_llama"
    package = type(sys)("component.svd_llama")
    package.Block = Block
    sys.modules |= {"component": type(sys)("component"), "component.svd_llama": package}
    yield Block()
    del sys.modules["component"], sys.modules["component.svd_llama"]


@pytest.mark.parametrize("root", ["module", "model", "state_dict"])
def test_module(block, root, tmp_path):
    expected = block.state_dict()
    if root == "module":
        torch.save(block, tmp_path / "x.pt")
    elif root == "model":
        torch.save({"model": block, "tokenizer": None}, tmp_path / "x.pt")
    else:
        torch.save({"step": 7, "ranks": {"a": 3}, "state_dict": expected}, tmp_path / "x.pt")
    del sys.modules["component.svd_llama"].Block  # from here on the class can't be had
    found = read(tmp_path / "x.pt")
    assert found.entries.keys() == expected.keys()
    assert "passing" not in expected and "kept" in expected
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found.read(name), tensor.numpy())


def test_tensors_with_attributes(tmp_path):
    """How transformers marks what it has initialised."""
    tensor, parameter = torch.arange(3.0), torch.nn.Parameter(torch.arange(4.0))
    tensor.marked = parameter.marked = True
    torch.save({"a": tensor, "b": parameter}, tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert [found.read(name).tolist() for name in "ab"] == [[0, 1, 2], [0, 1, 2, 3]]


def test_weights_beside_a_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Mine, raising=False)
    state = {"a": torch.ones(2)}
    for loss in (torch.tensor(0.5), np.float32(0.5), Mine()):
        torch.save({"loss": loss, "state_dict": state}, tmp_path / "x.pt")
        assert list(read(tmp_path / "x.pt").entries) == ["a"]


class Mine:
    """Settings of a class of the script that trained."""

    __module__ = "__main__"

    def __init__(self):
        self.rate = 1


def test_other_dtypes_matter_only_when_read(tmp_path):
    torch.save({"a": torch.ones(2), "steps": torch.arange(3), "mask": torch.ones(2, 2, dtype=bool)}, tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert found.entries["steps"].dtype == "I64" and found.entries["mask"].dtype == "BOOL"
    assert found.read("a").tolist() == [1, 1]
    with pytest.raises(ModelError, match=r"steps .* is I64: jaxsvd reads F32, F16 and BF16"):
        found.read("steps")


def test_values_that_are_not_numbers(tmp_path):
    torch.save({"a": torch.tensor([1, torch.inf])}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"a in .*x\.pt holds values that are not numbers"):
        read(tmp_path / "x.pt").read("a")


def test_tensors_are_read_from_the_mapped_file(tmp_path):
    """A big file is not in memory before it is asked for, nor twice."""
    torch.save({"a": torch.arange(5.0)}, tmp_path / "x.pt")
    array = read(tmp_path / "x.pt").read("a")
    while not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else array.base


def test_older_files_say_what_to_do(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    message = refusal(tmp_path / "x.pt")
    assert "torch.save since 1.6" in message and "save it again" in message


@pytest.mark.parametrize("content", [b"", b"\x80\x04]q\x00.", b"PK\x03\x04", b"x" * 1000])
def test_no_zip_at_all(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    assert "torch.save" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [{}, [], {"model": 5}, {"a": {"b": 1}}, 7, "text", {"model": {"model": {}}}])
def test_no_weights(value, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    assert "no weights" in refusal(tmp_path / "x.pt")


def test_damage_at_any_byte(block, tmp_path):
    """Flipped bytes are read, or refused with a reason, and nothing else."""
    torch.save({"model": block, "tokenizer": None}, tmp_path / "x.pt")
    whole, rng = (tmp_path / "x.pt").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path / "y.pt").write_bytes(damaged[: rng.integers(1, len(whole))] if rng.random() < 0.2 else damaged)
        try:
            found = read(tmp_path / "y.pt")
            for name, entry in found.entries.items():
                assert found.read(name).shape == entry.shape
        except ModelError:
            refused += 1
    assert 50 < refused < 300


# What others may write: each would leave the file `marker` if it were run.


def save(path: Path, data: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """A file like torch's around any pickle."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


class Reduces:
    """Pickles to a call of anything."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def called(module: str, attribute: str, *arguments: str) -> bytes:
    return b"\x80\x02" + name(module, attribute) + b"(" + b"".join(map(text, arguments)) + b"tR."


def programs(marker: Path) -> dict[str, tuple[bytes, str]]:
    """The pickle of each attack, and what its refusal must name."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    dumps = {}
    for protocol in (2, 4):
        dumps |= {
            f"os.system {protocol}": (pickle.dumps(Reduces(os.system, (touch,)), protocol), "posix.system"),
            f"eval {protocol}": (pickle.dumps(Reduces(eval, (code,)), protocol), ".eval"),
            f"exec {protocol}": (pickle.dumps(Reduces(exec, (code,)), protocol), ".exec"),
            f"Popen {protocol}": (
                pickle.dumps(Reduces(subprocess.Popen, (["touch", str(marker)],)), protocol),
                "Popen",
            ),
            f"getattr {protocol}": (
                pickle.dumps(Reduces(getattr, ("", "join")), protocol),
                "getattr",
            ),
            f"open {protocol}": (pickle.dumps(Reduces(builtins.open, (str(marker), "w")), protocol), "open"),
            f"a __reduce__ to str {protocol}": (pickle.dumps(Reduces(str, (b"x",)), protocol), "it names"),
            f"__import__ {protocol}": (pickle.dumps(Reduces(__import__, ("os",)), protocol), "__import__"),
        }
    system = [b"\x80\x04", text("system"), b"\x94", text("os"), b"\x94"]
    pieces = {
        "torch.hub.load": (called("torch.hub", "load", "repo", "model"), "torch.hub.load"),
        "torch.load": (called("torch", "load", str(marker)), "torch.load"),
        "numpy": (called("numpy.core.multiarray", "_reconstruct", "x"), "numpy.core.multiarray._reconstruct"),
        "numpy.load": (called("numpy", "load", str(marker)), "numpy.load"),
        "functools.partial": (called("functools", "partial", "x"), "functools.partial"),
        "a dotted name": (b"\x80\x04" + text("torch.nn") + text("os.system") + b"\x93.", "it names torch.nn.os.system"),
        "a neighbour of an inert package": (called("transformers_evil", "run", "x"), "transformers_evil.run"),
        "an inert package as a prefix": (called("modulesx.os", "run", "x"), "modulesx.os.run"),
        # The names come from the memo, in the other order, so that no text next to the opcode tells them.
        "STACK_GLOBAL from the memo": (b"".join(system) + b"00h\x01h\x00\x93" + text(touch) + b"\x85R.", "os.system"),
        "STACK_GLOBAL of no text": (b"\x80\x04K\x01K\x02\x93.", "no text"),
        "a name kept in the memo": (
            b"\x80\x02" + name("os", "system") + b"q\x000h\x00" + text(touch) + b"\x85R.",
            "os.system",
        ),
        "INST": (b"(" + text(touch) + b"ios\nsystem\n.", "INST"),
        "OBJ": (b"(" + name("torch.nn", "Linear") + text(touch) + b"o.", "OBJ"),
        "INST of an inert class": (b"(" + text("x") + b"icomponent\nX\n.", "INST"),
        "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\x00.", "EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        "PERSID": (b"P../../etc/passwd\n.", "PERSID"),
        "NEWOBJ_EX": (b"\x80\x04" + name("torch.nn", "Linear") + b")}\x92.", "NEWOBJ_EX"),
        "NEWOBJ of a function": (b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b")\x81.", "damaged"),
        "a call of what was made": (b"\x80\x02" + name("component", "X") + b")R)R.", "calls a bag"),
        "a call of a storage class": (b"\x80\x02" + name("torch", "FloatStorage") + b")R.", "torch.FloatStorage"),
        "a call of a dtype": (b"\x80\x02" + name("torch", "float32") + b")R.", "torch.float32"),
        "a call with no tuple": (b"\x80\x02" + name("component", "X") + b"]R.", "calls component.X"),
        # BUILD would set attributes of our own functions and classes, had the machine any to give.
        "BUILD of a function": (
            b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b"}" + text("__code__") + text("x") + b"sb.",
            "sets attributes of torch._utils._rebuild_tensor_v2",
        ),
        "BUILD of a class": (
            b"\x80\x02" + name("collections", "OrderedDict") + b"}" + text("__setstate__") + text("x") + b"sb.",
            "sets attributes of collections.OrderedDict",
        ),
        "BUILD of a text": (b"\x80\x02" + text("x") + b"}b.", "sets attributes of a str"),
        "items of a class": (b"\x80\x02" + name("collections", "OrderedDict") + b"(K\x01K\x02u.", "sets items"),
        "appends to a class": (b"\x80\x02" + name("torch", "Size") + b"K\x01a.", "appends"),
        "_reconstructor of a builtin": (
            b"\x80\x02" + name("copy_reg", "_reconstructor") + name("__builtin__", "object") + b"NN\x87R.",
            "makes an object of",
        ),
        "a tensor made by a class": (
            b"\x80\x02" + name("torch._tensor", "_rebuild_from_type_v2") + b"(" + name("torch.nn", "X") + b"N)NtR.",
            "makes a tensor by torch.nn.X",
        ),
        "a tensor made of itself": (
            b"\x80\x02" + name("torch._tensor", "_rebuild_from_type_v2") + b"q\x00(h\x00N)NtR.",
            "makes a tensor by torch._tensor._rebuild_from_type_v2",
        ),
        "no end": (b"\x80\x02}", "damaged"),
        "an empty stack": (b"\x80\x02.", "damaged"),
        "no mark": (b"\x80\x02K\x01t.", "damaged"),
        "an unknown memo": (b"\x80\x02h\x07.", "damaged"),
        "nothing": (b"", "damaged"),
    }
    return dumps | pieces


ATTACKS = sorted(programs(Path("marker")))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_and_does_nothing(attack, tmp_path):
    marker = tmp_path / "marker"
    data, words = programs(marker)[attack]
    message = refusal(save(tmp_path / "x.pt", data))
    assert words in message and "is refused" in message
    assert not marker.exists()


@pytest.mark.parametrize("attack", ["os.system 2", "eval 4", "STACK_GLOBAL from the memo", "a name kept in the memo"])
def test_the_attacks_are_real(attack, tmp_path):
    """Python's own unpickler runs them: the marker would show."""
    marker = tmp_path / "marker"
    pickle.loads(programs(marker)[attack][0])
    assert marker.exists()


def test_registered_extensions_are_not_used(tmp_path):
    copyreg.add_extension("os", "system", 1)
    try:
        marker = tmp_path / "marker"
        data = b"\x80\x02\x82\x01" + text(f"touch {marker}") + b"\x85R."
        assert "EXT1" in refusal(save(tmp_path / "x.pt", data))
        assert not marker.exists()
    finally:
        copyreg.remove_extension("os", "system", 1)


@pytest.mark.parametrize("module", ["component", "transformers", "torch.nn"])
def test_no_module_is_imported(module, tmp_path, monkeypatch):
    package = tmp_path / module.split(".")[0]
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    (package / "nn.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    tensor = pickled_tensor()
    data = b"\x80\x02}(" + text("x") + name(f"{module}.never_there", "X") + b")R" + text("a") + tensor + b"u."
    assert list(read(save(tmp_path / "x.pt", data, {"0": bytes(16)})).entries) == ["a"]
    assert not (tmp_path / "marker").exists() and not {m for m in set(sys.modules) - before if "never_there" in m}


# Tensors and storages that lie.


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values) -> bytes:
    return b"(" + b"".join(number(v) for v in values) + b"t"


def pickled_tensor(key="0", numel=4, offset=0, shape=(2, 2), stride=(2, 1), kind="FloatStorage", word="storage"):
    identity = b"(" + text(word) + name("torch", kind) + text(key) + text("cpu") + number(numel) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(stride) + b"\x89" + name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + identity + rest + b"tR"


def with_tensor(path, content=bytes(16), **options) -> Path:
    return save(path, b"\x80\x02}" + text("a") + pickled_tensor(**options) + b"s.", {"0": content})


def test_the_tensor_that_does_not_lie(tmp_path):
    found = read(with_tensor(tmp_path / "x.pt", np.arange(4, dtype=np.float32).tobytes()))
    assert found.read("a").tolist() == [[0, 1], [2, 3]]


LIES = {
    "a path for a key": ({"key": "../../etc/passwd"}, "'../../etc/passwd' of a is not in it"),
    "an absolute path": ({"key": "/etc/passwd"}, "'/etc/passwd' of a is not in it"),
    "no such key": ({"key": "1"}, "is not in it"),
    "another member": ({"key": "../data.pkl"}, "is not in it"),
    "no storage": ({"word": "module"}, "persistent object that is no storage"),
    "an unknown storage": ({"kind": "UntypedStorage"}, "torch.UntypedStorage"),
    "a function for a storage": ({"kind": "save"}, "torch.save"),
    "more elements than bytes": ({"numel": 5}, "too few for 5 elements"),
    "huge storage": ({"numel": 2**61}, "too few"),
    "negative storage": ({"numel": -1}, "no sense"),
    "huge shape": ({"shape": (2**40, 2**40), "stride": (0, 0)}, "reaches beyond"),
    "expanded": ({"shape": (2**20, 4), "stride": (0, 1)}, "reaches beyond"),
    "beyond the end": ({"shape": (2, 3)}, "reaches beyond"),
    "offset beyond the end": ({"offset": 1}, "reaches beyond"),
    "stride beyond the end": ({"stride": (3, 1)}, "reaches beyond"),
    "negative offset": ({"offset": -1}, "no sense"),
    "negative shape": ({"shape": (-1, 2)}, "no sense"),
    "negative stride": ({"stride": (-2, 1)}, "no sense"),
    "numbers beyond 64 bits": ({"shape": (2**63, 2)}, "no sense"),
    "another number of strides": ({"stride": (1,)}, "no sense"),
    "many dimensions": ({"shape": (1,) * 1000, "stride": (0,) * 1000}, "no sense"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_tensor_is_refused(lie, tmp_path):
    options, words = LIES[lie]
    message = refusal(with_tensor(tmp_path / "x.pt", **options))
    assert words in message and "is refused" in message


@pytest.mark.parametrize("shape", ["texts", "none", "mapping"])
def test_shape_of_another_kind(shape, tmp_path):
    raw = {"texts": b"(" + text("a") + text("b") + b"t", "none": b"N", "mapping": b"}"}[shape]
    data = pickled_tensor().replace(numbers((2, 2)), raw)
    assert "is refused" in refusal(save(tmp_path / "x.pt", b"\x80\x02}" + text("a") + data + b"s.", {"0": bytes(16)}))


def test_a_tensor_of_no_storage(tmp_path):
    data = b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b"(NNNNNNtR."
    assert "no storage" in refusal(save(tmp_path / "x.pt", data))


# Archives that lie.


def test_compressed_archive_is_refused(tmp_path):
    """A zip bomb is small only because it is compressed."""
    path = save(tmp_path / "x.pt", pickle.dumps("x" * 10**7, 2), method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    assert "compressed" in refusal(path)


def test_member_beyond_the_end(tmp_path):
    path = with_tensor(tmp_path / "x.pt")
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")  # the last member is the storage: its size in the directory
    lie = struct.pack("<II", 10**6, 10**6)
    path.write_bytes(raw[: at + 20] + lie + raw[at + 28 :])
    assert "beyond the end" in refusal(path)


def test_member_elsewhere(tmp_path):
    path = with_tensor(tmp_path / "x.pt")
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")
    path.write_bytes(raw[: at + 42] + struct.pack("<I", 5) + raw[at + 46 :])
    assert "directory says" in refusal(path)


def test_member_before_the_beginning(tmp_path):
    """The directory is said to lie further on than it does, so all members lie before the file; Python would count
    such places from its end, where there is a second copy of them.
    """
    raw = with_tensor(tmp_path / "x.pt").read_bytes()
    directory, end = raw.index(b"PK\x01\x02"), raw.rindex(b"PK\x05\x06")
    lie = struct.pack("<IH", 2 * directory, directory)  # where the directory is, and the length of the comment
    (tmp_path / "x.pt").write_bytes(raw[: end + 16] + lie + raw[:directory])
    assert "before its beginning" in refusal(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(tmp_path):
    path = with_tensor(tmp_path / "x.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert "twice" in refusal(path)


@pytest.mark.parametrize(
    ("member", "content", "words"),
    [("byteorder", b"big", "big-endian"), ("constants.pkl", b"", "TorchScript"), ("other", b"", "no data.pkl")],
)
def test_other_archives(member, content, words, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr(f"archive/{member}", content)
        if member != "other":
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert words in refusal(tmp_path / "x.pt")


# Pickles made to take for ever.


def modules(children: bytes) -> bytes:
    return b"}" + text("_modules") + b"}(" + children + b"us"


def test_modules_that_double(tmp_path):
    """Forty modules, each holding the one before twice: 2⁴⁰ paths."""
    data = b"\x80\x02" + name("component", "X") + b")Rq\x00"
    for i in range(40):
        held = b"h" + bytes([i])
        children = text("a") + held + text("b") + held
        data += b"0" + name("component", "X") + b")R" + modules(children) + b"bq" + bytes([i + 1])
    start = time.perf_counter()
    assert "without end" in refusal(save(tmp_path / "x.pt", data + b"."))
    assert time.perf_counter() - start < 30


def test_module_in_itself(tmp_path):
    data = b"\x80\x02" + name("component", "X") + b")Rq\x00" + modules(text("a") + b"h\x00") + b"b."
    assert "without end" in refusal(save(tmp_path / "x.pt", data))


@pytest.mark.parametrize("call", ["torch Size", "builtins set", "builtins frozenset", "collections OrderedDict"])
def test_copies_without_end(call, tmp_path):
    """One tuple of 10⁴, which a thousand calls would copy."""
    data = b"\x80\x02(" + b"N" * 10**4 + b"tq\x000" + name(*call.split()) + b"q\x010]("
    path = save(tmp_path / "x.pt", data + b"h\x01h\x00\x85R" * 1000 + b"e.")
    tracemalloc.start()
    assert "is refused" in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


def test_keys_that_are_slow_to_hash(tmp_path):
    """A number of 10⁵ digits, hashed at each of 10⁵ uses; Python keeps no hash of a number."""
    number = b"\x8b" + struct.pack("<I", 10**5) + b"\x01" * 10**5
    start = time.perf_counter()
    assert "no weights" in refusal(
        save(tmp_path / "x.pt", b"\x80\x02" + number + b"q\x000}" + b"h\x00Ns" * 10**5 + b".")
    )
    assert time.perf_counter() - start < 10


def module(members: bytes) -> bytes:
    return name("component", "X") + b")R}" + members + b"b"


def test_names_that_grow(tmp_path):
    """A module of a long name, in whose name its thousands of children would share."""
    children = b"}(" + b"".join(text(str(i)) + b"h\x00" for i in range(2000)) + b"u"
    inner = module(text("_modules") + children + b"s")
    data = b"\x80\x02" + module(b"") + b"q\x000" + module(text("_modules") + b"}" + text("x" * 500_000) + inner + b"ss")
    tracemalloc.start()
    assert "more than 256 characters" in refusal(save(tmp_path / "x.pt", data + b"."))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


def test_a_tensor_of_a_long_name(tmp_path):
    data = b"\x80\x02}" + text("module." * 10**5) + pickled_tensor() + b"s."
    assert "more than 256 characters" in refusal(save(tmp_path / "x.pt", data, {"0": bytes(16)}))


@pytest.mark.parametrize("group", ["_parameters", "_non_persistent_buffers_set"])
def test_modules_that_hold_the_same_again(group, tmp_path):
    """A thousand names of a module of a thousand parameters make a million tensors."""
    many = (text(str(i)) for i in range(1000))
    if group == "_parameters":
        held = b"}(" + b"".join(one + b"h\x00" for one in many) + b"u"
    else:
        held = b"](" + b"".join(many) + b"e"
    data = b"\x80\x02" + pickled_tensor() + b"q\x000" + module(text(group) + held + b"s") + b"q\x010"
    children = b"}(" + b"".join(text(str(i)) + b"h\x01" for i in range(1000)) + b"u"
    path = save(tmp_path / "x.pt", data + module(text("_modules") + children + b"s") + b".", {"0": bytes(16)})
    assert "without end" in refusal(path)


def test_deep_nesting(tmp_path):
    """Hashing or comparing it would end the process."""
    deep = b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s."
    assert "no weights" in refusal(save(tmp_path / "x.pt", deep))


def test_a_pickle_too_large_is_not_walked(tmp_path):
    start = time.perf_counter()
    assert "64 MiB" in refusal(save(tmp_path / "x.pt", b"\x80\x02" + b")" * (1 << 26)))
    assert time.perf_counter() - start < 5


def test_a_long_name_is_cut(tmp_path):
    assert len(refusal(save(tmp_path / "x.pt", b"c" + b"x" * 10**6 + b"\ny\n."))) < 1000


def test_the_stream_is_what_it_seems(tmp_path):
    """Two readers of one pickle must see the same program: what follows the first STOP is not read by either."""
    data = b"\x80\x02}." + called("os", "system", f"touch {tmp_path / 'marker'}")
    assert pickle.loads(data) == {} and [op.name for op, _, _ in pickletools.genops(data)][-1] == "STOP"
    assert "no weights" in refusal(save(tmp_path / "x.pt", data))
