"""Signed masks: every byte of a folder, by one key, or nothing is done with it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raygard.cli import main
from raygard.config_file import load_config
from raygard.defences import masks_to_evaluate
from raygard.errors import ExitCode, RaygardError
from raygard.files import sha256_file
from raygard.mask import FreezeMask, SignatureError, make_keys, sign_mask
from raygard.mask.artifact import ARRAYS, MANIFEST, VALUES
from raygard.mask.signature import PASSPHRASE, SIGNATURE, Signature, load_private_key
from raygard.user import adapt_model, generate_pictures


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


def make_mask(folder: Path, name: str = "mask") -> Path:
    """With edited values beside it, as a release that was edited has."""
    values = {"2.bias": torch.tensor([5.0, 6.0])}
    return FreezeMask.create(net(), ["0.weight", "2.bias"], values=values, domain="emoji").save(folder / name)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_keys(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Path:
    folder = make_mask(tmp_path)
    sign_mask(folder, key)
    return folder


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def refused(folder: Path, key: Path) -> str:
    with pytest.raises(SignatureError) as caught:
        FreezeMask.load(folder, require_signature=public(key))
    assert str(caught.value).isprintable() and caught.value.exit_code == ExitCode.NOT_SIGNED
    return str(caught.value)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["raygard", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        text = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=text.out, error=text.err)

    return call


# ------------------------------------------------------------------------------------------------ signing


def test_what_changes_after_it_was_checked_is_not_used(
    signed: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who writes to the folder while it is read gets nothing in that was not signed."""
    expected, arrays = FreezeMask.load(signed), load_file(str(signed / ARRAYS))

    def hash_then_swap(file: Path) -> str:
        digest = sha256_file(file)
        save_file({**arrays, "logits": arrays["logits"] + 1}, str(signed / ARRAYS))
        return digest

    monkeypatch.setattr("raygard.mask.artifact.sha256_file", hash_then_swap)
    found = FreezeMask.load(signed, require_signature=public(key))
    with (signed / VALUES).open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(bytes(8))
    assert torch.equal(found.logits, expected.logits) and found.values["2.bias"].tolist() == [5.0, 6.0]


def test_a_file_that_cannot_be_read_is_one_line(signed: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("raygard.mask.artifact.sha256_file", forbidden)
    assert "Permission denied" in refused(signed, key)


def test_a_signed_mask_is_the_mask(signed: Path, key: Path) -> None:
    found, plain = FreezeMask.load(signed, require_signature=public(key)), FreezeMask.load(signed)
    assert found.sha256 == plain.sha256 and torch.equal(found.values["2.bias"], torch.tensor([5.0, 6.0]))


def test_every_flipped_byte_is_refused(signed: Path, key: Path) -> None:
    for name in (MANIFEST, ARRAYS, VALUES, SIGNATURE):
        whole = (signed / name).read_bytes()
        for place in range(0, len(whole), 1 + len(whole) // 150):
            (signed / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            refused(signed, key)
        (signed / name).write_bytes(whole + b"\n")
        refused(signed, key)
        (signed / name).write_bytes(whole)
    FreezeMask.load(signed, require_signature=public(key))


def test_missing_added_and_renamed_files_are_named(signed: Path, key: Path, tmp_path: Path) -> None:
    (signed / "extra.safetensors").write_bytes(b"")
    assert "holds 'extra.safetensors', which was not signed" in refused(signed, key)
    (signed / "extra.safetensors").unlink()
    for name in (MANIFEST, ARRAYS, VALUES, SIGNATURE):
        (signed / name).rename(tmp_path / "aside")
        assert name in refused(signed, key)
        (tmp_path / "aside").rename(signed / name)
    (signed / VALUES).rename(signed / "edited.safetensors")
    assert VALUES in refused(signed, key)


def test_a_forger_who_mends_the_manifest_is_found_out(signed: Path, key: Path) -> None:
    (signed / SIGNATURE).rename(signed.parent / "kept.sig")
    FreezeMask.create(net(), ["0.bias"]).save(signed)
    (signed.parent / "kept.sig").rename(signed / SIGNATURE)
    FreezeMask.load(signed)
    assert "was altered" in refused(signed, key)


def test_another_key_and_a_claimed_key_are_refused(signed: Path, key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    theirs = make_keys(other)
    mine = Signature.read(signed)
    assert f"signed by the key {mine.key}, not by {theirs}" in refused(signed, other)
    (signed / SIGNATURE).write_text(Signature(theirs, mine.value).text())
    assert "was altered" in refused(signed, other) and "not by" in refused(signed, key)


def test_the_signature_is_of_a_mask_and_of_nothing_else(tmp_path: Path, key: Path) -> None:
    folder = make_mask(tmp_path)
    plain = load_private_key(key).sign((folder / MANIFEST).read_bytes()).hex()
    fingerprint = sign_mask(make_mask(tmp_path, "twin"), key)
    (folder / SIGNATURE).write_text(Signature(fingerprint, plain).text())
    assert "was altered" in refused(folder, key)


def test_the_fingerprint_is_that_of_openssl(key: Path, signed: Path) -> None:
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", str(public(key)), "-outform", "der"], capture_output=True, check=True
    ).stdout
    import hashlib

    assert Signature.read(signed).key == hashlib.sha256(der).hexdigest()


def test_what_is_broken_or_more_than_a_mask_is_not_signed(tmp_path: Path, key: Path) -> None:
    folder = make_mask(tmp_path)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RaygardError, match=r"'notes\.txt', which is no part of a mask"):
        sign_mask(folder, key)
    (folder / "notes.txt").unlink()
    (folder / VALUES).write_bytes(b"")
    with pytest.raises(RaygardError, match="differs from the hash"):
        sign_mask(folder, key)
    assert not (folder / SIGNATURE).exists()


def test_a_signature_is_repeated_but_never_replaced(signed: Path, key: Path, tmp_path: Path) -> None:
    before = (signed / SIGNATURE).read_bytes()
    sign_mask(signed, key)
    assert (signed / SIGNATURE).read_bytes() == before
    make_keys(tmp_path / "other")
    with pytest.raises(RaygardError, match="holds a signature by another key"):
        sign_mask(signed, tmp_path / "other")


def test_saving_again_keeps_the_signature_of_the_same_mask_only(signed: Path, key: Path) -> None:
    FreezeMask.load(signed).save(signed)
    FreezeMask.load(signed, require_signature=public(key))
    with pytest.raises(RaygardError, match="holds another mask, which is signed"):
        FreezeMask.create(net(), ["0.bias"]).save(signed)
    FreezeMask.load(signed, require_signature=public(key))
    assert {file.name for file in signed.parent.iterdir()} == {"mask", "key", "key.pub"}


# --------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("passphrase", [None, b"correct horse"])
def test_keys_are_private_and_never_overwritten(tmp_path: Path, passphrase: bytes | None) -> None:
    before = os.umask(0)
    try:
        make_keys(tmp_path / "new" / "key", passphrase)
    finally:
        os.umask(before)
    key = tmp_path / "new" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (b"ENCRYPTED" in key.read_bytes()) == bool(passphrase)
    content = key.read_bytes(), public(key).read_bytes()
    for gone in (None, key, public(key)):
        if gone is not None:
            gone.unlink()
            gone.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RaygardError, match="never overwritten"):
            make_keys(key)
        if gone is not None:
            gone.unlink()
            gone.write_bytes(content[0 if gone == key else 1])
    assert (key.read_bytes(), public(key).read_bytes()) == content
    assert not (tmp_path / "elsewhere").exists()


def test_a_locked_key_needs_its_passphrase(tmp_path: Path) -> None:
    make_keys(tmp_path / "key", b"correct horse")
    folder = make_mask(tmp_path)
    for wrong, message in ((None, f"set {PASSPHRASE}"), (b"wrong", "the passphrase is wrong")):
        with pytest.raises(RaygardError, match=message):
            sign_mask(folder, tmp_path / "key", wrong)
    sign_mask(folder, tmp_path / "key", b"correct horse")
    with pytest.raises(RaygardError, match="passphrase is empty"):
        make_keys(tmp_path / "other", b"")


def test_keys_that_are_none(tmp_path: Path, signed: Path, key: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec.pub").write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "none").write_text("nothing")
    (tmp_path / "ec").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("key", "is a private key; give its public half"), ("ec.pub", "of another kind"),
                          ("none", "no public key"), ("missing", "cannot read key"),
                          ("pipe", "not a file")):  # fmt: skip
        with pytest.raises(RaygardError, match=message):
            FreezeMask.load(signed, require_signature=tmp_path / name)
    for name in ("ec", "none"):
        (tmp_path / name).chmod(0o600)
    for name, message in (("ec", "of another kind"), ("none", "no private key")):
        with pytest.raises(RaygardError, match=message):
            sign_mask(signed, tmp_path / name)
    key.chmod(0o640)
    with pytest.raises(RaygardError, match=r"may be read by others \(mode 0640\)"):
        sign_mask(signed, key)


# ----------------------------------------------------------------------------------------------- commands


def test_commands(tmp_path: Path, command: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, key = make_mask(tmp_path), tmp_path / "k"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    asked = command("keygen", key, "--passphrase")
    assert asked.code == ExitCode.BAD_INPUT and PASSPHRASE in asked.error and not key.exists()
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    made = command("keygen", key, "--passphrase")
    fingerprint = made.out.split()[-1]
    assert made.code == 0 and len(fingerprint) == 64
    unsigned = command("verify", folder, "--key", public(key))
    assert unsigned.code == ExitCode.NOT_SIGNED and "is not signed" in unsigned.error and not unsigned.out
    assert fingerprint in command("sign", folder, "--key", key).out
    verified = command("verify", folder, "--key", public(key))
    assert verified.code == 0 and f"signed by {fingerprint}" in verified.out and "freezes 2 of 4" in verified.out
    facts = json.loads(command("verify", folder, "--key", public(key), "--json").out)
    assert facts["key"] == fingerprint and facts["mask_sha256"] == FreezeMask.load(folder).sha256
    assert facts["tensors_with_values"] == 1
    assert "correct horse" not in made.out + made.error + verified.out


def test_audit_says_nothing_of_a_mask_that_is_not_signed(
    tmp_path: Path, command: Callable[..., SimpleNamespace], signed: Path, key: Path
) -> None:
    from safetensors.torch import save_file

    for name in ("base", "tuned"):
        save_file(net().state_dict(), tmp_path / f"{name}.safetensors")
    models = ["--base", tmp_path / "base.safetensors", "--model", tmp_path / "tuned.safetensors"]
    kept = command("audit", "--mask", signed, "--require-signature", public(key), *models)
    assert kept.code == ExitCode.MOVED and "2.bias" in kept.out
    (signed / SIGNATURE).unlink()
    found = command("audit", "--mask", signed, "--require-signature", public(key), *models)
    assert found.code == ExitCode.NOT_SIGNED and not found.out and found.error.count("\n") == 1


def test_no_command_works_with_a_mask_that_is_not_signed(
    tmp_path: Path, command: Callable[..., SimpleNamespace], key: Path
) -> None:
    folder, out = make_mask(tmp_path), tmp_path / "out"
    wanted = ["--mask", folder, "--require-signature", public(key), "--out", out]
    calls = (
        ["adapt", "--data", "zoo:emoji-styles", *wanted],
        ["generate", "a taco", *wanted],
        ["evaluate", *wanted],
        ["compare", "--out", out, "--require-signature", public(key), f"compare.mask={folder}"],
    )
    for call in calls:
        found = command(*call)
        assert found.code == ExitCode.NOT_SIGNED and "is not signed" in found.error, (call, found)
    assert not out.exists()


def test_a_key_without_a_mask_is_refused(tmp_path: Path, key: Path, command: Callable[..., SimpleNamespace]) -> None:
    config, out = load_config(), tmp_path / "out"
    with pytest.raises(RaygardError, match="no effect without --mask"):
        masks_to_evaluate(config, (), out, public(key))
    with pytest.raises(RaygardError, match="no effect without --mask"):
        adapt_model(config, "zoo:emoji-styles", (), None, out, 0, True, public(key))
    with pytest.raises(RaygardError, match="no effect without --mask"):
        generate_pictures("zoo:tiny-sd", ["a"], out, 0, 1, 1.0, require_signature=public(key))
    found = command("compare", "--out", out, "--require-signature", public(key))
    assert found.code == ExitCode.BAD_INPUT and "no effect without a mask" in found.error
    assert not out.exists()
