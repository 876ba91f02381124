"""Reads Ansible Vault text, formats 1.1 and 1.2, cipher AES256, as ansible-vault writes it.

The text is a header line, then hex of three hex lines: salt, HMAC, ciphertext. PBKDF2-HMAC-SHA256
makes 80 bytes of the password: the AES-256 key, the HMAC key, the first counter block.
"""

from __future__ import annotations

import hashlib
import hmac
from binascii import unhexlify

from inferfleet.errors import SecretError

_ITERATIONS = 10_000
_BLOCK = 16  # bytes


def decrypt(text: str, password: bytes) -> bytes:
    """The plaintext. Raises SecretError: not vault text, damaged, or not this password's."""
    lines = text.split()
    _check_header(lines[0] if lines else "")
    salt, code, ciphertext = _parts("".join(lines[1:]))
    keys = hashlib.pbkdf2_hmac("sha256", password, salt, _ITERATIONS, 64 + _BLOCK)
    expected = hmac.digest(keys[32:64], ciphertext, "sha256")
    if not hmac.compare_digest(code, expected):
        raise SecretError("wrong vault password, or the vault string was changed")
    return _unpadded(_aes_ctr(keys[:32], keys[64:], ciphertext))


def _check_header(header: str) -> None:
    magic, version, cipher, *_ = (*header.split(";"), "", "", "")
    if magic != "$ANSIBLE_VAULT":
        raise SecretError("not an Ansible Vault string: it must begin with $ANSIBLE_VAULT;")
    if version not in ("1.1", "1.2") or cipher != "AES256":
        raise SecretError(
            f"Ansible Vault format {version} {cipher} cannot be read: 1.1 and 1.2 AES256 can"
        )


def _parts(body: str) -> tuple[bytes, bytes, bytes]:
    try:
        salt, code, ciphertext = map(unhexlify, unhexlify(body).split(b"\n"))
    except ValueError as error:  # no text of the error: binascii's is of no use to anyone
        raise SecretError("the vault string is damaged: copy it again, whole") from error
    if (
        not salt
        or len(code) != hashlib.sha256().digest_size
        or not ciphertext
        or len(ciphertext) % _BLOCK
    ):
        raise SecretError("the vault string is damaged: copy it again, whole")
    return salt, code, ciphertext


def _aes_ctr(key: bytes, counter: bytes, ciphertext: bytes) -> bytes:
    # imported late: most runs read no vault string, and this takes longer than all they do
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


def _unpadded(padded: bytes) -> bytes:
    """Without its PKCS #7 padding."""
    count = padded[-1]
    if not 0 < count <= _BLOCK or padded[-count:] != bytes([count]) * count:
        raise SecretError("the vault string is damaged: its padding is wrong")
    return padded[:-count]
