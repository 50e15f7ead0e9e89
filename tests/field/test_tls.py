"""A server that speaks HTTPS: its certificate is checked at start, and trusted beside it."""

from __future__ import annotations

import datetime
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from daemon.children import answers
from moorline.http import ServerUnavailable, request_json
from moorline.tls import CertificateInvalid, check_certificate, trusting
from tests.serving.server_process import ServerProcess

PASSPHRASE = serialization.BestAvailableEncryption(b"secret")


def make_certificate(
    folder: Path,
    name: str = "models.example",
    encryption: serialization.KeySerializationEncryption | None = None,
) -> tuple[Path, Path]:
    """A self-signed certificate for another name than 127.0.0.1, and its key."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "server.pem", folder / "server.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            encryption or serialization.NoEncryption(),
        )
    )
    return files


def test_a_certificate_and_its_key_can_be_two_files_or_one(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    check_certificate(certificate, key)
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    check_certificate(both, None)
    check_certificate(None, None)
    assert trusting(both).cert_store_stats()["x509"] == 1


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("no certificate", "ssl_keyfile is set and serving.ssl_certfile is not"),
        ("missing key", "cannot be read .No such file or directory.: check serving.ssl_keyfile"),
        ("missing certificate", "check serving.ssl_certfile"),
        ("key of another", "cannot be served .*key of that certificate"),
        ("no key", "cannot be served"),
        ("encrypted key", "cannot be served .*without a passphrase"),
        ("not PEM", "cannot be served .*PEM"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(
    which: str, says: str, tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path / "one")
    files: dict[str, tuple[Path | None, Path | None]] = {
        "no certificate": (None, key),
        "missing key": (certificate, tmp_path / "none"),
        "missing certificate": (tmp_path / "none", key),
        "key of another": (certificate, make_certificate(tmp_path / "other")[1]),
        "no key": (certificate, None),
        "encrypted key": make_certificate(tmp_path / "secret", encryption=PASSPHRASE),
        "not PEM": (tmp_path / "text", key),
    }
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(CertificateInvalid, match=says) as refused:
        check_certificate(*files[which])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_server_with_a_certificate_speaks_https_alone_and_its_own_machine_trusts_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path / "tls")
    server = ServerProcess(
        tmp_path / "state",
        tiny_model_dir,
        {
            "MOORLINE_SERVING__SSL_CERTFILE": str(certificate),
            "MOORLINE_SERVING__SSL_KEYFILE": str(key),
        },
    )
    server.launch()
    try:
        server.wait_listening()
        assert server.url.startswith("https://127.0.0.1:")
        assert answers(f"{server.url}/readyz"), "the supervisor's probe"
        status = request_json("GET", f"{server.url}/v1/moorline/status", certificate=certificate)
        assert status["policy_version"] == 0
        with pytest.raises(ServerUnavailable, match="certificate verify failed"):
            request_json("GET", f"{server.url}/v1/moorline/status")
        other, _ = make_certificate(tmp_path / "other")
        with pytest.raises(ServerUnavailable, match="certificate verify failed"):
            request_json("GET", f"{server.url}/v1/moorline/status", certificate=other)
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https:", "http:") + "/readyz", timeout=10)
        context = trusting(certificate)
        with httpx.Client(verify=context, timeout=120, trust_env=False) as client:
            reply = client.post(
                f"{server.url}/v1/completions",
                json={"model": "assistant", "prompt": [1, 2, 3], "max_tokens": 4, "stream": True},
            )
            assert reply.status_code == 200
            assert reply.text.rstrip().endswith("data: [DONE]")
    finally:
        server.stop()
