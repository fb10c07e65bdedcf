"""The errors that jaxsvd raises on purpose: each says what was expected, what was found and what to do."""


class JaxsvdError(Exception):
    """Base of all of them. `exit_code` is what a command ends with (3: something failed at run time)."""

    exit_code = 3


class UsageError(JaxsvdError, ValueError):
    """An argument, prompt or option that can't be used."""

    exit_code = 2


class ModelError(JaxsvdError):
    """A model that can't be found or loaded: an unknown name, a broken file, an unsupported architecture."""

    exit_code = 2


class CheckFailed(JaxsvdError):
    """A check that ran to its end and was not passed: its result is out, and a command ends with 1."""

    exit_code = 1
