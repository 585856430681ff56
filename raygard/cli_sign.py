"""The commands that make keys, sign masks and verify them. Thin, as `raygard.cli`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from raygard.cli_options import JsonOption
from raygard.errors import RaygardError

sign_app = typer.Typer(add_completion=False)


@sign_app.command()
def keygen(
    key: Annotated[Path, typer.Argument(help="Private key to write; its public half goes to KEY.pub.")],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Lock it: RAYGARD_KEY_PASSPHRASE, else asked at the terminal.")
    ] = False,
) -> None:
    """Make a pair of keys to sign masks with (Ed25519). Publish KEY.pub; nobody else may have KEY.

    Neither file is ever overwritten, and only you can read KEY.
    """
    from raygard.mask.signature import PUBLIC_SUFFIX, make_keys

    fingerprint = make_keys(key, _passphrase(confirm=True) if passphrase else None)
    print(f"private key  {key}\npublic key   {key}{PUBLIC_SUFFIX}\nfingerprint  {fingerprint}")


@sign_app.command()
def sign(
    mask: Annotated[Path, typer.Argument(help="Folder of the mask.")],
    key: Annotated[Path, typer.Option("--key", help="Private key of `raygard keygen`.")],
) -> None:
    """Sign a mask: everything in its folder, down to the byte. Writes mask.sig beside it."""
    from raygard.mask.signature import SIGNATURE, is_encrypted, sign_mask

    fingerprint = sign_mask(mask, key, _passphrase() if is_encrypted(key) else None)
    print(f"signed by {fingerprint}: {mask / SIGNATURE}")


@sign_app.command()
def verify(
    mask: Annotated[Path, typer.Argument(help="Folder of the mask.")],
    key: Annotated[Path, typer.Option("--key", help="Public key of who must have signed it.")],
    as_json: JsonOption = False,
) -> None:
    """Did the owner of KEY sign this mask, byte for byte? Exit code 0: yes; 5: no, with the reason in one line."""
    import json

    from raygard.mask import FreezeMask
    from raygard.mask.signature import fingerprint_of, load_public_key

    found = FreezeMask.load(mask, require_signature=key)
    facts = {
        "key": fingerprint_of(load_public_key(key)),
        "mask_sha256": found.sha256,
        "domain": found.domain,
        "base_model": found.base_model,
        "frozen_tensors": len(found.frozen_names),
        "num_tensors": len(found.names),
        "tensors_with_values": len(found.values),
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"signed by {facts['key']}")
    values = f", {len(found.values)} of them with new values" if found.values else ""
    print(f"mask      {found.sha256}: freezes {facts['frozen_tensors']} of {facts['num_tensors']} tensors{values}")
    print(f"domain    {found.domain or '-'}; base model {found.base_model or '-'}")


def _passphrase(confirm: bool = False) -> bytes:
    """From the environment, else from the terminal; never from the command line, which others on the machine see."""
    from raygard.mask.signature import PASSPHRASE

    given = os.environ.get(PASSPHRASE)
    if given is None:
        if not sys.stdin.isatty():
            raise RaygardError(f"the key's passphrase is asked at a terminal, and this is none; set {PASSPHRASE}")
        given = typer.prompt("passphrase", hide_input=True, confirmation_prompt=confirm)
    return given.encode()


def require_signed(mask: str | Path | None, key: Path | None) -> None:
    """Raise SignatureError unless the owner of `key` has signed `mask`, RaygardError for a key without a mask."""
    from raygard.mask import FreezeMask

    if key is not None:
        if mask is None:
            raise RaygardError("--require-signature has no effect without a mask to verify; give one, or leave it out")
        FreezeMask.load(mask, require_signature=key)
