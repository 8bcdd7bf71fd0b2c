"""Noise = PRF(key, address): the law, no shared streams, and a second implementation as the oracle.

Statistical tests fail on correct code with probability below 1e-6 over the choice of the (fixed) seed.
"""

import hashlib
import hmac
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpaudit.errors import UsageError
from dpaudit.randomness import Key, _encode

KEY = Key.from_seed(20240607)


def chacha20_block(key: bytes, counter: int) -> bytes:
    """RFC 8439 section 2.3, with a zero nonce; written from the RFC, independent of the library."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
    state = list(start)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) & 0xFFFFFFFF
            mixed = state[z] ^ state[x]
            state[z] = ((mixed << turn) | (mixed >> (32 - turn))) & 0xFFFFFFFF

    for _ in range(10):
        for column in range(4):
            quarter(column, column + 4, column + 8, column + 12)
        for diagonal in range(4):
            quarter(diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4)
    return struct.pack("<16I", *((word + first) & 0xFFFFFFFF for word, first in zip(state, start, strict=True)))


def test_uniforms_equal_a_second_implementation() -> None:
    address = [b"uniform", b"poisson", b"7", "größe".encode(), b"0"]
    message = b"dpaudit-prf-v1" + b"".join(struct.pack(">Q", len(part)) + part for part in address)
    subkey = hmac.new(KEY.material, message, hashlib.sha256).digest()
    stream = b"".join(chacha20_block(subkey, counter) for counter in range(3))
    words = struct.unpack("<24Q", stream)
    expected = [(word >> 11) / 2**53 for word in words][:20]
    assert KEY.uniform(20, step=7, name="größe", purpose="poisson").tolist() == expected


def test_normals_are_box_muller_of_the_stream() -> None:
    got = KEY.normal((3, 3), step=1, name="w", rank=2)
    uniforms = KEY._uniforms(10, KEY._subkey("normal", "noise", 1, "w", 2))
    radius, angle = np.sqrt(-2 * np.log(1 - uniforms[:5])), 2 * np.pi * uniforms[5:]
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:9].reshape(3, 3)
    assert got.dtype == np.float32 and got.shape == (3, 3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_law_of_the_normals() -> None:
    n = 1_000_000
    sample = KEY.normal(n, step=3, name="law").astype(np.float64)
    assert stats.kstest(sample, "norm").pvalue > 1e-7
    # Mean, variance and fourth moment: standard errors 1, sqrt 2 and sqrt 96 over sqrt n; 5.5 sigma is 4e-8.
    assert abs(sample.mean()) < 5.5 / np.sqrt(n)
    assert abs((sample**2).mean() - 1) < 5.5 * np.sqrt(2 / n)
    assert abs((sample**4).mean() - 3) < 5.5 * np.sqrt(96 / n)
    for threshold in (3.0, 4.0):  # the tails, where a clumsy inverse would show
        beyond, p = int((np.abs(sample) > threshold).sum()), 2 * stats.norm.sf(threshold)
        assert stats.binomtest(beyond, n, p).pvalue > 1e-7


def test_law_of_the_uniforms() -> None:
    sample = KEY.uniform(500_000, step=0, name="", purpose="law")
    assert sample.min() >= 0 and sample.max() < 1
    assert stats.kstest(sample, "uniform").pvalue > 1e-7
    assert np.all(sample * 2**53 == np.floor(sample * 2**53))


def test_streams_of_neighbouring_addresses_are_independent() -> None:
    n = 200_000
    streams = [
        KEY.normal(n, step=0, name="w"),
        KEY.normal(n, step=1, name="w"),
        KEY.normal(n, step=0, name="v"),
        KEY.normal(n, step=0, name="w", rank=1),
        KEY.normal(n, step=0, name="w", purpose="fusion"),
        Key.from_seed(20240608).normal(n, step=0, name="w"),
        stats.norm.ppf(np.clip(KEY.uniform(n, step=0, name="w", purpose="noise"), 1e-16, None)),
        KEY.generator(purpose="noise").standard_normal(n),
    ]
    correlation = np.corrcoef(np.array(streams))
    off = correlation[~np.eye(len(streams), dtype=bool)]
    # 28 pairs, 6 sigma each: 6e-8
    assert np.abs(off).max() < 6 / np.sqrt(n)
    # Within a stream: the two halves come from the same uniforms, neighbours from the same radius.
    first = streams[0].astype(np.float64)
    for lag in (1, 2, n // 2):
        for transform in (lambda x: x, np.square):
            a, b = transform(first[:-lag]), transform(first[lag:])
            assert abs(np.corrcoef(a, b)[0, 1]) < 6 / np.sqrt(n - lag)


def test_box_muller_pairs_are_independent_in_the_squares() -> None:
    n = 200_000
    sample = KEY.normal(n, step=5, name="pairs").astype(np.float64)
    left, right = sample[: n // 2], sample[n // 2 :]
    assert abs(np.corrcoef(left**2, right**2)[0, 1]) < 6 / np.sqrt(n / 2)
    assert abs(np.corrcoef(np.abs(left), np.abs(right))[0, 1]) < 6 / np.sqrt(n / 2)


ADDRESS = st.tuples(
    st.text(max_size=4), st.text(max_size=4), st.integers(-(2**70), 2**70), st.text(max_size=4), st.integers(0, 99)
)


@given(ADDRESS, ADDRESS)
def test_no_two_addresses_encode_alike(
    one: tuple[str, str, int, str, int], two: tuple[str, str, int, str, int]
) -> None:
    assert (_encode(*one) == _encode(*two)) == (one == two)


def test_ambiguous_concatenations_are_kept_apart() -> None:
    pairs = [
        (("normal", "a", 1, "1b", 0), ("normal", "a", 11, "b", 0)),
        (("normal", "a", 1, "b", 10), ("normal", "a", 1, "b1", 0)),
        (("normal", "noise", 1, "", 0), ("normal", "", 1, "noise", 0)),
        (("normal", "x\0", 1, "y", 0), ("normal", "x", 1, "\0y", 0)),
        (("normal", "noise", -1, "w", 1), ("normal", "noise", 1, "w", -1)),
    ]
    for one, two in pairs:
        assert _encode(*one) != _encode(*two)


def test_deterministic_and_seeded_keys_differ() -> None:
    again = Key.from_seed(20240607)
    np.testing.assert_array_equal(KEY.normal(100, step=9, name="w"), again.normal(100, step=9, name="w"))
    assert again == KEY and again.seeded
    assert KEY.generator(purpose="a").integers(2**60) == again.generator(purpose="a").integers(2**60)
    assert KEY.generator(purpose="a").integers(2**60) != KEY.generator(purpose="a", step=1).integers(2**60)
    fresh = {Key.fresh().material for _ in range(20)}
    assert len(fresh) == 20 and not Key.fresh().seeded
    assert len({Key.from_seed(seed).material for seed in range(100)}) == 100
    with pytest.raises(UsageError, match="seed"):
        Key.from_seed(-1)


def test_a_longer_draw_of_the_same_uniforms_begins_alike() -> None:
    short, long = (KEY.uniform(n, step=0, name="x", purpose="p") for n in (10, 1000))
    np.testing.assert_array_equal(short, long[:10])


@pytest.mark.parametrize("shape", [0, 1, (), (0, 3), (1,), (2, 3, 5), 7])
def test_shapes(shape: int | tuple[int, ...]) -> None:
    assert KEY.normal(shape, step=0, name="s").shape == ((shape,) if isinstance(shape, int) else shape)


def test_the_key_file(tmp_path: Path) -> None:
    for key in (Key.fresh(), Key.from_seed(5)):
        path = tmp_path / f"{key.seeded}.key"
        key.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert Key.load(path) == key
        with pytest.raises(UsageError, match="never replaced"):
            Key.fresh().save(path)


def test_the_secret_is_never_shown(tmp_path: Path) -> None:
    key = Key.fresh()
    secret = key.material.hex()
    assert secret not in repr(key) and repr(key.material) not in repr(key)
    path = tmp_path / "k"
    for text in (
        f'{{"key": "{secret}"',
        f'{{"format": "dpaudit-key-v1", "seeded": false, "key": "{secret}00"}}',
        secret,
    ):
        path.write_text(text)
        with pytest.raises(UsageError) as caught:
            Key.load(path)
        assert secret not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(UsageError, match="can't be read"):
        Key.load(tmp_path / "missing")


def test_secure_normals_have_the_law_and_streams_of_their_own() -> None:
    key = Key.from_seed(11)
    values = key.secure_normal(200_001, step=3, name="w")
    assert values.dtype == np.float64 and values.shape == (200_001,)
    # One test at 1e-8 each: the law, and the variance by a chi-square interval.
    assert stats.kstest(values, "norm").pvalue > 1e-8
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], values.size)
    assert low < float((values**2).sum()) < high
    again = key.secure_normal((200_001,), step=3, name="w")
    assert np.array_equal(values, again)
    others = [
        key.secure_normal(200_001, step=4, name="w"),
        key.secure_normal(200_001, step=3, name="v"),
        key.secure_normal(200_001, step=3, name="w", rank=1),
        key.normal(200_001, step=3, name="w").astype(np.float64),
        np.roll(values, 100_001),  # the two halves of the Box-Muller pairs
    ]
    for other in others:
        assert abs(float(np.corrcoef(values, other)[0, 1])) * values.size**0.5 < 6.0
    # Half a sum of four float64 normals hits points between the float32 grid; plain normals are float32.
    assert not np.array_equal(values.astype(np.float32).astype(np.float64), values)
