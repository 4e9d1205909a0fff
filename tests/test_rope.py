"""Rotary phases far into a video: float32 on the device, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.config import TINY, WAN21_T2V_1_3B, WAN21_T2V_14B, WAN22_TI2V_5B
from longlive_jax.dit.rope import frequencies, phases

PRESETS = (TINY, WAN21_T2V_1_3B, WAN21_T2V_14B, WAN22_TI2V_5B)
POSITIONS = np.array([*range(1024), 1023.5, 5760, 99_999, 999_999, 999_999.5, 1_000_000])

every_preset = pytest.mark.parametrize(
    "dit", [m.dit for m in PRESETS], ids=[m.name for m in PRESETS]
)


def apart(dit, positions):
    """Radians between the temporal phases of positions [n] and float64's, whole turns aside."""
    time, *_ = frequencies(dit)
    angles = jax.jit(lambda x: phases(dit, x, 1, 1))(jnp.asarray(positions, jnp.float32)[None])
    away = np.asarray(angles, np.float64)[0, :, : len(time)] - positions[:, None] * time
    return np.abs(away - 2 * np.pi * np.round(away / (2 * np.pi))).max()


@every_preset
def test_time_is_exact(dit):
    assert apart(dit, POSITIONS) < 2e-6


@given(halves=st.lists(st.integers(-2048, 2**24), min_size=64, max_size=64))
@settings(deadline=None, max_examples=40)
def test_time_is_exact_for_every_half_frame(halves):
    """Up to where float32 stops counting them, and for frames before the first."""
    assert apart(WAN22_TI2V_5B.dit, np.array(halves) / 2) < 2e-6


def test_time_between_half_frames():
    """Other time scales get what float32 makes of them."""
    positions = np.float64(np.float32(np.arange(0, 1e6, 997) * 0.3))
    assert apart(WAN22_TI2V_5B.dit, positions) < 1e-4


@every_preset
def test_phases_are_small_and_space_does_not_move(dit):
    """Angles stay within half a turn; rows and columns are the same in every frame."""
    time, row, column = frequencies(dit)
    angles = np.asarray(phases(dit, jnp.asarray([[0.0, 7.5, 999_999.0]]), 3, 5))
    angles = angles.reshape(3, 3, 5, dit.head_dim // 2)
    assert np.abs(angles).max() <= np.float32(np.pi)
    space = np.concatenate(
        [
            np.broadcast_to((np.arange(3)[:, None] * row)[:, None], (3, 5, len(row))),
            np.broadcast_to(np.arange(5)[:, None] * column, (3, 5, len(column))),
        ],
        -1,
    )
    space -= 2 * np.pi * np.round(space / (2 * np.pi))
    np.testing.assert_array_equal(angles[..., len(time) :], [space.astype(np.float32)] * 3)


@every_preset
def test_space_is_exact(dit):
    """Rows and columns of the largest pictures turn by the float32 nearest to the exact angle."""
    time, row, column = frequencies(dit)
    angles = np.asarray(phases(dit, jnp.zeros((1, 1)), 64, 128), np.float64)
    angles = angles.reshape(64, 128, -1)[..., len(time) :]
    exact_rows = np.broadcast_to((np.arange(64)[:, None] * row)[:, None], (64, 128, len(row)))
    exact_columns = np.broadcast_to(np.arange(128)[:, None] * column, (64, 128, len(column)))
    away = angles - np.concatenate([exact_rows, exact_columns], -1)
    turns = np.round(away / (2 * np.pi))
    assert np.abs(away - 2 * np.pi * turns).max() < 1.3e-7
