"""The pickle inside of what `torch.save` writes, walked without running any of it. For the converter alone.

A pickle is a program. This one is not run: its opcodes are walked by a small machine of our own, whose only objects
are numbers, strings, containers, tensors that know where their bytes lie, and inert stand-ins for the classes that
models are made of. What it names beyond those is refused by its name, so nothing outside this file is ever called;
`pickle` itself is not even imported.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The packages that pickled models name classes and functions of. Their names are kept, their code is not looked for.
INERT = (
    *("component", "modules", "models", "transformers", "transformers_modules", "tokenizers", "peft", "accelerate"),
    *("torch.nn", "torch._C._nn", "__main__"),
)
# Storage classes: what safetensors calls their elements, and how many bytes one has.
_STORAGES = {
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.DoubleStorage": ("F64", 8),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}
# Values that are named, never called.
_VALUES = {
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8")),
    *(f"torch.int{bits}" for bits in (8, 16, 32, 64)),
    *("builtins.object", "__builtin__.object", "torch.Tensor"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or a function by its name: nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def inert(self) -> bool:
        """Whether it belongs to a package that models are made of."""
        return any(self.module == package or self.module.startswith(package + ".") for package in INERT)


@dataclass(slots=True, eq=False)
class Bag:
    """An object of an inert class: its name and its state."""

    kind: Global
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage, as yet unchecked: `offset` and `stride` count elements."""

    storage: "Storage"
    offset: Any
    shape: Any
    stride: Any


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A storage by its key in the archive; `numel` is as unchecked as what a tensor says."""

    key: str
    kind: str
    dtype: str
    itemsize: int
    numel: Any


_MARK = object()
_CONSTANTS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
}
_SINGLETONS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME", "STOP"}


class Refused(Exception):
    """Why a pickle is not read."""


def unpickle(data: bytes) -> Any:
    """What a pickle describes, of numbers, strings, containers, `Tensor`s and `Bag`s. Raises `Refused` with the reason.

    Sets become lists or tuples, the bytes of protocol 2 None, and keys that are no text keys of their own. The result
    takes memory in proportion to the pickle: objects are shared as the pickle shares them, never copied.
    """
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(data):
            try:
                machine.step(opcode.name, argument)
            except Refused as refused:
                raise Refused(f"{str(refused)[:300]} (at byte {position} of its data.pkl)") from None
        (result,) = machine.stack
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise Refused(f"its data.pkl is damaged ({error})") from None
    return result


class _Machine:
    """The stack and the memo of a pickle, and what each opcode does with them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do what one opcode says."""
        stack = self.stack
        if name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(argument)
        elif name in _SINGLETONS:
            stack.append(_SINGLETONS[name])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(self._last(_TUPLES[name]))]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("LIST", "FROZENSET"):
            stack.append(self._since_mark())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            self._extend(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            self._update(stack[-1], dict(zip(map(_key, items[::2]), items[1::2], strict=True)))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, kind = argument.split(" ", 1) if argument else (stack.pop(-2), stack.pop())
            stack.append(_known(module, kind))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = stack.pop(-2), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "POP":
            stack.pop()
        elif name == "BUILD":
            self._build(stack[-2], stack.pop())
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name not in _IGNORED:
            raise Refused(f"it uses the opcode {name}, which torch.save does not write")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is too short")
        return self.stack[-count:]

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("there is no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    @staticmethod
    def _extend(target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target += items
        elif not isinstance(target, Bag):
            raise Refused(f"it appends to {describe(target)}")

    @staticmethod
    def _update(target: Any, items: dict[Any, Any]) -> None:
        if isinstance(target, dict):
            target |= items
        elif not isinstance(target, Bag):
            raise Refused(f"it sets items of {describe(target)}")

    @staticmethod
    def _build(target: Any, state: Any) -> None:
        if isinstance(target, Bag):
            target.state = state
        elif target is not None and not isinstance(
            target, dict | Tensor
        ):  # an OrderedDict's and a parameter's attributes are of no use
            raise Refused(f"it sets attributes of {describe(target)}")


def describe(value: Any) -> str:
    """A few words for an error."""
    return str(value) if isinstance(value, Global) else f"a {type(value).__name__.lower()}"


def _key(key: Any) -> Any:
    """A key of a dictionary; what is no text, and may be costly to hash each time, becomes one of its own."""
    return key if isinstance(key, str) else object()


def _known(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("it names a class by something that is no text")
    found = Global(module, name)
    if "." in name or not (found.inert or str(found) in _VALUES.union(_CALLS, _STORAGES)):
        raise Refused(f"it names {found}, which is no part of a model's weights")
    return found


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Refused(f"it calls {describe(function)}")
    if handler := _CALLS.get(str(function)):
        return handler(*arguments)
    if function.inert:
        return Bag(function)
    raise Refused(f"it calls {function}")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise Refused("it makes a tensor of something that is no storage")
    return Tensor(storage, offset, shape, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _typed(function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    """A tensor that has attributes."""
    if not isinstance(function, Global) or _CALLS.get(str(function)) not in (_tensor, _parameter):
        raise Refused(f"it makes a tensor by {describe(function)}")
    return _call(function, arguments)


def _dictionary(*rest: Any) -> dict[Any, Any]:
    if rest:
        raise Refused("it makes a dictionary of something else, which torch.save never does")
    return {}


def _sequence(items: Any = (), *rest: Any) -> Any:
    if not isinstance(items, list | tuple):
        raise Refused(f"it makes a sequence of {describe(items)}")
    return items  # not a copy: a pickle may ask for a million


def _object(kind: Any, *rest: Any) -> Bag:
    if not isinstance(kind, Global) or not kind.inert:
        raise Refused(f"it makes an object of {describe(kind)}")
    return Bag(kind)


def _nothing(*rest: Any) -> None:
    return None


# What may be called: functions of ours that stand for those of the name.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": _sequence,
    "torch.device": _nothing,
    "collections.OrderedDict": _dictionary,
    "builtins.set": _sequence,
    "__builtin__.set": _sequence,
    "builtins.frozenset": _sequence,
    "__builtin__.frozenset": _sequence,
    "numpy.dtype": _nothing,  # a loss beside the weights
    "numpy.core.multiarray.scalar": _nothing,
    "numpy._core.multiarray.scalar": _nothing,
    "_codecs.encode": _nothing,  # how protocol 2 writes bytes: a tokenizer's, of no use here
    "copyreg._reconstructor": _object,
    "copy_reg._reconstructor": _object,
}


def _storage(identity: Any) -> Storage:
    """torch names a storage ("storage", its class, its key in the archive, its device, its elements)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise Refused("it asks for a persistent object that is no storage")
    _, kind, key, _, numel = identity
    if not isinstance(kind, Global) or str(kind) not in _STORAGES or not isinstance(key, str):
        raise Refused(f"it has a storage of {describe(kind)}")
    return Storage(key, str(kind), *_STORAGES[str(kind)], numel)
