"""What scripts/gateway.py makes of the settings, and whether HAProxy takes it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import gateway, keys
from scripts.errors import SettingInvalid
from scripts.settings import Settings
from tests.stacks import ROOT, run

TEMPLATE = (ROOT / "docker" / "haproxy.cfg").read_text(encoding="utf-8")
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def servers(text: str, backend: str) -> list[str]:
    """The server lines of a backend, as (name, address)."""
    part = text.split(f"\nbackend {backend}\n")[1].split("\nfrontend ")[0]
    return re.findall(r"^    server (\S+ \S+)", part, re.MULTILINE)


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"VARIANT": "cpu"}, 1),
        ({"VARIANT": "cpu", "REPLICAS": "2"}, 2),
        ({"VARIANT": "cu121"}, 8),
        ({"VARIANT": "cu130", "REPLICAS": "3"}, 3),
    ],
)
def test_every_replica_that_there_may_be_has_a_server(environ: dict, count: int) -> None:
    settings = Settings.from_environ({**environ, "REPLICA_PORT": "8001"})
    text = gateway.configuration(settings, TEMPLATE, "serve", resolve=True)
    expected = [f"r{number} serve:{8001 + number}" for number in range(count)]
    assert servers(text, "replicas") == expected
    assert servers(text, "metrics_of") == expected
    for number in range(count):
        # The agent is asked for a replica by its number.
        assert f'agent-send "{number}\\n" resolvers container' in text
        assert f"use-server r{number} if {{ var(txn.replica) -m str {number} }}" in text
    assert "scripts/gateway.py" not in text.split("global\n")[1]


def test_an_address_needs_no_resolver() -> None:
    text = gateway.configuration(Settings.from_environ({}), TEMPLATE, "127.0.0.1", resolve=False)
    lines = [line for line in text.splitlines() if line.startswith("    server ")]
    assert lines and not any("resolvers" in line for line in lines)


def test_only_other_hosts_make_it_open() -> None:
    for host, opened in {"127.0.0.1": False, "::1": False, "0.0.0.0": True}.items():
        values = gateway.environment(Settings.from_environ({"HOST": host}), ":8000")
        assert ("OPEN" in values) is opened, host


def test_names_of_this_host_are_compared_in_small_letters() -> None:
    settings = Settings.from_environ({"ALLOWED_HOSTS": "GPU.lan", "HOST": "192.168.1.5"})
    assert gateway.environment(settings, ":8000")["HOST_NAMES"] == "gpu.lan 192.168.1.5"


def test_haproxy_gets_every_variable_that_it_reads() -> None:
    values = gateway.environment(Settings.from_environ({}), ":8000")
    read = set(re.findall(r'"\$\{?([A-Z_]+)', TEMPLATE)) | set(
        re.findall(r"env\((\w+)\)", TEMPLATE)
    )
    assert read - set(values) == {"TLS_PEM"}, "TLS_PEM is read where it is defined only"


def pem_of(tmp_path: Path, **texts: str) -> Settings:
    """Settings with TLS_CERT and TLS_KEY naming files of these contents."""
    environ = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        environ[name.upper()] = str(tmp_path / name)
    return Settings.from_environ(environ)


def test_without_a_certificate_tls_is_off(tmp_path: Path) -> None:
    assert gateway.pem(Settings.from_environ({})) == ""
    # What compose mounts for none.
    nothing = {"TLS_CERT": "/dev/null", "TLS_KEY": "/dev/null"}
    assert gateway.pem(Settings.from_environ(nothing)) == ""


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"tls_cert": "-----BEGIN CERTIFICATE-----"}, "TLS_KEY is empty"),
        ({"tls_key": "-----BEGIN PRIVATE KEY-----"}, "TLS_CERT is empty"),
        ({"tls_cert": "-----BEGIN A-----", "tls_key": "0\x01"}, "TLS_KEY is no PEM file"),
        ({"tls_cert": "DER", "tls_key": "-----BEGIN A-----"}, "TLS_CERT is no PEM file"),
    ],
)
def test_half_a_certificate_is_refused(tmp_path: Path, texts: dict, found: str) -> None:
    with pytest.raises(SettingInvalid, match=found) as refusal:
        gateway.pem(pem_of(tmp_path, **texts))
    assert "BEGIN" not in str(refusal.value)


def test_a_certificate_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    settings = Settings.from_environ({"TLS_CERT": str(tmp_path / "none"), "TLS_KEY": "/dev/null"})
    with pytest.raises(SettingInvalid, match=r"TLS_CERT: .*No such file") as refusal:
        gateway.pem(settings)
    assert "make tls" in str(refusal.value)


def test_certificate_and_key_become_one_text(tmp_path: Path) -> None:
    settings = pem_of(tmp_path, tls_cert="-----BEGIN A-----\nc\n", tls_key="-----BEGIN B-----\nk")
    assert gateway.pem(settings) == "-----BEGIN A-----\nc\n-----BEGIN B-----\nk\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """TLS_CERT and TLS_KEY, signed by themselves."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = {"TLS_CERT": str(folder / "cert.pem"), "TLS_KEY": str(folder / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    run(*command, "-out", files["TLS_CERT"], "-keyout", files["TLS_KEY"]).check()
    return files


LIMITS = {
    "KEY_RATE": "60",
    "KEY_CONCURRENCY": "4",
    "REPLICA_CONCURRENCY": "8",
    "QUEUE_LENGTH": "2",
    "QUEUE_SECONDS": "5",
    "MAX_BODY_MB": "1",
}


@pytest.mark.skipif(not HAPROXY, reason="needs HAProxy: apt-get install haproxy")
@pytest.mark.parametrize(
    ("environ", "more"),
    [
        ({}, {}),
        ({"VARIANT": "cpu"}, {"RESOLVERS": "1"}),
        ({"HOST": "0.0.0.0"}, {}),
        ({"HOST": "::1"}, {}),
        ({"LOG_FORMAT": "json"}, {}),
        (LIMITS, {}),
        ({"ALLOWED_HOSTS": "gpu.lan,[fe80::1]", "ALLOWED_ORIGINS": "http://localhost:3000,*"}, {}),
        ({"OFFER_TOKENIZE": "1"}, {"METRICS_BIND_INSIDE": "{tmp}/metrics.sock"}),
    ],
    ids=["plain", "names", "open", "IPv6", "json", "limits", "browsers", "tokenize"],
)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_haproxy_takes_the_configuration(
    tmp_path: Path, environ: dict, more: dict, tls: bool, request: pytest.FixtureRequest
) -> None:
    given = {"AGENT_PORT": "8090", "REPLICA_PORT": "8001", "KEYS_DIR": str(tmp_path), **environ}
    if tls:
        given |= request.getfixturevalue("certificate")
    settings = Settings.from_environ(given)
    keys.add(settings.keys, "alice")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    values = gateway.environment(settings, f"{host}:8000")
    values |= {name: value.format(tmp=tmp_path) for name, value in more.items()}
    if tls:
        (tmp_path / "tls.pem").write_text(gateway.pem(settings))
        values["TLS_PEM"] = str(tmp_path / "tls.pem")
    resolve = "RESOLVERS" in values
    # A name that this machine knows: HAProxy warns of one that nobody resolves yet.
    address = "localhost" if resolve else "127.0.0.1"
    file = tmp_path / "haproxy.cfg"
    file.write_text(gateway.configuration(settings, TEMPLATE, address, resolve), encoding="utf-8")
    done = subprocess.run(
        [HAPROXY, "-c", "-f", str(file)], env=values, capture_output=True, text=True, timeout=30
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "[WARNING]" not in told and "[ALERT]" not in told, told


@pytest.mark.skipif(not HAPROXY, reason="needs HAProxy: apt-get install haproxy")
def test_haproxy_takes_the_configuration_that_publishes_metrics() -> None:
    run(HAPROXY, "-c", "-f", str(ROOT / "docker" / "metrics.cfg")).check()
