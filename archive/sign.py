"""Sign archives with a key of your own, and check signatures: Ed25519, a detached file `NAME.mar.sig`.

The signature is the plain one of the archive's bytes, so that OpenSSL can check it as well:

    openssl pkeyutl -verify -rawin -pubin -inkey KEY.pub -sigfile NAME.mar.sig -in NAME.mar
"""

from __future__ import annotations

import mmap
import os
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from archive.errors import SignatureError
from archive.members import signature_path
from system import files

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ImportError:  # an extra, and this module is imported where something is to be signed or checked alone
    raise SignatureError("signatures need the package cryptography: pip install cryptography") from None

_NO_ED25519 = "is no Ed25519 key: `python -m archive keygen KEY` makes one"


def keygen(private_key: Path) -> Path:
    """Write a new key pair: `private_key`, readable by its owner alone, and `private_key`.pub.

    Returns:
        The path of the public key.

    Raises:
        SignatureError: one of the files exists or cannot be written.
    """
    public_key = private_key.with_name(f"{private_key.name}.pub")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path in (private_key, public_key):
        if path.exists():
            raise SignatureError(f"{path} exists, and a key that has signed must not be lost: give another name")
    for path, mode, content in ((private_key, 0o600, secret), (public_key, 0o644, public)):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except OSError as error:
            raise SignatureError(f"cannot write {path}: {error.strerror}") from None
    return public_key


def sign(archive: Path, private_key: Path, file: BinaryIO | None = None) -> bytes:
    """The signature of the archive's bytes.

    Args:
        file: the archive where it is open already, so that no other lies at its path by now.

    Raises:
        SignatureError: the archive or the key cannot be read.
    """
    key = _private_key(private_key)
    try:
        with (
            nullcontext(file) if file else archive.open("rb") as opened,
            _mapped(opened) as mapped,
            memoryview(mapped) as data,
        ):
            return key.sign(data)
    except (OSError, ValueError) as error:
        raise SignatureError(f"cannot sign {archive}: {error}") from None


def write(signature: bytes, archive: Path) -> Path:
    """Put a signature beside its archive, and return its path."""
    target = signature_path(archive)
    files.write(target, signature)
    return target


def check(archive: Path, file: BinaryIO, public_key: Path) -> None:
    """Check the signature that lies beside `archive` on the bytes of `file`, which was opened there.

    Raises:
        SignatureError: there is no signature of these bytes by the owner of `public_key`.
    """
    key = _public_key(public_key)
    signature = signature_path(archive)
    if not signature.exists():
        raise SignatureError(
            f"{archive} is not signed: its owner runs `python -m archive sign {archive} --private-key KEY`"
        )
    try:
        with _mapped(file) as mapped, memoryview(mapped) as data:
            key.verify(signature.read_bytes(), data)
    except (OSError, ValueError) as error:
        raise SignatureError(f"cannot check the signature of {archive}: {error}") from None
    except InvalidSignature:
        raise SignatureError(
            f"{signature} is no signature of {archive} by the owner of {public_key}: do not serve it"
        ) from None


def _mapped(file: BinaryIO) -> mmap.mmap:
    """The file's bytes without reading them into memory."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise SignatureError(f"cannot use the private key {path}: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path} {_NO_ED25519}")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SignatureError(f"cannot use the public key {path}: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path} {_NO_ED25519}")
    return key
