"""The report: every rate against numbers worked out by hand."""

import dataclasses
import json
import os

import fake
import jax
import jax.numpy as jnp
import pytest

from longlive_jax import bench, bench_ceiling, gpus, report
from longlive_jax.config import WAN21_T2V_1_3B, WAN22_TI2V_5B, Precision

HEAD = {
    "suite": str,
    "model": str,
    "weights": str,
    "seed": int,
    "device": str,
    "versions": dict,
    "command": str,
}
SCHEMA = HEAD | {
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
    "steps": int,
    "clean_pass": bool,
    "warmup_chunks": int,
    "window": int,
    "chunk_flops": float,
    "ceiling_fps": float | None,
    "of_ceiling": float | None,
    "notes": list,
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
    assert (data["suite"], data["model"], data["weights"]) == ("generate", "fake", "fake")
    assert data["command"].split()[0] and "/" not in data["command"].split()[0]
    assert (data["ceiling_fps"], data["of_ceiling"]) == (None, None)  # of a CPU


def test_the_work_of_a_chunk_is_that_of_the_design():
    """TFLOP of a forward of a chunk with the window full, and FPS at 989 TFLOP/s."""
    for cfg, forward, fps in ((WAN21_T2V_1_3B, 28.3, 84), (WAN22_TI2V_5B, 135.5, 47)):
        whole = bench_ceiling.forward_flops(cfg, cfg.stream.window)
        assert round(whole / 1e12, 1) == forward
        made = bench_ceiling.chunk_flops(cfg, 4)
        assert made == 5 * whole
        assert round(cfg.frames_per_chunk * 989e12 / made) == fps
    fewer = dataclasses.replace(WAN22_TI2V_5B, precision=Precision.of("nvfp4"))
    assert bench_ceiling.chunk_flops(fewer, 4) == made


def test_the_share_of_the_ceiling_counts_what_each_chunk_attends(monkeypatch):
    """With a peak of 1 GFLOP/s: the third and the fourth chunk attend 9 and 12 latent frames."""
    monkeypatch.setattr(gpus, "PEAKS", {"cpu": 1e9})
    summary = bench.summarise([watch(MARKS, 24.5)], 2, compile_s=0.0, seed=0)
    work = 5 * sum(bench_ceiling.forward_flops(fake.CONFIG, frames) for frames in (9, 12))
    assert summary.of_ceiling == pytest.approx(work / 0.6 / 1e9)
    assert summary.ceiling_fps == pytest.approx(24 / (work / 1e9))
    assert summary.denoise_fps / summary.ceiling_fps == pytest.approx(summary.of_ceiling)
    assert summary.chunk_flops == 5 * bench_ceiling.forward_flops(fake.CONFIG, 12)


def test_the_transformer_is_judged_by_videos_without_anything_beside_it():
    """If there are any; what it did is counted of the same."""
    quiet = [bench.Mark(9, 0.5, 0.0, 1.0, 1.1), bench.Mark(12, 0.1, 1.1, 2.0, 2.1)]
    alone = [watch(quiet, 3.0)]
    summary = bench.summarise([watch(MARKS, 24.5)], 1, compile_s=0.0, seed=0, alone=alone)
    assert summary.denoise_fps == pytest.approx(12 / 0.1)
    assert summary.end_to_end_fps == pytest.approx(36 / (24.5 - 18.5))
    assert summary.frames == 45


def test_memory_that_is_free_is_less_than_the_machine_has():
    assert 2**25 < report.free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_program_without_room_is_refused(monkeypatch):
    program = jax.jit(lambda x: x + 1).lower(jnp.ones(1000)).compile()
    report.check_room(program)
    monkeypatch.setattr(report, "free_memory", lambda: 3999)
    with pytest.raises(MemoryError, match="needs 0.00 GB"):
        report.check_room(program)


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


@pytest.mark.parametrize(("change", "kinds"), [("cut", ["cut"]), ("none", [])])
def test_a_measured_video_has_the_change_that_was_asked_for(change, kinds):
    model = fake.Model()
    summary = bench.run(model, seconds=2.0, repeat=1, seed=0, steps=None, change=change)
    _, (_, seconds, *_, events), (*_, alone) = model.calls
    assert (seconds, [event.kind for event in events]) == (2.0, kinds)
    assert alone == ()
    assert len(summary.switches) == len(kinds)


def test_without_a_change_one_chunk_is_enough():
    bench.run(fake.Model(), seconds=0.5, repeat=1, seed=0, steps=None, change="none")


def test_bench_measures_each_repeat_after_a_warmup():
    model = fake.Model()
    summary = bench.run(model, seconds=5.0, repeat=2, seed=3, steps=None)
    check_schema(json.loads(summary.to_json()))
    assert [(seconds, seed) for _, seconds, seed, _, _ in model.calls] == [
        (3.0, 3),
        *((5.0, 3), (5.0, 4)),
        *((5.0, 3), (5.0, 4)),  # without changes, for the transformer alone
    ]
    assert summary.frames == 80
    assert summary.warmup_chunks == 5
    assert summary.steps == 4
    (switch,) = summary.switches
    assert switch.requested_s == switch.applied_s == (9 + 3 * 12) / 16
