"""Batches of training sequences, endless, from a folder of videos.

The order is one for the whole run: every epoch is a new permutation of the samples by the seed, and
the ranks take turns in it. A sample that cannot be used is skipped: the next one of the folder
stands in its place. What is read at a place thus depends on nothing but the place, and one number
is the position of all ranks: a run goes on bit for bit where it stopped, also with another number
of workers, or of ranks if as many samples make a step.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import Int, Shaped

from longlive_jax.data import folder, montage
from longlive_jax.data.folder import Sample
from longlive_jax.data.latents import LatentCache, Shelf
from longlive_jax.data.montage import Clip, MontageConfig, Start
from longlive_jax.errors import InputError

Element = dict[str, Any]

ENDLESS = 1 << 40  # places: more than any run comes to, and still a number that Grain can count to


def _first(clips: Sequence[Clip], cfg: MontageConfig, rng: np.random.Generator) -> Start:
    del clips, cfg, rng
    return (0, 0)


def _anywhere(clips: Sequence[Clip], cfg: MontageConfig, rng: np.random.Generator) -> Start:
    found = montage.starts(clips, cfg)
    return found[int(rng.integers(len(found)))] if found else (0, 0)


STARTS = {"first": _first, "anywhere": _anywhere}


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What batches are made of.

    start: "anywhere" draws a place in the sample anew each time, as LongLive 2.0 trains; "first" is
    the first frame of the first clip, the same in every epoch, so that a `LatentCache` fills once.
    """

    montage: MontageConfig
    height: int  # pixels
    width: int
    batch: int = 1  # sequences of one rank in a step
    seed: int = 0
    start: str = "anywhere"
    rank: int = 0  # among those that see different data
    ranks: int = 1
    # Processes that read a batch or two ahead each; a script that has some is to be started under
    # `if __name__ == "__main__"`. 0 reads when asked, in this process.
    workers: int = 0

    def __post_init__(self):
        if self.start not in STARTS:
            raise InputError(f'start "{self.start}" is not known: say {", ".join(STARTS)}')
        if self.batch < 1 or self.workers < 0 or not 0 <= self.seed < 2**32:
            raise InputError(
                "batch must be 1 or more, workers 0 or more, seed from 0 to 4294967295, not"
                f" {self.batch}, {self.workers}, {self.seed}"
            )
        if not 0 <= self.rank < self.ranks:
            raise InputError(f"there is no rank {self.rank} of {self.ranks}")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of b samples."""

    samples: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]  # of each chunk of each sample
    valid: Int[np.ndarray, " b"]  # latent frames before the padding
    # Frames, uint8 [b t H W 3], or their latents [b f h w c] where there is a `LatentCache`.
    video: Shaped[np.ndarray, "b ..."]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one sequence; a copy of it is in every worker."""

    samples: tuple[Sample, ...]
    cfg: PipelineConfig
    shelf: Shelf | None

    def __call__(self, place: int, number: int) -> Element:
        """The sample of that number, or the first one after it that can be used."""
        skipped: list[tuple[str, str]] = []
        for attempt in range(len(self.samples)):
            sample = self.samples[(number + attempt) % len(self.samples)]
            rng = np.random.default_rng((self.cfg.seed, place, attempt))
            try:
                return self.sequence(sample, rng) | {"skipped": skipped}
            except InputError as error:
                skipped.append((sample.name, str(error)))
        raise InputError(f"no sample can be used, the first because: {skipped[0][1]}")

    def sequence(self, sample: Sample, rng: np.random.Generator) -> Element:
        cfg = self.cfg
        clips = folder.clips(sample)
        start = STARTS[cfg.start](clips, cfg.montage, rng)
        plan = montage.plan(clips, cfg.montage, start)
        if plan.reason:
            raise InputError(f"{sample.name}: {plan.reason}")
        size = (cfg.height, cfg.width)
        element = {"sample": sample.name, "prompts": plan.prompts, "valid": plan.valid}
        if self.shelf is not None:
            place = self.shelf.place(sample, plan, cfg.montage, *size)
            kept = self.shelf.read(place)
            if kept is not None:
                return element | {"latents": kept}
            element |= {"place": str(place)}
        return element | {"frames": folder.frames(sample, plan, cfg.montage, *size)}


class Batches(grain.DatasetIterator):
    """Endless batches of the samples in a folder.

    As every iterator of Grain it has `get_state`, `set_state` and `close`, and Orbax can save it.

    Args:
      root: The folder, laid out as `data/folder.py` says.
      cfg: What to make of it.
      cache: Where latents are kept; with it, batches hold latents.

    Raises:
      InputError: the folder is no data set; later, none of its samples can be used.
    """

    def __init__(self, root: pathlib.Path, cfg: PipelineConfig, cache: LatentCache | None = None):
        super().__init__()
        self._reading: grain.DatasetIterator | None = None
        self._step = 0
        self.skipped: collections.Counter[str] = collections.Counter()  # samples, how often
        self._cfg, self._cache = cfg, cache
        self._samples = tuple(folder.samples(root))

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._reading is None:
            self._reading = iter(self._dataset())
        elements = next(self._reading)
        self._step += 1
        for name, reason in (pair for element in elements for pair in element["skipped"]):
            if name not in self.skipped:
                logging.warning("sample %s is skipped: %s", name, reason)
            self.skipped[name] += 1
        return Batch(
            samples=tuple(element["sample"] for element in elements),
            prompts=tuple(tuple(element["prompts"]) for element in elements),
            valid=np.array([element["valid"] for element in elements], np.int32),
            video=np.stack([self._video(element) for element in elements]),
        )

    def _video(self, element: Element) -> np.ndarray:
        if "latents" in element:
            return element["latents"]
        if self._cache is None:
            return element["frames"]
        return self._cache.fill(pathlib.Path(element["place"]), element["frames"])

    def _dataset(self) -> grain.IterDataset:
        """What is left from the present step on."""
        cfg = self._cfg
        shelf = None if self._cache is None else self._cache.shelf
        count = len(self._samples)
        order = grain.MapDataset.range(count).seed(cfg.seed).shuffle().repeat(ENDLESS // count)
        sequences = order.map_with_index(_Reader(self._samples, cfg, shelf))
        own = sequences.slice(slice(cfg.rank, None, cfg.ranks)).batch(cfg.batch, batch_fn=list)
        left = own.slice(slice(self._step, None))
        # Grain would read hundreds of batches ahead, and one may be gigabytes.
        when_asked = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        batches = left.to_iter_dataset(when_asked)
        if not cfg.workers:
            return batches
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain looks up its own on the way to a worker
        return batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(cfg.workers))

    @functools.cached_property
    def _order(self) -> str:
        """Tells apart whatever would put other samples at a place."""
        cfg, names = self._cfg, [sample.name for sample in self._samples]
        facts = json.dumps([names, cfg.seed, cfg.batch * cfg.ranks])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def get_state(self) -> dict[str, Any]:
        """The position, as what JSON can hold: the same on every rank."""
        return {"step": self._step, "order": self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position.

        Raises:
          InputError: it is one of other samples, another seed or another number in a step.
        """
        if state["order"] != self._order:
            raise InputError(
                "the position in the data was saved with other samples, another seed, or another"
                " number of samples in a step: restore those, or begin the data anew"
            )
        self._stop()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends the workers; nothing can be read afterwards."""
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None
