"""A lint of kernel source for NKI's subset of Python, as far as its documentation says what is not in it.

The emulator runs kernels as Python, the NKI compiler does not: what it refuses shows here, without running anything.
Sources: nki/get-started/nki-language-guide.rst and nki/migration/index.rst ("Language restrictions") of the SDK.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


class Finding(NamedTuple):
    """A construct, at a line, that the NKI compiler does not take."""

    line: int
    text: str


Findings = Iterator[Finding]


def lint(path: Path) -> list[Finding]:
    """The findings in a kernel file, by line; none where it keeps to the subset."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = {function.name for function in functions if _is_kernel(function)}
    found = [finding for check in (_old_imports, _classes) for finding in check(tree)]
    for function in functions:
        found.extend(_signature(function, function.name in kernels))
        found.extend(finding for check in BODY for node in ast.walk(function) for finding in check(node))
        found.extend(_calls_of_kernels(function, kernels))
        found.extend(_mutable_globals(function, tree))
    return sorted(set(found))


def _is_kernel(function: ast.FunctionDef) -> bool:
    """Whether it is decorated by `nki.jit` or `jit`, called or not."""
    names = [ast.unparse(node.func if isinstance(node, ast.Call) else node) for node in function.decorator_list]
    return any(name in ("nki.jit", "jit") for name in names)


def _old_imports(tree: ast.AST) -> Findings:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "neuronxcc" for name in names):
            yield Finding(node.lineno, "neuronxcc.nki: import nki")  # type: ignore[attr-defined]


def _classes(tree: ast.AST) -> Findings:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
            if bases not in (["NKIObject"], ["Enum"]):
                yield Finding(node.lineno, f"class {node.name}: its only base must be NKIObject (or Enum)")


def _signature(function: ast.FunctionDef, is_kernel: bool) -> Findings:
    arguments = function.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
        yield Finding(function.lineno, f"{function.name}: no `*` in a signature")
    if is_kernel and any(isinstance(default, ast.List) for default in arguments.defaults):
        yield Finding(function.lineno, f"{function.name}: arguments of a kernel can be tuples, not lists")
    for decorator in function.decorator_list:
        if is_kernel and isinstance(decorator, ast.Call) and decorator.keywords:
            yield Finding(decorator.lineno, "nki.jit takes no options")


def _identity(node: ast.AST) -> Findings:
    if isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        yield Finding(node.lineno, "`is`: use == or !=")


def _dict_keys(node: ast.AST) -> Findings:
    if isinstance(node, ast.Dict):
        for key in node.keys:
            if isinstance(key, ast.Constant | ast.Tuple) and not isinstance(getattr(key, "value", None), str):
                yield Finding(node.lineno, "the keys of a dictionary must be strings")


def _local_imports(node: ast.AST) -> Findings:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield Finding(node.lineno, "import inside a function")


def _outer_state(node: ast.AST) -> Findings:
    if isinstance(node, ast.Global | ast.Nonlocal):
        yield Finding(node.lineno, "kernels are pure: no global or nonlocal")


def _keywords(node: ast.AST) -> Findings:
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield Finding(node.lineno, "mask=: use a partial tile")
            if keyword.arg == "buffer" and isinstance(keyword.value, ast.Constant):
                yield Finding(node.lineno, "buffers are members of nl, such as nl.sbuf")


BODY: tuple[Callable[[ast.AST], Findings], ...] = (_identity, _dict_keys, _local_imports, _outer_state, _keywords)


def _calls_of_kernels(function: ast.FunctionDef, kernels: set[str]) -> Findings:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kernels:
            yield Finding(node.lineno, f"{node.func.id} is under @nki.jit: kernels call plain functions only")


def _mutable_globals(function: ast.FunctionDef, tree: ast.Module) -> Findings:
    """Reads of a module's lists, dictionaries and sets: compiled kernels are cached without a look at them."""
    mutable = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, MUTABLE)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    local = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {arg.arg for arg in function.args.args}
    for node in names:
        if node.id in mutable - local:
            yield Finding(node.lineno, f"{node.id} is mutable and outside of the kernel: make it a tuple")
