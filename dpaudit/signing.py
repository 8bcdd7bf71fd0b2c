"""Ed25519 keys in files, and signatures over text (RFC 8032, RFC 8410; computed by `cryptography`).

Key files are PEM as OpenSSL writes them: `openssl genpkey -algorithm ed25519` makes one too. A private key lies in a
file of mode 0600 that belongs to whoever signs, outside of every run. A key is named by its fingerprint, the SHA-256 of
its public part in DER: `openssl pkey -pubin -in KEY.pub -outform DER | sha256sum`.
"""

import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dpaudit import atomic, untrusted
from dpaudit.errors import UsageError

MOST_KEY = 1 << 12  # bytes of a key's file: one has 119
_ACCEPTED = "accepted: an Ed25519 key in PEM, as dpaudit keygen writes it"


@dataclass(frozen=True)
class PublicKey:
    """What checks a signature."""

    key: Ed25519PublicKey

    @property
    def pem(self) -> str:
        """Its file's text."""
        layout = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_bytes(serialization.Encoding.PEM, layout).decode()

    @property
    def sha256(self) -> str:
        """Its fingerprint, 64 hexadecimal digits."""
        layout = serialization.PublicFormat.SubjectPublicKeyInfo
        return hashlib.sha256(self.key.public_bytes(serialization.Encoding.DER, layout)).hexdigest()

    def signed(self, text: str, signature: str) -> bool:
        """Whether `signature` (base64) is this key's over exactly `text`."""
        try:
            self.key.verify(base64.b64decode(signature, validate=True), text.encode())
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return True

    @classmethod
    def parse(cls, text: bytes, place: str) -> "PublicKey":
        """A key from PEM; UsageError that names `place` for anything else."""
        if b"PRIVATE KEY" in text:
            raise UsageError(f"{place}: holds a private key; accepted: the public one, for example {place}.pub")
        try:
            key = serialization.load_pem_public_key(text)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise UsageError(f"{place}: holds no public key that dpaudit knows; {_ACCEPTED}")
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> "PublicKey":
        """A key from a file; UsageError where it holds none."""
        return cls.parse(_read(path), str(path))


@dataclass(frozen=True)
class PrivateKey:
    """What makes a signature. Its content is never printed."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key())

    def sign(self, text: str) -> str:
        """The signature over `text`, in base64; the same text gives the same one."""
        return base64.b64encode(self.key.sign(text.encode())).decode()

    @classmethod
    def load(cls, path: Path) -> "PrivateKey":
        """A key from a file; UsageError where it holds none, where others may read it, or where it lies in a run."""
        require_outside_runs(path)
        content = _read(path, secret=True)
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except TypeError:  # it is encrypted
            raise UsageError(f"{path}: is locked with a pass phrase; accepted: a key without one, mode 0600") from None
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{path}: holds no private key that dpaudit knows; {_ACCEPTED}")
        return cls(key)


def generate(path: Path) -> PrivateKey:
    """Write a new key to `path` (mode 0600) and its public part to `path`.pub; nothing that exists is replaced."""
    if not path.name:
        raise UsageError(f"{path}: is no name of a file; accepted: the name of a new one")
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if os.path.lexists(file):
            raise UsageError(f"{file}: exists; a key is never replaced, choose another name")
    require_outside_runs(path)
    made = PrivateKey(Ed25519PrivateKey.generate())
    layout = serialization.PrivateFormat.PKCS8
    content = made.key.private_bytes(serialization.Encoding.PEM, layout, serialization.NoEncryption())
    atomic.write_bytes(path, content, mode=0o600)
    atomic.write_text(public, made.public.pem)
    return made


def require_outside_runs(path: Path) -> None:
    """UsageError where a private key lies, or would lie, in a run: runs are handed over and copied."""
    for folder in path.resolve().parents:
        released = all(os.path.lexists(folder / name) for name in ("config.yaml", "ledger.json"))
        if released or os.path.lexists(folder / "release" / "config.yaml"):
            raise UsageError(f"{path}: lies in {folder}, which is a run or a part of one; keep the key elsewhere")


def _read(path: Path, *, secret: bool = False) -> bytes:
    """The content of a key's file; secret: only where nobody else may read it."""
    try:
        with untrusted.open_regular(path, MOST_KEY) as file:
            info = os.fstat(file.fileno())
            if secret and (stat.S_IMODE(info.st_mode) & 0o077 or info.st_uid != os.geteuid()):
                mode = f"{stat.S_IMODE(info.st_mode):04o}"
                whose = "belongs to another user" if info.st_uid != os.geteuid() else f"has mode {mode}"
                raise UsageError(f"{path}: {whose}; accepted: your own private key, mode 0600 (chmod 600 {path})")
            return file.read(MOST_KEY)
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; {_ACCEPTED}") from None
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; dpaudit keygen {path.name.removesuffix('.pub')} makes one") from None
    except OSError as error:
        raise atomic.failure(path, error, "read") from error
