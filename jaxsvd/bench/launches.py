"""How many kernels a compiled step starts, read from the HLO that XLA made of it.

Counted is every instruction that XLA runs as a unit of its own: a fusion, a product, a custom call, a copy, a sort …,
each once for every turn of the loops around it. Not counted is what moves no data: parameters, constants, tuples,
bitcasts, the second half of what runs asynchronously; nor a loop's own bookkeeping outside its body. An instruction
that a library serves with two kernels counts once, and what a CUDA graph starts together counts one by one, so that the
figure is one of the program: how finely the work is cut, not how long cutting it takes. On a CPU it counts calls.
"""

import re
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class _Instruction(NamedTuple):
    opcode: str
    line: str

    def called(self, attribute: str) -> str:
        found = re.search(attribute + r"=%?([\w.\-]+)", self.line)
        return found[1] if found else ""


def count(hlo: str) -> int | None:
    """The kernels that one call of a compiled step starts, from its text; None where it does not tell."""
    entry, computations = _parse(hlo)

    def of(name: str) -> int:
        return sum(one(instruction) for instruction in computations[name])

    def one(instruction: _Instruction) -> int:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        if opcode == "call":
            return of(instruction.called("to_apply"))
        if opcode == "while":
            return int(_TRIPS.findall(instruction.line)[0]) * of(instruction.called("body"))
        if opcode == "conditional":
            raise KeyError(opcode)  # which branch runs is not in the text
        return 1

    try:
        return of(entry)
    except (KeyError, IndexError):  # a loop of unknown length, or text of a form that is not known here
        return None


def _parse(hlo: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """The entry's name, and the instructions of every computation."""
    entry, name = "", ""
    computations: dict[str, list[_Instruction]] = {}
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            computations[name].append(_Instruction(found[1], line))
    return entry, computations
