"""Check who may come in, write HAProxy's configuration and become HAProxy."""

import ipaddress
import os
import shutil
from pathlib import Path

from scripts import errors, keys
from scripts.settings import MOST_REPLICAS, Settings

_CONF = Path(__file__).resolve().parent.parent / "docker" / "haproxy.cfg"
# Only words of ours: what a user has set for another program must not reach the file.
_INHERITED = ("PATH", "HOME", "LD_LIBRARY_PATH")


def replicas(settings: Settings) -> int:
    """Return how many replicas to look for: as many as there are, or may be."""
    return settings.replicas or (1 if settings.variant == "cpu" else MOST_REPLICAS)


def configuration(settings: Settings, template: str, address: str, resolve: bool) -> str:
    """Return HAProxy's configuration with a line for each replica, all of them at `address`."""
    more = "resolvers container init-addr libc,none resolve-opts allow-dup-ip" if resolve else ""
    servers, metrics = [], []
    for number in range(replicas(settings)):
        where = f"{address}:{settings.replica_port + number}"
        servers.append(f'    server r{number} {where} agent-send "{number}\\n" {more}')
        metrics.append(f"    use-server r{number} if {{ var(txn.replica) -m str {number} }}")
        metrics.append(f"    server r{number} {where} {more}")
    text = template.replace("    # replicas: scripts/gateway.py", "\n".join(servers))
    return text.replace("    # metrics: scripts/gateway.py", "\n".join(metrics))


def pem(settings: Settings) -> str:
    """Return certificate and key in one text, or an empty one where TLS is off.

    Raises:
        SettingInvalid: only one of the two is set, or one cannot be read.
    """
    # In the container the two are mounted; /dev/null means none.
    files = {"TLS_CERT": settings.tls_cert, "TLS_KEY": settings.tls_key}
    texts = {}
    for name, file in files.items():
        try:
            texts[name] = Path(file).read_text(encoding="utf-8") if file else ""
        except OSError as error:
            raise errors.SettingInvalid(
                f"{name}: {file} cannot be read: {error.strerror}",
                "a file that uid 10001 may read, for the gateway runs as that user",
                "install -m 0640 -g 10001 <the file> <a copy>, and name the copy; or: make tls",
            ) from None
    if not any(texts.values()):
        return ""
    for name, text in texts.items():
        if "-----BEGIN" not in text:
            raise errors.SettingInvalid(
                f"{name} is {'empty' if not text else 'no PEM file'}",
                "TLS_CERT and TLS_KEY, both as PEM",
                "name both in .env, or neither",
            )
    return texts["TLS_CERT"].rstrip() + "\n" + texts["TLS_KEY"].rstrip() + "\n"


def environment(settings: Settings, bind: str) -> dict[str, str]:
    """Return what docker/haproxy.cfg reads."""
    values = {
        "BIND": bind,
        "KEYS_FILE": str(settings.keys / keys.FILE),
        "ADMIN_SOCKET": str(settings.keys / keys.SOCKET),
        "AGENT_PORT": str(settings.agent_port),
        "HOST_NAMES": " ".join(name.lower() for name in (*settings.allowed_hosts, settings.host)),
        "ORIGINS": " ".join(settings.allowed_origins) or "none",
        "OFFER_TOKENIZE": "1" if settings.offer_tokenize else "0",
        "MAX_BODY_BYTES": str(settings.max_body_mb << 20),
        "METRICS_BIND_INSIDE": os.environ.get("METRICS_BIND_INSIDE", "127.0.0.1:9090"),
        **({"OPEN": "1"} if settings.open_to_others else {}),
    }
    for name in (
        *("drain_seconds", "request_seconds", "queue_seconds", "queue_length"),
        *("replica_concurrency", "key_rate", "key_concurrency", "log_format"),
    ):
        values[name.upper()] = str(getattr(settings, name))
    return values


def main() -> int:
    """Become HAProxy; returns only when that is refused."""
    settings = Settings.from_environ()
    keys.require(settings, bool(keys.load(settings.keys)))
    settings.run.mkdir(parents=True, exist_ok=True)
    keys.prepare(settings.keys)
    # In the container every interface is this container's own; HOST is what is published of it.
    bind = os.environ.get("GATEWAY_BIND")
    if not bind:
        host = settings.host
        bind = f"{f'[{host}]' if ipaddress.ip_address(host).version == 6 else host}:{settings.port}"
    values = environment(settings, bind)
    address = os.environ.get("REPLICA_ADDRESS", "127.0.0.1")
    if address != "127.0.0.1":
        values["RESOLVERS"] = "1"
    text = pem(settings)
    if text:
        file = settings.run / "tls.pem"
        file.touch(mode=0o600)
        file.write_text(text, encoding="utf-8")
        values["TLS_PEM"] = str(file)
    path = settings.run / "haproxy.cfg"
    template = _CONF.read_text(encoding="utf-8")
    path.write_text(
        configuration(settings, template, address, "RESOLVERS" in values), encoding="utf-8"
    )
    known = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not program:
        raise errors.HostUnfit(
            "haproxy is not installed", "HAProxy", "as root: apt-get install haproxy"
        )
    scheme = "https" if text else "http"
    print(f"gateway: HAProxy on {scheme}://{bind}", flush=True)
    os.execve(program, [program, "-W", "-db", "-f", str(path)], {**known, **values})


if __name__ == "__main__":
    errors.run(main)
