"""The three NeuronCores that kernels are checked against, as their public documentation describes them.

Sources, all in github.com/aws-neuron/aws-neuron-sdk: nki/guides/architecture/trainium_inferentia2_arch.rst (trn1),
trainium2_arch.rst, trainium3_arch.rst, about-neuron/arch/neuron-hardware/*.rst (bandwidth of the HBM) and
nki/deep-dives/nki-dma-bandwidth-guide.rst (DMA engines).
"""

from dataclasses import dataclass

from jaxsvd.kernels.neuron.emulator.errors import refuse

PARTITIONS = 128
PSUM_BANKS = 8
BANK_BYTES = 2048  # of a PSUM bank, per partition
STATIONARY_MAX = 128  # columns of the stationary operand of a matmul
RESERVED_SBUF = 16 * 1024 + 8 + 520  # bytes per partition that the compiler keeps: what nki-library subtracts on trn2


@dataclass(frozen=True)
class Target:
    """One NeuronCore: sizes in bytes, clocks in Hz, rates in bytes per second.

    `hbm_share` is the bandwidth of the chip's HBM over its cores, `dma_rate` what 16 DMA engines reach in the
    bandwidth guide's table.
    """

    name: str
    generation: int
    sbuf_partition: int
    tensor_clock: float
    vector_clock: float
    scalar_clock: float
    gpsimd_clock: float
    hbm_share: float
    dma_rate: float

    @property
    def sbuf_usable(self) -> int:
        """Bytes of a partition that tiles may take: an assumption, the documentation prints no number."""
        return self.sbuf_partition - RESERVED_SBUF

    def moving_max(self, itemsize: int) -> int:
        """The most columns of a matmul's moving operand, for a dst of `itemsize` bytes: a bank, or all from gen4 on."""
        return 512 if self.generation < 4 else PSUM_BANKS * BANK_BYTES // itemsize


TARGETS = {
    target.name: target
    for target in (
        # HBM: 820 GB/s over 2 cores; DMA: 16 engines × 17 GB/s
        Target("trn1", 2, 192 * 1024, 2.8e9, 1.12e9, 1.4e9, 1.4e9, 820e9 / 2, 16 * 17e9),
        # HBM: 2.9 TB/s over 8 cores (the architecture guide says 3); DMA: 16 × 23
        Target("trn2", 3, 224 * 1024, 2.4e9, 0.96e9, 1.2e9, 1.2e9, 2.9e12 / 8, 16 * 23e9),
        # HBM: 4.9 TB/s over 8 cores (the architecture guide says 4.7); DMA: 16 × 33
        Target("trn3", 4, 256 * 1024, 2.4e9, 1.2e9, 1.2e9, 1.2e9, 4.9e12 / 8, 16 * 33e9),
    )
}


def get_target(name: str) -> Target:
    """The target of that name; EmulationError for any other name."""
    if name not in TARGETS:
        refuse("target", f"one of {', '.join(TARGETS)}", repr(name))
    return TARGETS[name]
