"""What devices send each other, read off a compiled program."""

from __future__ import annotations

import collections
import functools
import math
import re

KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
WIDTHS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn"), 1),
    **dict.fromkeys(("bf16", "f16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("s64", "u64"), 8),
}
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_RESULT = re.compile(rf"= (\(?.*?\)?) ({KINDS})(?:-done)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.\-]+)")
_BODY = re.compile(r"body=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def nbytes(hlo: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective on a device, in a program as XLA writes it:
    what is in a loop, as often as that runs.

    Raises ValueError where a loop with collectives does not say how often.
    """
    bodies, entry = _computations(hlo)

    @functools.cache
    def within(name: str) -> collections.Counter:
        found = collections.Counter()
        for line in bodies.get(name, ()):
            if hit := _RESULT.search(line):
                found[hit[2]] += _array_bytes(hit[1])
            for called in _CALLED.findall(line):
                found.update(within(called))
            body = _BODY.search(line)
            if body and (inner := within(body[1])):
                times = _trips(line)
                found.update({kind: times * size for kind, size in inner.items()})
        return found

    return dict(within(entry))


def largest(hlo: str) -> int:
    """Bytes of the largest result of a collective on a device; 0 where there is none."""
    return max((_array_bytes(hit[1]) for hit in _RESULT.finditer(hlo)), default=0)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the one that is run."""
    bodies, entry, lines = {}, "", []
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _array_bytes(types: str) -> int:
    sizes = ((width, sizes.split(",")) for width, sizes in _ARRAY.findall(types))
    return sum(WIDTHS[width] * math.prod(int(n) for n in each if n) for width, each in sizes)


def _trips(line: str) -> int:
    trips = _TRIPS.search(line)
    if trips is None:
        raise ValueError(f"a loop does not say how often it runs: {line.strip()[:80]}")
    return int(trips[1])
