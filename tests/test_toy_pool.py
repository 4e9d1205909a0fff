"""Training sequences are what a streaming run of the same script would have seen."""

import numpy as np
import pytest

from longlive_jax.config import TINY
from longlive_jax.data import toy_pool, toy_world
from longlive_jax.data.caption import parse

CONFIG = toy_pool.PoolConfig(chunks=8)
STREAM = TINY.stream
EASY = toy_pool.SequenceConfig(easy=1.0, drop=0.0)


def encode(video: np.ndarray) -> np.ndarray:
    """Stands in for the VAE: latents that hold the number of their frame."""
    latents = 1 + (video.shape[1] - 1) // 4
    return np.tile(
        np.arange(latents, dtype=np.float32)[None, :, None, None, None], (len(video), 1, 2, 2, 3)
    )


class Words:
    """A tokenizer that keeps what it was told; an id is the place in that list."""

    def __call__(self, texts):
        self.texts = list(texts)
        return np.arange(len(self.texts))[:, None], None


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for seed in (0, 1):
        toy_pool.write_shard(folder / f"{seed:04d}.npz", seed, 12, encode, CONFIG)
    return toy_pool.read(sorted(folder.glob("*.npz")), CONFIG)


def sequences(pool, cfg, count):
    rng, words = np.random.default_rng(0), Words()
    for _ in range(count):
        layout, fields = toy_pool.sample(rng, pool, words, 4, cfg, STREAM)
        for row in range(4):
            yield layout, {k: v[row] for k, v in fields.items()}, words.texts


def chunks_of(fields) -> list[int]:
    first = fields["latents"][:: STREAM.chunk, 0, 0, 0]
    return [int(x) // STREAM.chunk for x in first]


def test_a_shard_holds_its_videos_and_scripts_follow_from_its_seed(pool):
    assert pool.latents.shape[:2] == (24, CONFIG.chunks * STREAM.chunk)
    assert pool.scripts[:12] == toy_pool.scripts(0, 12, CONFIG)
    assert pool.scripts[12:] == toy_pool.scripts(1, 12, CONFIG)


def test_no_unfinished_shard_is_left_where_encoding_fails(tmp_path):
    def broken(video):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        toy_pool.write_shard(tmp_path / "0000.npz", 0, 2, broken, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_sequence_is_the_sink_and_a_run_of_chunks(pool):
    seen = set()
    for layout, fields, _ in sequences(pool, EASY, 40):
        chunks = chunks_of(fields)
        assert len(chunks) == 1 + max(layout.noisy) and chunks[0] == 0
        assert np.diff(chunks[1:]).tolist() == [1] * (len(chunks) - 2)
        seen.add(layout)
    assert seen == {EASY.start, EASY.later}


def test_positions_count_frames_and_shots(pool):
    """Temporal positions rise by one inside a chunk, and where no cut and no gap lies between, from
    chunk to chunk.
    """
    cfg = toy_pool.SequenceConfig(easy=1.0, far=0.0)
    for _, fields, _ in sequences(pool, cfg, 40):
        position = fields["position"].reshape(-1, STREAM.chunk)
        assert (np.diff(position, axis=1) == 1).all()
        frames = np.array(chunks_of(fields)) * STREAM.chunk
        offset = position[:, 0] - frames
        assert (offset % STREAM.shot_offset == 0).all() and (np.diff(offset) >= 0).all()


def test_a_stretched_gap_moves_everything_behind_the_sink_alike(pool):
    cfg = toy_pool.SequenceConfig(easy=1.0, far=1.0, start_share=0.0)
    gaps = []
    for _, fields, _ in sequences(pool, cfg, 40):
        gaps.append(fields["position"][STREAM.chunk] - STREAM.chunk * chunks_of(fields)[1])
        assert fields["position"][0] == 0
    assert max(gaps) > 100 and min(gaps) < 30


def test_chunks_are_denoised_under_the_caption_in_force(pool):
    checked = 0
    for _, fields, texts in sequences(pool, EASY, 60):
        told = [parse(texts[i]) for i in fields["ids"][:, 0] if texts[i]]
        scenes = [told[p] for p in fields["noisy_prompt"]]
        chunks = chunks_of(fields)
        fits = [
            script
            for script in pool.scripts
            if scenes
            == [script.segment(toy_world.chunk_start(c, STREAM.chunk)).scene for c in chunks]
        ]
        assert fits, "no script of the pool has these scenes at these chunks"
        checked += len(set(fields["noisy_prompt"])) > 1
    assert checked > 20


def test_what_came_before_a_recache_is_remembered_under_the_new_prompt_and_not_learned(pool):
    cfg = toy_pool.SequenceConfig(easy=1.0, recache=1.0, full=0.0)
    stale = 0
    for layout, fields, _ in sequences(pool, cfg, 80):
        differs = fields["clean_prompt"] != fields["noisy_prompt"]
        for copy, chunk in enumerate(layout.noisy):
            if differs[chunk]:  # re-read since: its own noisy pass belongs to another memory
                assert fields["weight"][copy] == 0
                stale += 1
    assert stale > 20


def test_without_recache_every_chunk_counts(pool):
    cfg = toy_pool.SequenceConfig(easy=1.0, recache=0.0)
    for _, fields, _ in sequences(pool, cfg, 20):
        assert (fields["weight"] == 1).all()
        assert (fields["clean_prompt"] == fields["noisy_prompt"]).all()


def test_hops_and_circles_are_drawn_more_often_where_others_are_thinned(pool):
    def swings(easy):
        cfg = toy_pool.SequenceConfig(easy=easy, drop=0.0, start_share=1.0)
        hits = []
        for _, fields, texts in sequences(pool, cfg, 60):
            scenes = [parse(texts[i]) for i in fields["ids"][:, 0] if texts[i]]
            motions = {t.motion for s in scenes for t in s.things}
            hits.append(bool(motions & {"bounces", "circles"}))
        return np.mean(hits)

    assert swings(0.2) > swings(1.0) + 0.15


def test_dropped_prompts_are_empty(pool):
    cfg = toy_pool.SequenceConfig(easy=1.0, drop=1.0)
    for _, fields, texts in sequences(pool, cfg, 3):
        assert not any(texts[i] for i in fields["ids"][:, 0])
