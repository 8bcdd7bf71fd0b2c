"""Keys, and noise = PRF(key, purpose, step, parameter, rank).

A run has one secret 32-byte key. Every random number that privacy rests on is a function of that key and of the
*address* (use, purpose, step, name, rank) alone, so a resumed run derives exactly the batch and the noise of the step
that it repeats, and no two addresses ever share a stream:

    address --length-prefixed encoding--> HMAC-SHA256(key, .) --32-byte subkey--> ChaCha20 keystream --> uniforms

HMAC-SHA256 is a pseudo-random function (RFC 2104; Bellare 2006) and ChaCha20 (RFC 8439) a pseudo-random generator, so
without the key the numbers are computationally indistinguishable from independent uniform ones. The guarantee is thus
computational, as that of every DP system with a finite key.

What this does not cover: *finite precision*. A Gaussian computed in floating point has a finite support (here
2^53 x 2^53 float64 points, rounded to float32), |z| <= 8.58, and adding it to a float32 sum leaves low-order bits that
depend on that sum (Mironov 2012; Casacuberta et al. 2022). The (eps, delta) proof is for real-valued noise; the gap is
not accounted. Neither is timing.

`Key.secure_normal` is the remedy of Holohan and Braghin (2021, arXiv 2107.10138, section 5.1), which Opacus calls its
secure mode: half the sum of four independent normals. Which of its 2^53 values a generator gave can then not be read
from a noisy number, since (2^53)^3 combinations would have to be tried. It stays in float64 until signal and noise are
added, so that the sum is rounded once. It makes the known attacks infeasible; it does not turn the proof into one for
floating-point numbers.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from dpaudit import atomic
from dpaudit.errors import UsageError, rejected
from dpaudit.untrusted import read_bytes

FINITE_PRECISION = (
    "The proof is for real-valued noise from a true random source; the noise here comes from a cryptographic stream, "
    "computed in float64 and added in float32. Attacks on floating-point noise and on timing are not covered."
)
SECURE_PRECISION = (
    "The proof is for real-valued noise from a true random source; the noise here comes from a cryptographic stream, "
    "half the sum of four normals in float64 (Holohan and Braghin 2021), and is rounded once, after it was added. The "
    "known attacks on floating-point noise are infeasible, not excluded by proof; timing is not covered."
)

_BITS = 53
_SUMMANDS = 4
_FORMAT = "dpaudit-key-v1"


def _encode(use: str, purpose: str, step: int, name: str, rank: int) -> bytes:
    """Injective: every field is a length in 8 bytes followed by its content, so no two addresses encode alike."""
    fields = (use.encode(), purpose.encode(), str(int(step)).encode(), name.encode(), str(int(rank)).encode())
    return b"dpaudit-prf-v1" + b"".join(len(part).to_bytes(8, "big") + part for part in fields)


@dataclass(frozen=True)
class Key:
    """A run's key. `seeded`: it came from `--seed`, so anyone can recompute the noise: not for release."""

    material: bytes = field(repr=False)
    seeded: bool

    def __post_init__(self) -> None:
        if len(self.material) != 32:
            raise ValueError("a key has 32 bytes")

    @classmethod
    def fresh(cls) -> "Key":
        """32 bytes from the operating system."""
        return cls(secrets.token_bytes(32), seeded=False)

    @classmethod
    def from_seed(cls, seed: int) -> "Key":
        """A reproducible key, for tests and demonstrations: it protects nobody."""
        if seed < 0:
            raise rejected("seed", seed, "an integer >= 0")
        return cls(hashlib.sha256(b"dpaudit-seed-v1:" + str(int(seed)).encode()).digest(), seeded=True)

    def save(self, path: Path, bound: Mapping[str, str] | None = None) -> None:
        """Write the key with mode 0600 from the start; an existing key is never overwritten (UsageError).

        bound: keyed hashes of what the key was drawn for, by name (trainers.binding).
        """
        if os.path.lexists(path):
            raise UsageError(f"{path}: holds a key already; a key is never replaced")
        tree: dict[str, Any] = {"format": _FORMAT, "seeded": self.seeded, "key": self.material.hex()}
        tree |= {"check": self._check()} | ({} if bound is None else {"bound": dict(bound)})
        text = json.dumps(tree)
        atomic.write_text(path, text + "\n", mode=0o600)

    @classmethod
    def load(cls, path: Path) -> "Key":
        """Read what `save` wrote; UsageError (without the content) when it is missing or damaged."""
        try:
            tree = json.loads(read_bytes(path, 1 << 12).decode("ascii"))
            if tree["format"] != _FORMAT or not isinstance(tree["seeded"], bool):
                raise ValueError
            key = cls(bytes.fromhex(tree["key"]), seeded=tree["seeded"])
            if (
                tree.get("check", key._check()) != key._check()
            ):  # another key would mean other noise on a gradient already released
                raise ValueError
            return key
        except OSError as error:
            raise UsageError(f"{path}: the noise key can't be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError):
            # `from None`: the parser's message quotes the file, and the file is a secret.
            raise UsageError(f"{path}: the noise key is damaged; the run can't be continued") from None

    def keyed_hash(self, purpose: str) -> "hashlib.blake2b":
        """A hash that only the holder of the key can compute: BLAKE2b under a subkey used for this purpose alone."""
        return hashlib.blake2b(key=self._subkey("hash", purpose, 0, "", 0), digest_size=32)

    def _check(self) -> str:
        """Tells a damaged key file from a whole one; a PRF output at an address used for nothing else."""
        return self._subkey("check", "seeded" if self.seeded else "secret", 0, "", 0).hex()[:16]

    def _subkey(self, use: str, purpose: str, step: int, name: str, rank: int) -> bytes:
        return hmac.digest(self.material, _encode(use, purpose, step, name, rank), "sha256")

    def _uniforms(self, count: int, subkey: bytes) -> npt.NDArray[np.float64]:
        """`count` multiples of 2^-53 in [0, 1), from the ChaCha20 keystream under a subkey used for nothing else."""
        encryptor = Cipher(algorithms.ChaCha20(subkey, bytes(16)), mode=None).encryptor()
        stream = encryptor.update(bytes(8 * count))
        words = np.frombuffer(stream, dtype="<u8") >> np.uint64(64 - _BITS)
        return words.astype(np.float64) * np.float64(2.0**-_BITS)

    def uniform(self, count: int, *, step: int, name: str, purpose: str) -> npt.NDArray[np.float64]:
        """`count` independent uniforms in [0, 1), shape (count,): for Poisson sampling and coins."""
        return self._uniforms(count, self._subkey("uniform", purpose, step, name, 0))

    def normal(
        self, shape: int | tuple[int, ...], *, step: int, name: str, rank: int = 0, purpose: str = "noise"
    ) -> npt.NDArray[np.float32]:
        """Independent standard normals of shape `shape`: Box-Muller in float64, rounded to float32.

        Every worker passes its own `rank`; the noise of (step, name, rank) is used once and for nothing else.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(shape)
        half = (count + 1) // 2
        uniforms = self._uniforms(2 * half, self._subkey("normal", purpose, step, name, rank))
        radius = np.sqrt(-2.0 * np.log1p(-uniforms[:half]))  # 1 - u lies in (0, 1]: never log(0)
        angle = (2.0 * np.pi) * uniforms[half:]
        out = np.empty(2 * half, dtype=np.float32)
        np.multiply(radius, np.cos(angle), out=out[:half], casting="same_kind")
        np.multiply(radius, np.sin(angle), out=out[half:], casting="same_kind")
        return out[:count].reshape(shape)

    def secure_normal(
        self, shape: int | tuple[int, ...], *, step: int, name: str, rank: int = 0, purpose: str = "noise"
    ) -> npt.NDArray[np.float64]:
        """Independent standard normals of shape `shape` in float64, each half the sum of four: twice the time.

        See the module's docstring. Streams of their own: no number of `normal` is among them.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(shape)
        half = (count + 1) // 2
        total = np.zeros(2 * half)
        for part in range(_SUMMANDS):
            subkey = self._subkey(f"secure-normal-{part}", purpose, step, name, rank)
            uniforms = self._uniforms(2 * half, subkey)
            radius = np.sqrt(-2.0 * np.log1p(-uniforms[:half]))
            angle = (2.0 * np.pi) * uniforms[half:]
            total[:half] += radius * np.cos(angle)
            total[half:] += radius * np.sin(angle)
        return (total[:count] / math.sqrt(_SUMMANDS)).reshape(shape)

    def generator(self, *, purpose: str, step: int = 0) -> np.random.Generator:
        """A numpy generator for everything that privacy does not rest on (initialisation, drawing pictures)."""
        entropy = int.from_bytes(self._subkey("generator", purpose, step, "", 0), "big")
        return np.random.Generator(np.random.PCG64(entropy))


def bound_of(path: Path) -> dict[str, str] | None:
    """What the key in `path` was drawn for, as `Key.save` noted it; None: nothing is noted. UsageError: damaged."""
    Key.load(path)
    found = json.loads(read_bytes(path, 1 << 12).decode("ascii")).get("bound")
    if found is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UsageError(f"{path}: the noise key is damaged; the run can't be continued")
    return found
