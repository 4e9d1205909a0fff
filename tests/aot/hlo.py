"""Reads compiled programs: how often an instruction runs, and what it writes."""

import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
BYTES |= {"u32": 4, "s64": 8, "u64": 8}
# They name what is there already.
NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while")
IN_PLACE = ("dynamic-update-slice", "scatter")


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, by name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        begins = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if begins:
            lines = found.setdefault(begins[1], [])
        elif found and line.strip() not in ("", "}"):
            lines.append(line)
    return found


def runs(text: str) -> dict[str, int]:
    """How often the entry and each body of a loop run. Raises ValueError for a loop without a known
    number of trips, for which a GPU would ask the host.
    """
    inside = {}
    for name, lines in computations(text).items():
        for line in lines:
            loop = re.search(r"= .* while\(.*body=%?([\w.\-]+)", line)
            if loop:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                if trips is None:
                    raise ValueError(f"a loop without a known number of trips: {line.strip()}")
                inside[loop[1]] = name, int(trips[1])

    def times(name: str) -> int:
        if name not in inside:
            return 1
        outer, trips = inside[name]
        return trips * times(outer)

    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    return {name: times(name) for name in (entry, *inside)}


def size(shapes: str) -> int:
    """Bytes of all arrays named in a type."""
    return sum(
        BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def written(text: str) -> int:
    """Bytes that instructions write while a program runs. What is updated in place is left out."""
    found, total = computations(text), 0
    for name, count in runs(text).items():
        for line in found[name]:
            made = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
            # What begins apart (jax 0.12) is counted where it is done.
            if made is None or made[2] in NOTHING or made[2].endswith("-start"):
                continue
            fused = re.search(r"calls=%?([\w.\-]+)", line)
            body = found.get(fused[1], []) if fused else [line]
            if not any(f" {kind}(" in inner for inner in body for kind in IN_PLACE):
                total += count * size(made[1])
    return total
