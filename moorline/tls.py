"""TLS between a server and those that ask it on its own machine."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

from moorline.errors import MoorlineError

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\s", re.DOTALL)


class CertificateInvalid(MoorlineError):
    """The server's certificate or its key cannot be used; one line with the remedy."""


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """See that `serving.ssl_certfile` and `serving.ssl_keyfile` can be served.

    Raises:
        CertificateInvalid: one is missing, unreadable, encrypted, or not the other's.
    """
    if certificate is None:
        if key is not None:
            raise CertificateInvalid(
                "serving.ssl_keyfile is set and serving.ssl_certfile is not: set both, or neither"
            )
        return
    for setting, path in (("serving.ssl_certfile", certificate), ("serving.ssl_keyfile", key)):
        if path is not None:
            _read(path, setting)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate, key, password=_no_password
        )
    except (ssl.SSLError, ValueError) as error:
        what = f"{certificate} and {key}" if key else f"{certificate}"
        raise CertificateInvalid(
            f"{what} cannot be served ({error}): serving.ssl_certfile must be a PEM file, its own "
            "certificate first, and serving.ssl_keyfile the key of that certificate, without a "
            "passphrase (or both in one file)"
        ) from None


def trusting(certificate: Path) -> ssl.SSLContext:
    """Trust exactly the server that has this certificate, under whatever name it is reached.

    Raises:
        CertificateInvalid: the file cannot be read, or holds no certificate.
    """
    first = _CERTIFICATE.search(_read(certificate, "serving.ssl_certfile") + b"\n")
    if first is None:
        raise CertificateInvalid(f"{certificate} holds no certificate in PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # nobody else has the key of this very certificate
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=first.group().decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise CertificateInvalid(f"{certificate} holds no certificate in PEM ({error})") from None
    return context


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateInvalid(
            f"{path} cannot be read ({error.strerror}): check {setting} and the file's permissions"
        ) from None


def _no_password() -> str:
    """Asked for where the key is encrypted; a server cannot ask anybody."""
    raise ValueError("the key is encrypted")
