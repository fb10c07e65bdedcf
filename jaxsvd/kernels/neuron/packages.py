"""Whether the kernels can be called here: AWS's packages, in versions that go together, a device and its settings.

The versions are those of Neuron SDK 2.32. The public index has other people's empty packages of the same names.
"""

import os
import re
from importlib import metadata
from typing import NamedTuple

from jaxsvd.errors import UsageError
from jaxsvd.kernels.neuron import bridge


class Needed(NamedTuple):
    """A package, the versions of it that work (both ends included, as far as they are written), and pip's word."""

    name: str
    least: tuple[int, ...]
    greatest: tuple[int, ...]
    pin: str


PACKAGES = (
    Needed("nki", (0, 6), (0, 6), "nki==0.6.*"),
    Needed("neuronx-cc", (2, 27), (2, 27), "neuronx-cc==2.27.*"),
    Needed("libneuronxla", (3, 0), (3, 0), "libneuronxla==3.0.*"),
    Needed("jax-neuronx", (0, 7), (0, 10), "jax-neuronx==0.10.*"),
    Needed("jax", (0, 7), (0, 10, 0), "jax==0.10.0"),
)
# On the public index: wheels of one empty file, held so that nobody else puts something worse there.
PLACEHOLDERS = {"nki": "0.0.1", "neuronx-cc": "1.0.post1", "libneuronxla": "1.0", "jax-neuronx": "0.0.0"}
INDEX = "https://pip.repos.neuron.amazonaws.com"
INSTALL = f"pip install {' '.join(repr(needed.pin) for needed in PACKAGES)} --extra-index-url={INDEX}"


def obstacle(platform: str) -> str | None:
    """Why the kernels can't be called on this platform of JAX, in one sentence that says what to do; None if they can.

    What is looked at are the packages, then the device, then the environment.
    """
    for needed in PACKAGES:
        if found := _wrong(needed):
            return f"the backend neuron needs {_versions(needed)}, found {found}: {INSTALL}"
    if platform != "neuron":
        return (
            f"the backend neuron needs a Neuron device, JAX found {platform}: run on a Trainium instance with AWS's "
            "driver (aws-neuronx-dkms), or use backend neuron-emulated"
        )
    cores = os.environ.get(bridge.LNC_VARIABLE)
    if cores != str(bridge.LNC):
        found = "is not set, which means 2 on Trainium2 and 3" if cores is None else f"is {cores}"
        return (
            f"{bridge.LNC_VARIABLE} {found}, and the kernels of the backend neuron are for {bridge.LNC}: run "
            f"`export {bridge.LNC_VARIABLE}={bridge.LNC}` before Python starts"
        )
    return None


def emulated_target(platform: str) -> str:
    """The chip to emulate: `NEURON_PLATFORM_TARGET_OVERRIDE`, else trn2.

    Raises UsageError for one that is unknown, and on a platform that can't call the host.
    """
    from jaxsvd.kernels.neuron.emulator import TARGETS

    if platform == "neuron":
        raise UsageError(
            "the backend neuron-emulated needs a platform with callbacks of the host, found neuron: "
            "use backend neuron, or set JAX_PLATFORMS=cpu"
        )
    target = os.environ.get(bridge.TARGET_VARIABLE) or "trn2"
    if target not in TARGETS:
        raise UsageError(
            f"{bridge.TARGET_VARIABLE} is {target!r}: the backend neuron-emulated knows {', '.join(TARGETS)}"
        )
    return target


def _wrong(needed: Needed) -> str | None:
    """What is there instead of a package that works."""
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return "none"
    if version == PLACEHOLDERS.get(needed.name):
        return f"{version}, the public index's empty placeholder"
    numbers = tuple(map(int, re.findall(r"\d+", version)))
    if needed.least <= numbers and numbers[: len(needed.greatest)] <= needed.greatest:
        return None
    return version


def _versions(needed: Needed) -> str:
    least, greatest = (".".join(map(str, end)) for end in (needed.least, needed.greatest))
    return f"{needed.name} {least}" + (f" to {greatest}" if greatest != least else ".*")
