"""What the emulator raises."""

from typing import NoReturn


class EmulationError(Exception):
    """A kernel broke a rule of NKI, or used something that the emulator does not model.

    The message begins with the name of the rule, which is also `rule`, and says what was expected and found.
    """

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def refuse(rule: str, expected: str, found: object) -> NoReturn:
    """Raise an EmulationError of `rule`."""
    raise EmulationError(rule, f"expected {expected}, found {found}")


def not_modelled(what: str) -> NoReturn:
    """Raise an EmulationError for something that NKI may have and the emulator has not."""
    raise EmulationError("not-modelled", f"the emulator does not model {what}; see jaxsvd/kernels/neuron/emulator")
