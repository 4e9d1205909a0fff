"""`longlive doctor`: what this machine runs, what is wrong with it, and the command that mends it.

`probe` looks at the machine and gathers `Facts`; `examine` judges them and touches nothing, so that
every fault can be tested without having it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
import time
from typing import Any

from longlive_jax import backends, cache_dir
from longlive_jax.errors import InputError
from longlive_jax.gpus import ARCHITECTURES
from longlive_jax.version import __version__

JAX_FROM, JAX_BELOW = (0, 10, 2), (0, 13)
FLAX_FROM = (0, 12, 8)
PYTHON_FROM = (3, 11)
DRIVER = {13: 580, 12: 525}  # the oldest driver of each major CUDA version
ROOM = 1 << 30  # bytes that the tiny model and its compiled programs take at most
CODEC = "libx264"
PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy", "av", "torch"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
)
BROKEN = (ImportError, RuntimeError, AttributeError, OSError, ValueError, TypeError)
OK, NOTE, WARNING, FAULT = "ok", "note", "warning", "fault"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found. None is absent; an `…_error` says why something failed."""

    python: str
    versions: dict[str, str | None]
    driver: str | None  # of NVIDIA
    gpus: tuple[str, ...]  # that the driver lists
    jax_error: str | None
    platforms: str | None  # that JAX was told to use
    platform: str | None  # that JAX does use: "cpu", "gpu"
    devices: tuple[str, ...]
    capability: str | None  # "9.0"
    memory: int | None  # bytes that JAX may use on the first device, or of this machine
    codec: bool
    cache_folder: str
    cache_writable: bool
    cache_bytes: int
    disk_free: int
    tiny_error: str | None
    tiny_seconds: float

    @property
    def architecture(self) -> str | None:
        return self.capability and f"sm_{self.capability.replace('.', '')}"


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding: how bad, in words, and the command that mends it."""

    name: str
    state: str  # OK, NOTE, WARNING, or FAULT: nothing can be generated
    found: str
    mend: str = ""


def probe() -> Facts:
    """Looks at this machine."""
    driver, gpus = _driver()
    error, runtime = _runtime()
    folder = cache_dir.user_cache() / "xla"
    seconds, tiny_error = _tiny() if error is None else (0.0, "JAX does not start")
    return Facts(
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        driver=driver,
        gpus=gpus,
        jax_error=error,
        codec=_codec(),
        cache_folder=str(folder),
        cache_writable=_writable(folder),
        cache_bytes=_size(folder),
        disk_free=shutil.disk_usage(_existing(folder)).free,
        tiny_error=tiny_error,
        tiny_seconds=seconds,
        **runtime,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> tuple[str | None, tuple[str, ...]]:
    """Version of the NVIDIA driver and the GPUs that it lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, ()
    query = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ()
    pairs = [line.split(", ", 1) for line in said.splitlines() if ", " in line]
    return (pairs[0][0] if pairs else None), tuple(name for _, name in pairs)


def _runtime() -> tuple[str | None, dict[str, Any]]:
    """Why JAX does not start, or None, and what it runs on."""
    nothing = dict(platforms=None, platform=None, devices=(), capability=None, memory=None)
    try:
        import jax

        asked = jax.config.jax_platforms
        devices = jax.devices()
        jax.block_until_ready(jax.numpy.ones((8, 8)) @ jax.numpy.ones((8, 8)))
    except BROKEN as error:
        return _sentence(error), nothing
    first = devices[0]
    stats = first.memory_stats() or {}
    return None, dict(
        platforms=asked or None,
        platform=first.platform,
        devices=tuple(device.device_kind for device in devices),
        capability=getattr(first, "compute_capability", None),
        memory=stats.get("bytes_limit", _host_memory()),
    )


def _host_memory() -> int | None:
    """Bytes that are free for programs; None where the system does not say."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text("utf-8")
    except OSError:
        return None
    match = re.search(r"MemAvailable:\s*(\d+) kB", text)
    return int(match[1]) * 1024 if match else None


def _codec() -> bool:
    try:
        import av

        av.codec.Codec(CODEC, "w")
    except BROKEN:  # av's "no such codec" is a ValueError
        return False
    return True


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else _existing(folder.parent)


def _writable(folder: pathlib.Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False


def _size(folder: pathlib.Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may clear the cache
                total += os.stat(os.path.join(base, name)).st_size
    return total


def _tiny() -> tuple[float, str | None]:
    """Seconds to load the model that ships with the package, and why it does not load."""
    start = time.perf_counter()
    try:
        import longlive_jax

        longlive_jax.load("tiny")
    except (InputError, *BROKEN) as error:
        return 0.0, _sentence(error)
    return time.perf_counter() - start, None


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _numbers(version: str | None) -> tuple[int, ...]:
    """The first three numbers of a version; () of none."""
    return tuple(int(n) for n in re.findall(r"\d+", version or "")[:3])


def examine(facts: Facts) -> list[Check]:
    """Everything that was looked at, in the order in which things build on each other."""
    return [
        _python(facts),
        _jax(facts),
        _flax(facts),
        _plugin(facts),
        _device(facts),
        _driver_fits(facts),
        _capability(facts),
        _memory(facts),
        _video(facts),
        _cache(facts),
        _torch(facts),
        _model(facts),
    ]


def _python(facts: Facts) -> Check:
    if _numbers(facts.python) < PYTHON_FROM:
        found = f"Python {facts.python} is older than {_dots(PYTHON_FROM)}"
        return Check("python", FAULT, found, "python3.12 -m venv .venv && . .venv/bin/activate")
    return Check("python", OK, facts.python)


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


JAX_PIN = f"jax>={_dots(JAX_FROM)},<{_dots(JAX_BELOW)}"


def _jax(facts: Facts) -> Check:
    jax, jaxlib = facts.versions["jax"], facts.versions["jaxlib"]
    cuda = _cuda(facts)
    extra = f"jax[cuda{cuda}]" if cuda else "jax"
    mend = f"pip install -U '{JAX_PIN.replace('jax', extra, 1)}'"
    if facts.jax_error is not None:
        # With a platform that was asked for and is not there, the packages are not to blame.
        if "backend" in facts.jax_error:
            mend = "env -u JAX_PLATFORMS longlive doctor"
        return Check("jax", FAULT, f"JAX {jax} does not start: {facts.jax_error}", mend)
    if not JAX_FROM <= _numbers(jax) or _numbers(jax) >= JAX_BELOW:
        wanted = f"{_dots(JAX_FROM)} to below {_dots(JAX_BELOW)}"
        return Check("jax", WARNING, f"jax {jax} is outside of what is supported: {wanted}", mend)
    if _numbers(jaxlib)[:2] != _numbers(jax)[:2]:
        return Check("jax", WARNING, f"jax {jax} and jaxlib {jaxlib} do not belong together", mend)
    return Check("jax", OK, f"jax {jax}, jaxlib {jaxlib}")


def _flax(facts: Facts) -> Check:
    flax = facts.versions["flax"]
    mend = f"pip install -U 'flax>={_dots(FLAX_FROM)}'"
    if flax is None:
        return Check("flax", FAULT, "flax is not installed", mend)
    if _numbers(flax) < FLAX_FROM:
        return Check("flax", WARNING, f"flax {flax} is older than {_dots(FLAX_FROM)}", mend)
    return Check("flax", OK, flax)


def _cuda(facts: Facts) -> int | None:
    """The major CUDA version whose plugin is installed."""
    return next((n for n in DRIVER if facts.versions[f"jax-cuda{n}-plugin"]), None)


def _plugin(facts: Facts) -> Check:
    cuda, jax, jaxlib = _cuda(facts), facts.versions["jax"], facts.versions["jaxlib"]
    if cuda is None:
        if facts.gpus:
            found = f"there is a GPU ({facts.gpus[0]}), but JAX has no CUDA plugin"
            return Check("cuda plugin", WARNING, found, "pip install 'longlive-jax[cuda]'")
        return Check("cuda plugin", OK, "none, and none is needed without a GPU")
    parts = {name: facts.versions[f"jax-cuda{cuda}-{name}"] for name in ("plugin", "pjrt")}
    odd = [f"{name} {v}" for name, v in parts.items() if _numbers(v) != _numbers(jaxlib)]
    if odd:
        found = f"CUDA {' and '.join(odd)} beside jaxlib {jaxlib}: JAX passes over such a GPU"
        return Check("cuda plugin", WARNING, found, f"pip install -U 'jax[cuda{cuda}]=={jax}'")
    return Check("cuda plugin", OK, f"CUDA {cuda}, {parts['plugin']}")


def _device(facts: Facts) -> Check:
    if facts.jax_error is not None:
        return Check("device", FAULT, "none: JAX does not start", "mend jax, above")
    if facts.gpus and facts.platform == "cpu":
        found = f"JAX runs on the CPU although there is a GPU ({facts.gpus[0]})"
        mend = "env -u JAX_PLATFORMS longlive doctor" if facts.platforms else "see cuda plugin"
        return Check("device", WARNING, found, mend)
    count = f" x {len(facts.devices)}" if len(facts.devices) > 1 else ""
    return Check("device", OK, f"{facts.platform}: {facts.devices[0]}{count}")


def _driver_fits(facts: Facts) -> Check:
    if facts.driver is None:
        return Check("driver", OK, "no NVIDIA driver, and none is needed on a CPU")
    cuda = _cuda(facts)
    if cuda and _numbers(facts.driver)[0] < DRIVER[cuda]:
        found = f"driver {facts.driver} is too old for CUDA {cuda}, which needs {DRIVER[cuda]}"
        mend = f"sudo apt-get install nvidia-driver-{DRIVER[13]}"
        if cuda == 13 and _numbers(facts.driver)[0] >= DRIVER[12]:
            mend += ", or pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install"
            mend += f" 'jax[cuda12]=={facts.versions['jax']}'"
        return Check("driver", WARNING, found, mend)
    return Check("driver", OK, facts.driver)


def _capability(facts: Facts) -> Check:
    name = facts.architecture
    if name is None:
        return Check("architecture", OK, "no GPU in use")
    if name not in ARCHITECTURES:
        found = f"{name} is none of {', '.join(ARCHITECTURES)}: it may work, nobody has tried"
        return Check("architecture", WARNING, found, "longlive bench --seconds 3")
    arch, cuda = ARCHITECTURES[name], _cuda(facts)
    if cuda and cuda not in arch.cuda:
        found = f"{name} needs CUDA {arch.cuda[0]}, the plugin is for CUDA {cuda}"
        mend = f"pip install 'jax[cuda{arch.cuda[0]}]=={facts.versions['jax']}'"
        return Check("architecture", WARNING, found, mend)
    return Check("architecture", OK, f"{name} ({arch.what})")


def _memory(facts: Facts) -> Check:
    if facts.memory is None:
        return Check("memory", NOTE, "the system does not say how much there is")
    found = f"{facts.memory / 1e9:.1f} GB for JAX"
    if facts.memory < ROOM:
        mend = "nvidia-smi" if facts.platform == "gpu" else "ps aux --sort=-rss | head"
        return Check("memory", WARNING, f"only {found}: other programs hold the rest", mend)
    return Check("memory", OK, found)


def _video(facts: Facts) -> Check:
    if facts.versions["av"] is None or not facts.codec:
        found = f"PyAV {facts.versions['av'] or 'is missing and'} cannot write H.264 ({CODEC})"
        return Check("video", FAULT, found, "pip install --force-reinstall --only-binary :all: av")
    return Check("video", OK, f"PyAV {facts.versions['av']} writes H.264")


def _cache(facts: Facts) -> Check:
    folder = facts.cache_folder
    if not facts.cache_writable:
        found = f"{folder} cannot be written: every start compiles again"
        return Check("cache", WARNING, found, f"mkdir -p {folder} && chmod u+rwx {folder}")
    found = f"{folder}, {facts.cache_bytes / 1e6:.0f} MB"
    if facts.disk_free < ROOM:
        found += f"; only {facts.disk_free / 1e6:.0f} MB are free on its disk"
        return Check("cache", WARNING, found, f"rm -r {folder}")
    return Check("cache", OK, found)


def _torch(facts: Facts) -> Check:
    if facts.versions["torch"] is None:
        found = "no torch: .pt and .pth checkpoints cannot be converted, safetensors can"
        return Check("torch", NOTE, found, "pip install 'longlive-jax[torch]'")
    return Check("torch", OK, facts.versions["torch"])


def _model(facts: Facts) -> Check:
    if facts.tiny_error is not None:
        mend = "pip install --force-reinstall --no-deps longlive-jax"
        if facts.jax_error is not None:
            mend = "mend jax, above"
        return Check("tiny model", FAULT, f"it does not load: {facts.tiny_error}", mend)
    return Check("tiny model", OK, f"loads in {facts.tiny_seconds:.1f} s")


def can_generate(checks: list[Check]) -> bool:
    return all(check.state != FAULT for check in checks)


def to_json(facts: Facts, checks: list[Check]) -> str:
    """Everything that the tables show."""
    body = {
        "version": __version__,
        "can_generate": can_generate(checks),
        "facts": dataclasses.asdict(facts) | {"architecture": facts.architecture},
        "checks": [dataclasses.asdict(check) for check in checks],
        "precisions": backends.precisions(facts.platform, facts.architecture),
        "implementations": backends.table(facts.platform, facts.architecture),
        "low_bits": backends.low_bits(),
        "architectures": backends.support(),
    }
    return json.dumps(body, indent=2) + "\n"


def show(facts: Facts, checks: list[Check]) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("what", "", "found", title=f"longlive-jax {__version__}")
    for check in checks:
        table.add_row(check.name, check.state, check.found)
    console.print(table, markup=False)
    where = facts.platform, facts.architecture
    for title, rows in (
        ("precisions here", backends.precisions(*where)),
        ("operations here", backends.table(*where)),
        ("architectures", backends.support()),
        ("fewer bits", backends.low_bits()),
    ):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        console.print(table, markup=False)
    for check in checks:
        if check.mend:
            line = f"{check.name}: {check.found}\n    {check.mend}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def run(as_json: bool) -> None:
    """Looks, judges, says.

    Raises:
      InputError: nothing can be generated on this machine as it is.
    """
    import sys

    facts = probe()
    checks = examine(facts)
    if as_json:
        sys.stdout.write(to_json(facts, checks))
    else:
        show(facts, checks)
    faults = [check for check in checks if check.state == FAULT]
    if faults:
        raise InputError(f"nothing can be generated here yet: {faults[0].found}: {faults[0].mend}")
