"""What Google publishes of its TPU chips and hosts, and what their compiler says of them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A generation of TPU.

    Published at docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and, for the hosts, .../tpu/docs/regions-zones and the
    machine types ct4p, ct5lp, ct5p and ct6e, except where another source is named.

    Attributes:
        name: as in names of slices.
        kind: JAX's `device_kind`.
        peak_tflops: dense bfloat16 products, 10¹² operations a second.
        hbm_gib: memory that a program can use, GiB: what libtpu 0.0.42.1 names where a program does not fit. The
            published sizes are 32, 16, 95 and 32.
        hbm_gb_per_s: bandwidth of that memory, 10⁹ bytes a second.
        clock_ghz: cycles of the compiler's estimates a nanosecond. Derived from the peak: a matrix unit does 128²
            multiplications and additions a cycle (v6e: 256²); v4 and v5p have 8 units, v5e and v6e 4. (Today's page
            says 2 for v6e; at the clock that this gives, the compiler would multiply faster than the peak.)
        link_gb_per_s: of one link to a neighbour, in one direction, 10⁹ bytes a second.
        axes: of the torus of chips: each chip has two links along each.
        cores_per_chip: that names such as v4-8 count.
        chips_per_host: in a slice of several hosts.
        host_cores: virtual CPUs of such a host.
        most_chips: of the largest slice.
    """

    name: str
    kind: str
    peak_tflops: float
    hbm_gib: float
    hbm_gb_per_s: float
    clock_ghz: float
    link_gb_per_s: float
    axes: int
    cores_per_chip: int
    chips_per_host: int = 4
    host_cores: int
    most_chips: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kind="TPU v4", peak_tflops=275.0, hbm_gib=30.75, hbm_gb_per_s=1228.0, clock_ghz=1.049,
            link_gb_per_s=50.0, axes=3, cores_per_chip=2, host_cores=240, most_chips=4096,
        ),
        Chip(
            name="v5e", kind="TPU v5 lite", peak_tflops=197.0, hbm_gib=15.75, hbm_gb_per_s=819.0, clock_ghz=1.503,
            link_gb_per_s=50.0, axes=2, cores_per_chip=1, host_cores=112, most_chips=256,
        ),
        Chip(
            name="v5p", kind="TPU v5", peak_tflops=459.0, hbm_gib=95.74, hbm_gb_per_s=2765.0, clock_ghz=1.751,
            link_gb_per_s=100.0, axes=3, cores_per_chip=2, host_cores=208, most_chips=6144,
        ),
        Chip(
            name="v6e", kind="TPU v6 lite", peak_tflops=918.0, hbm_gib=31.25, hbm_gb_per_s=1638.0, clock_ghz=1.751,
            link_gb_per_s=100.0, axes=2, cores_per_chip=1, host_cores=180, most_chips=256,
        ),
    )
}  # fmt: skip


def of_kind(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for a device that is not in the table, such as a CPU or a GPU."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
