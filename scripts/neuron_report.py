"""What the Trainium kernels cost, emulated: python scripts/neuron_report.py (`--help` lists the options)."""

import sys

from jaxsvd.cli import run

if __name__ == "__main__":
    sys.exit(run("neuron-report"))
