"""`--counts`: what the timed scans must take of a chip, and what our plans for it take. It needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mdm.plugins.contract import SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN
from mdm.plugins.errors import InputError
from mdm.plugins.gpu.counts import CHIPS, Chip, Work, done, floor, least_time
from mdm.plugins.gpu.variants import choose
from mdm.tools.gpu_check.cases import TIMED, Case
from mdm.tools.gpu_check.tables import short, table


def chip_named(name: str) -> Chip:
    if name not in CHIPS:
        raise InputError(f"there is no chip '{name}' in the counts\nknown: {', '.join(CHIPS)}")
    return CHIPS[name]


def counted(chip: Chip) -> Iterator[str]:
    """Markdown."""
    yield f"Counted for the {chip.name}: {chip.source}."
    yield f"A second has at most {chip.bandwidth / 1e12:.3g} TB of device memory, {2 * chip.products / 1e12:.3g} T"
    yield f"operations on matrices of half types, {2 * chip.operations / 1e12:.3g} T on float32, and"
    yield f"{chip.specials / 1e12:.3g} T special results (exponentials and reciprocals)."
    yield ""
    yield "MB: of device memory, each buffer once a launch. Loaded: by all programs, from the caches where they can."
    yield "G: 10^9 multiply-adds or special results. Least: what binds, were all else free."
    yield ""
    head = ("scan", "", "launches", "MB", "loaded MB", "matrix G", "float32 G", "special G", "least µs", "bound by")
    rows = []
    for case in TIMED:
        plan = choose(case.operator, case.dtype, case.sizes, case.has, chip.multiprocessors, chip.capability)
        rows.append((scan_name(case), "floor", *cells(floor(case.operator, case.dtype, case.sizes, case.has), chip)))
        rows.append(("", "ours", *cells(done(plan), chip)))
    yield from table(head, rows)


def cells(work: Work, chip: Chip) -> tuple[str, ...]:
    seconds, binding = least_time(work, chip)
    counts = (work.moved / 1e6, work.loaded / 1e6, work.products / 1e9, work.operations / 1e9, work.specials / 1e9)
    return (str(work.launches or ""), *map(short, counts), short(1e6 * seconds), binding)


def scan_name(case: Case) -> str:
    """ "SSD B2 L1064 H64 P64 N128 bf16"."""
    name, letters = NAMES[case.operator.name]
    sizes = " ".join(f"{letter}{case.sizes[letter]}" for letter in letters)
    return f"{name} {sizes} {TYPES[case.dtype]}"


NAMES = {SSD_SCAN.name: ("SSD", "BLHPN"), SELECTIVE_SCAN.name: ("Mamba-1", "BLD"), SHORT_CONV.name: ("conv", "BLDK")}
TYPES: Mapping[str, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
