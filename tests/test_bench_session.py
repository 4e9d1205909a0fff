"""The report of sessions: numbers worked out by hand, and one small run."""

import dataclasses
import json

import fake
import pytest
from test_report import HEAD

import longlive_jax
from longlive_jax import bench_session, cli
from longlive_jax.bench_session import Effort, Kept, Memory, Played, Repeat, Throughput, Trial
from longlive_jax.errors import InputError
from longlive_jax.report import head, show

FACTS = dict(fps=16, seconds=6.0, compile_s=1.5, compiled_while_measuring=0, steps=4)
FACTS |= head("session", fake.Model(), 7)


def repeat(*, first=1.0, chunks=(1.0, 2.0, 3.0, 4.0), memory=(100, 200), ratio=1.0, size=10):
    early, late = Memory(5.0, memory[0], 7), Memory(6.0, memory[1], 7)
    trials = {name: [Trial(3.0, 1.0, 2.0)] for name in bench_session.WAYS}
    together = {2: Throughput(20.0 * ratio, 20.0, ratio)}
    return Repeat(Played(first, chunks, early, late), trials, together, Kept(0.5, 0.25, size))


def test_the_ratio_is_taken_within_each_trial():
    cost = bench_session.cost([Trial(3.0, 1.0, 1.0), Trial(5.0, 4.0, 2.0), Trial(4.0, 9.0, 3.0)])
    assert dataclasses.astuple(cost) == (4.0, 4.0, 2.0, 2.0)


def test_medians_keep_the_kinds_of_numbers():
    middle = bench_session.medians([Memory(5.0, 100, 7), Memory(5.0, 300, 7)])
    assert middle == Memory(5.0, 200, 7) and isinstance(middle.process_bytes, int)


def test_repeats_are_pooled_or_their_medians_taken():
    later = repeat(first=3.0, chunks=(5.0, 6.0, 7.0, 8.0), memory=(300, 600), ratio=2.0, size=20)
    report = bench_session.summarise([repeat(), later], **FACTS)
    assert report.repeats == 2
    assert report.time_to_first_chunk_s == 2.0
    assert report.chunk_latency_p50_s == pytest.approx(4.5)
    assert report.chunk_latency_p95_s == pytest.approx(7.65)
    # The first and the last half of each, videos being short.
    assert (report.first_chunks_p50_s, report.last_chunks_p50_s) == (3.5, 5.5)
    assert report.memory == {"early": Memory(5.0, 200, 7), "late": Memory(6.0, 400, 7)}
    assert report.batches == {2: Throughput(30.0, 20.0, 1.5)}
    assert (report.save_s, report.restore_s, report.saved_bytes) == (0.5, 0.25, 15)
    assert set(report.switches) == set(bench_session.WAYS) and len(report.switches) == 8
    assert {cost.state_per_chunk for cost in report.switches.values()} == {0.5}
    assert (report.seed, report.steps, report.compile_s) == (7, 4, 1.5)


def test_only_the_ends_of_a_long_video_are_compared():
    chunks = (*[1.0] * bench_session.ENDS, *[9.0] * 50, *[2.0] * bench_session.ENDS)
    report = bench_session.summarise([repeat(chunks=chunks)], **FACTS)
    assert (report.first_chunks_p50_s, report.last_chunks_p50_s) == (1.0, 2.0)


def test_memory_is_that_of_a_running_process():
    assert 2**25 < bench_session.resident_memory() < 2**40


def test_everything_is_measured_and_nothing_compiled_meanwhile(monkeypatch, capsys):
    ways = {name: bench_session.WAYS[name] for name in ("recache causal first", "keep")}
    monkeypatch.setattr(bench_session, "WAYS", ways)
    little = Effort(trials=2, sizes=(1, 2), rounds=2)
    report = bench_session.run(
        longlive_jax.load("tiny"), seconds=6.5, repeat=2, seed=3, steps=1, effort=little
    )
    assert report.compiled_while_measuring == 0 < report.compile_s
    # Chunks begin at frames 0, 9, 21, …: the seventh ends at 81, the ninth at 105.
    assert [memory.second for memory in report.memory.values()] == [81 / 16, 105 / 16]
    early, late = report.memory.values()
    assert early.live_bytes == late.live_bytes > 4_700_000 * 4
    assert 0 < report.chunk_latency_p50_s <= report.chunk_latency_p95_s
    assert set(report.switches) == set(ways) and set(report.batches) == {1, 2}
    for cost in report.switches.values():
        assert 0 < cost.state_s < cost.frames_s
    for speed in report.batches.values():
        assert min(speed.batch_fps, speed.in_turn_fps, speed.ratio) > 0
    assert report.saved_bytes > 1e6 and report.save_s > 0 < report.restore_s
    assert (report.repeats, report.seed, report.steps, report.model) == (2, 3, 1, "tiny")
    json.loads(report.to_json())
    show(report, to_stderr=False)
    said = capsys.readouterr().out
    for words in ("switches: keep", "batches: 2", "memory: late", "save_s", "state_per_chunk"):
        assert words in said


def test_a_video_that_ends_early_is_refused():
    with pytest.raises(InputError, match="--seconds 5 is too short"):
        bench_session.run(fake.Model(), seconds=5.0, repeat=1, seed=0, steps=None)


@pytest.mark.parametrize(("arguments", "seconds"), [([], 240.0), (["--seconds", "30"], 30.0)])
def test_the_command_measures_sessions(capsys, tmp_path, monkeypatch, arguments, seconds):
    calls, target = [], tmp_path / "session.json"

    def run(model, **choices):
        calls.append(choices)
        return bench_session.summarise([repeat()], **FACTS)

    monkeypatch.setattr(bench_session, "run", run)
    arguments = ["bench", "--suite", "session", "--json", str(target), *arguments]
    assert cli.run(arguments, load=lambda name: fake.Model()) == 0
    assert calls == [dict(seconds=seconds, repeat=3, seed=0, steps=None)]
    said = json.loads(target.read_text("utf-8"))
    assert list(said) == [field.name for field in dataclasses.fields(bench_session.SessionReport)]
    assert said["switches"]["reset"] == dict(
        frames_s=3.0, state_s=1.0, chunk_s=2.0, state_per_chunk=0.5
    )
    assert list(said)[: len(HEAD)] == list(HEAD) and said["suite"] == "session"
    assert "switches: reset" in capsys.readouterr().out


def test_an_unknown_suite_is_named(capsys):
    assert cli.run(["bench", "--suite", "chess"], load=lambda name: fake.Model()) == 2
    assert "chess" in capsys.readouterr().err
