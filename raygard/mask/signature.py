"""Signed masks: who vouches for every byte of a mask folder (Ed25519, RFC 8032).

    mask.sig    JSON: the format, the key's fingerprint, and the signature, detached

What is signed is a fixed prefix and the bytes of mask.json, which names every other file of the folder with its
SHA-256. A key's fingerprint is the SHA-256 (hex) of its public half in DER, as
`openssl pkey -pubin -in KEY.pub -outform der | sha256sum` prints it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raygard.errors import ExitCode, RaygardError
from raygard.files import read_limited, readable_disk_errors, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE, ALGORITHM, FORMAT = "mask.sig", "ed25519", 1
# Without it a signature that the same key made of other things could pass for one of a mask.
PREFIX = b"raygard freeze mask, signature 1\n"
PASSPHRASE = "RAYGARD_KEY_PASSPHRASE"
PUBLIC_SUFFIX = ".pub"
MAX_KEY_BYTES = MAX_SIGNATURE_BYTES = 16 * 1024


class SignatureError(RaygardError):
    """A mask that is not what the owner of the required key has signed: nothing may be done with it."""

    exit_code = ExitCode.NOT_SIGNED


@dataclass(frozen=True)
class Signature:
    """Content of mask.sig. key: fingerprint (hex). value: the signature (hex)."""

    key: str
    value: str

    def text(self) -> str:
        """The one way to write it: a file that says the same in other bytes is refused."""
        content = {"format_version": FORMAT, "algorithm": ALGORITHM, "key": self.key, "signature": self.value}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Signature:
        """The signature in a mask's folder. Raises SignatureError if there is none or it is damaged."""
        file = folder / SIGNATURE
        try:
            data = read_limited(file, MAX_SIGNATURE_BYTES)
        except OSError:
            raise SignatureError(f"{folder} is not signed: it has no readable {SIGNATURE}") from None
        found = re.search(rb'"key": "([0-9a-f]{64})",\n "signature": "([0-9a-f]{128})"', data)
        signature = cls(*(part.decode() for part in found.groups())) if found else None
        if signature is None or signature.text().encode() != data:
            raise SignatureError(f"{file} is damaged or of another raygard version; fetch the mask again")
        return signature


def make_keys(path: str | Path, passphrase: bytes | None = None) -> str:
    """Write a new private key to `path` (PKCS8 PEM, mode 0600) and its public half to `path`.pub; its fingerprint.

    passphrase: encrypts the private key. Raises RaygardError if either file exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Path(path)
    public = private.with_name(private.name + PUBLIC_SUFFIX)
    if passphrase is not None and not passphrase:
        raise RaygardError("the passphrase is empty; leave it out for a key without one")
    for file in (private, public):
        if os.path.lexists(file):
            raise RaygardError(f"{file} exists; a key is never overwritten: choose another name")
    key = Ed25519PrivateKey.generate()
    lock = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock)
    shown = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    with readable_disk_errors(private):
        private.parent.mkdir(parents=True, exist_ok=True)
        _write_new(private, secret, 0o600)
        try:
            _write_new(public, shown, 0o644)
        except BaseException:
            private.unlink()
            raise
    return fingerprint_of(key.public_key())


def _write_new(path: Path, data: bytes, mode: int) -> None:
    # O_EXCL follows no link and takes no file that somebody made in the meantime.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink()
        raise


def fingerprint_of(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of a public key in DER (SubjectPublicKeyInfo)."""
    import hashlib

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def load_public_key(path: str | Path) -> Ed25519PublicKey:
    """An Ed25519 public key from a PEM file. Raises RaygardError if it is missing, another kind, or a private key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read_key(Path(path))
    if b"PRIVATE KEY" in data:
        raise RaygardError(f"{path} is a private key; give its public half ({path}{PUBLIC_SUFFIX})")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise RaygardError(f"{path} is no public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise RaygardError(f"{path} is a public key of another kind; masks are signed with Ed25519 (raygard keygen)")
    return key


def is_encrypted(path: str | Path) -> bool:
    """Whether a private key needs a passphrase. Raises RaygardError if it is missing."""
    return b"ENCRYPTED PRIVATE KEY" in _read_key(Path(path))


def load_private_key(path: str | Path, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """An Ed25519 private key from a PEM file.

    Raises RaygardError if it is missing, readable by others, of another kind, or the passphrase is wrong or missing.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_key(Path(path))
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    if mode & 0o077:
        raise RaygardError(f"{path} may be read by others (mode {mode:04o}); chmod 600 it, or make a new key")
    if b"ENCRYPTED" not in data:
        passphrase = None
    elif not passphrase:
        raise RaygardError(f"{path} is locked with a passphrase; set {PASSPHRASE}, or sign at a terminal")
    try:
        key = load_pem_private_key(data, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = "the passphrase is wrong or the file is damaged" if passphrase else "no private key in PEM"
        raise RaygardError(f"cannot read {path}: {why}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise RaygardError(f"{path} is a private key of another kind; masks are signed with Ed25519 (raygard keygen)")
    return key


def _read_key(path: Path) -> bytes:
    try:
        return read_limited(path, MAX_KEY_BYTES)
    except OSError as error:
        raise RaygardError(f"cannot read key {path}: {error.strerror or error}") from None


def sign_mask(folder: str | Path, private_key: str | Path, passphrase: bytes | None = None) -> str:
    """Check a mask's folder whole and write mask.sig into it; the key's fingerprint.

    Raises RaygardError for a damaged mask, a file that is no part of one, a mask that another key has signed or that
    has changed since it was signed, and as `load_private_key`.
    """
    from raygard.mask.artifact import MANIFEST, FreezeMask

    folder = Path(folder)
    key = load_private_key(private_key, passphrase)
    FreezeMask.load(folder)
    manifest = (folder / MANIFEST).read_bytes()
    require_files(folder, manifest, signed=False)
    own = fingerprint_of(key.public_key())
    signature = Signature(own, key.sign(PREFIX + manifest).hex())
    if os.path.lexists(folder / SIGNATURE) and Signature.read(folder) != signature:
        raise RaygardError(f"{folder} holds a signature by another key or of other bytes; remove {SIGNATURE} first")
    write_text(folder / SIGNATURE, signature.text())
    return own


def check_signature(folder: Path, manifest: bytes, public_key: str | Path) -> str:
    """The fingerprint of `public_key`, if its owner has signed `manifest`, the bytes of a mask.json.

    Raises SignatureError if not, RaygardError for a key that cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    key = load_public_key(public_key)
    own, signature = fingerprint_of(key), Signature.read(folder)
    if signature.key != own:
        raise SignatureError(f"{folder} is signed by the key {signature.key}, not by {own} ({public_key})")
    try:
        key.verify(bytes.fromhex(signature.value), PREFIX + manifest)
    except InvalidSignature:
        raise SignatureError(
            f"{folder} is not what the key {own} has signed: its mask.json or {SIGNATURE} was altered"
        ) from None
    return own


def require_files(folder: Path, manifest: bytes, *, signed: bool) -> None:
    """Raise SignatureError unless the folder holds exactly mask.json, what that names, and perhaps mask.sig.

    manifest: the bytes of a valid mask.json.
    """
    from raygard.mask.artifact import MANIFEST

    named = {MANIFEST, *json.loads(manifest)["files"]}
    found = {file.name for file in folder.iterdir()} - {SIGNATURE}
    added, missing = sorted(found - named), sorted(named - found)
    if missing:
        raise SignatureError(f"{folder} lacks {missing[0]}, which its {MANIFEST} names")
    if added:
        why = "which was not signed" if signed else "which is no part of a mask and would not be signed"
        raise SignatureError(f"{folder} holds {added[0]!r}, {why}; take it out")
