"""The report: every rate against numbers worked out by hand."""

import json

import fake
import jax
import jax.numpy as jnp
import pytest

from longlive_jax import bench, report

SCHEMA = {
    "frames": int,
    "width": int,
    "height": int,
    "fps": int,
    "denoise_fps": float,
    "end_to_end_fps": float,
    "time_to_first_chunk_s": float,
    "chunk_latency_p50_s": float,
    "chunk_latency_p95_s": float,
    "switches": list,
    "peak_memory_bytes": int,
    "compile_s": float,
    "device": str,
    "versions": dict,
    "seed": int,
    "steps": int,
    "warmup_chunks": int,
}


def check_schema(data):
    """Every field, no other, each of its type."""
    assert list(data) == list(SCHEMA)
    for name, kind in SCHEMA.items():
        assert isinstance(data[name], kind), name
    for switch in data["switches"]:
        assert list(switch) == ["prompt", "requested_s", "applied_s"]


def watch(marks, closed, size=(48, 64)):
    stopwatch = bench.Stopwatch(fake.Model().session("x"))
    stopwatch.marks = marks
    stopwatch.size = size
    stopwatch.closed = closed
    return stopwatch


# frames, denoise_s, asked, ready, written
MARKS = [
    bench.Mark(9, 5.0, 10.0, 18.0, 18.5),
    bench.Mark(12, 3.0, 18.5, 22.0, 22.5),
    bench.Mark(12, 0.2, 22.5, 22.8, 23.0),
    bench.Mark(12, 0.4, 23.0, 23.5, 23.7),
]


def test_warmup_is_left_out_of_every_rate():
    data = report.Report.to_json(bench.summarise([watch(MARKS, 24.5)], 2, compile_s=1.5, seed=7))
    data = json.loads(data)
    check_schema(data)
    assert data["frames"] == 45
    assert (data["height"], data["width"]) == (48, 64)
    assert data["denoise_fps"] == pytest.approx(24 / 0.6)
    assert data["end_to_end_fps"] == pytest.approx(24 / (24.5 - 22.5))
    assert data["chunk_latency_p50_s"] == pytest.approx(0.4)
    assert data["chunk_latency_p95_s"] == pytest.approx(0.3 + 0.95 * 0.2)
    assert data["time_to_first_chunk_s"] == pytest.approx(8.0)
    assert (data["seed"], data["steps"], data["compile_s"]) == (7, 4, 1.5)
    assert data["fps"] == 16
    assert data["warmup_chunks"] == 2


def test_several_videos_are_pooled():
    later = [bench.Mark(9, 0.1, 0.0, 1.0, 1.1), bench.Mark(12, 0.5, 1.1, 2.0, 2.1)]
    summary = bench.summarise([watch(MARKS, 24.5), watch(later, 3.0)], 0, compile_s=0.0, seed=0)
    assert summary.frames == 45
    assert summary.denoise_fps == pytest.approx((45 + 21) / (8.6 + 0.6))
    assert summary.end_to_end_fps == pytest.approx((45 + 21) / (14.5 + 3.0))
    assert summary.time_to_first_chunk_s == pytest.approx((8.0 + 1.0) / 2)


@pytest.mark.parametrize(("chunks", "warmup"), [(1, 0), (2, 1), (3, 2), (30, 2)])
def test_one_chunk_is_always_left_to_measure(chunks, warmup):
    assert bench.own_warmup(chunks) == warmup


def test_the_clock_counts_compilations_and_stops():
    def double(x):
        return x * 2

    with bench.CompileClock() as clock:
        jax.jit(double)(jnp.ones(3))
    assert clock.programs >= 1
    assert clock.seconds > 0
    before = clock.programs
    jax.jit(lambda x: x * 3)(jnp.ones(3))
    assert clock.programs == before


def test_peak_memory_is_that_of_a_running_process():
    assert 2**25 < report.peak_memory() < 2**40


def test_bench_measures_each_repeat_after_a_warmup():
    model = fake.Model()
    summary = bench.run(model, seconds=5.0, repeat=2, seed=3, steps=None)
    check_schema(json.loads(summary.to_json()))
    assert [(seconds, seed) for _, seconds, seed, _, _ in model.calls] == [
        (3.0, 3),
        (5.0, 3),
        (5.0, 4),
    ]
    assert summary.frames == 80
    assert summary.warmup_chunks == 5
    assert summary.steps == 4
    (switch,) = summary.switches
    assert switch.requested_s == switch.applied_s == (9 + 3 * 12) / 16
