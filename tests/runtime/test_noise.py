"""The noise: what each draw depends on, that it is Gaussian, and that its numbers never change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import InputError
from mdm.runtime.noise import LARGEST, START, normal

Figure = Callable[[str, float, float], None]
COUNT = 200_000


def test_the_numbers_are_pinned() -> None:
    """Whoever changes these changes every picture: a seed that was written down then gives another."""
    pinned = [-2.65328789, 1.14706135, 0.56678206, 0.00232150429, -0.191391304]
    np.testing.assert_allclose(normal(7, 3, 2, (5,)), np.float32(pinned), rtol=1e-6)
    far = [1.3028679, -0.29120025, -0.07159954, -1.0169272]
    np.testing.assert_allclose(normal(LARGEST, LARGEST, START, (4,)), np.float32(far), rtol=1e-6)


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Four words of Philox 4x64-10, from the paper (Salmon et al. 2011)."""
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [high >> 64 ^ counter[1] ^ key[0], high & LARGEST, low >> 64 ^ counter[3] ^ key[1], low & LARGEST]
        key = [(key[0] + 0x9E3779B97F4A7C15) & LARGEST, (key[1] + 0xBB67AE8584CAA73B) & LARGEST]
    return counter


@pytest.mark.parametrize("key", [(7, 3, 2), (0, 0, 0), (2**32, 2**53 + 1, 9), (2**63 + 1, 4, 0), (4, LARGEST, 1)])
def test_the_numbers_are_what_the_paper_and_box_and_muller_say(key: tuple[int, int, int]) -> None:
    """To read when writing a host in another language; numpy counts up before it draws."""
    *seeds, stream = key
    words = [word for block in range(1, 4) for word in philox(seeds, [block, 0, stream, 0])]
    uniform = [((word >> 11) + 0.5) / 2**53 for word in words]
    radius = [math.sqrt(-2 * math.log(u)) for u in uniform[:6]]
    angle = [2 * math.pi * u for u in uniform[6:]]
    expected = [r * part(a) for part in (math.cos, math.sin) for r, a in zip(radius, angle, strict=True)]
    np.testing.assert_allclose(normal(*key, (12,)), expected, rtol=1e-6, atol=1e-7)


def test_a_draw_is_its_own_again_in_any_shape() -> None:
    """Of one count, that is: another count is another draw, not its beginning."""
    flat = normal(1, 2, 3, (24,))
    assert flat.dtype == np.float32
    for shape in ((2, 12), (2, 3, 4), [4, 6]):
        np.testing.assert_array_equal(normal(1, 2, 3, shape), flat.reshape(shape))
    assert not np.array_equal(normal(1, 2, 3, (48,))[:24], flat)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (3, 5)])
def test_any_shape_is_filled(shape: tuple[int, ...]) -> None:
    drawn = normal(0, 0, 0, shape)
    assert drawn.shape == shape
    assert np.isfinite(drawn).all()
    assert len(np.unique(drawn)) == math.prod(shape)  # an odd count's last is no copy


@pytest.mark.parametrize("word", [0, LARGEST])
def test_the_rarest_bits_are_finite_too(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 2**53 draws the logarithm would be that of 0."""
    words = SimpleNamespace(random_raw=lambda count: np.full(count, word, np.uint64))
    monkeypatch.setattr(np.random, "Philox", lambda **key: words)
    drawn = normal(0, 0, 0, (4,))
    assert np.isfinite(drawn).all()
    assert drawn.max() == pytest.approx(math.sqrt(2 * 54 * math.log(2)) if word == 0 else 0, abs=1e-5)


EDGES = [0, 1, 2, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**63 + 2**20, LARGEST - 1, LARGEST]


def test_every_key_is_another_draw() -> None:
    """All 64 bits of seed and sample count, the upper ones too, and neither stands for the other."""
    drawn = {key: normal(*key, 1, (4,)).tobytes() for key in itertools.product(EDGES, EDGES)}
    streams = {(5, 6, stream): normal(5, 6, stream, (4,)).tobytes() for stream in range(200)}
    assert len(set(drawn.values()) | set(streams.values())) == len(drawn) + len(streams)


def test_streams_do_not_overlap() -> None:
    """No draw goes on where another one lies: of a million values of one key hardly any come twice."""
    bits = np.concatenate([normal(1, 1, stream, (50_000,)) for stream in range(10)])
    windows = np.lib.stride_tricks.sliding_window_view(bits, 2)
    assert len(np.unique(windows, axis=0)) > 0.9999 * len(windows)


def test_it_is_gaussian(figure: Figure) -> None:
    z = normal(11, 0, START, (COUNT,)).astype(np.float64)
    figure("noise: mean, in standard errors", abs(z.mean()) * math.sqrt(COUNT), 4)
    for power, expected, spread in ((2, 1, 2), (3, 0, 15), (4, 3, 96)):  # moments, and the variance of z^power
        found = abs((z**power).mean() - expected) * math.sqrt(COUNT / spread)
        figure(f"noise: moment {power}, in standard errors", found, 4)
    edges = np.linspace(-4, 4, 33)
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    distance = np.abs(np.searchsorted(np.sort(z), edges) / COUNT - below).max()
    figure("noise: Kolmogorov's distance, in 1/sqrt(n)", distance * math.sqrt(COUNT), 1.95)  # 1 in 1000 is beyond
    tail, expected = int((np.abs(z) > 4).sum()), math.erfc(4 / math.sqrt(2)) * COUNT
    figure("noise: values beyond 4, off by", abs(tail - expected) / math.sqrt(expected), 4)


def test_draws_are_not_correlated(figure: Figure) -> None:
    """Of seeds, samples and streams next to each other, and of the two halves that share their radius."""
    keys = [(4, 0, 0), (4, 0, 1), (4, 0, 2), (4, 1, 0), (5, 0, 0), (0, 4, 0), (2**63 + 4, 0, 0), (4, 2**63, 1)]
    drawn = np.stack([normal(*key, (COUNT // 4,)) for key in keys]).astype(np.float64)
    for name, values in (("values", drawn), ("squares", drawn**2)):
        worst = np.abs(np.corrcoef(values) - np.eye(len(keys))).max()
        figure(f"noise: correlation of draws, {name}", worst * math.sqrt(COUNT // 4), 5)
        near, far = np.split(values, 2, axis=1)
        worst = max(abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(near, far, strict=True))
        figure(f"noise: correlation of halves, {name}", worst * math.sqrt(COUNT // 8), 5)


@pytest.mark.parametrize("value", [-1, 2**64, True, False, 1.0, "1", None, np.int64(3), float("nan")])
@pytest.mark.parametrize("name", ["seed", "sample"])
def test_a_bad_seed_is_refused(name: str, value: Any) -> None:
    key = {"seed": 1, "sample": 1} | {name: value}
    with pytest.raises(InputError, match=f"^{name} is .*, expected a whole number of 0 to 18446744073709551615$"):
        normal(**key, stream=0, shape=(2,))
