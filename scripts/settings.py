"""Run-time Settings, read from the environment and validated once."""

import ipaddress
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts import presets
from scripts.errors import SettingInvalid

DEFAULT_MODEL = "glm-4-9b-chat"
DEFAULT_MODEL_ID = presets.named(DEFAULT_MODEL).model_id
DTYPES = ("auto", "bfloat16", "float16", "float32")
# The GPUs of a large host; a gateway that is not told the number looks for as many.
MOST_REPLICAS = 8
# Where a model may come from, besides the URL of a hub that speaks ModelScope's protocol.
SOURCES = ("modelscope", "huggingface", "hf-mirror", "folder")
_MODEL_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REVISION = r"[\w.][\w./-]*"

# Arguments that are settings of ours: given twice, nobody could say which one holds.
_OWNED = {
    "--model": "MODEL_ID",
    "--revision": "MODEL_REVISION",
    "--served-model-name": "SERVED_MODEL_NAME",
    "--max-model-len": "MAX_MODEL_LEN",
    "--dtype": "DTYPE",
    "--gpu-memory-utilization": "GPU_MEMORY_UTILIZATION",
    "--tensor-parallel-size": "TENSOR_PARALLEL_SIZE",
    "-tp": "TENSOR_PARALLEL_SIZE",
    "--quantization": "QUANTIZATION",
    "-q": "QUANTIZATION",
    "--chat-template": "CHAT_TEMPLATE",
    "--trust-remote-code": "TRUST_REMOTE_CODE",
    "--host": "HOST",
    "--port": "PORT",
    "--shutdown-timeout": "DRAIN_SECONDS",
    # The gateway's: vLLM's own guards some routes only, and every process of the host sees it.
    "--api-key": "make key NAME=…",
}


def _invalid(name: str, value: str, allowed: str) -> SettingInvalid:
    return SettingInvalid(f"{name}={value!r}", allowed, f"correct {name} in .env")


def _integer(low: int, high: int) -> Callable[[str, str], int]:
    def parse(name: str, value: str) -> int:
        # Not int() alone: it takes "1_0", "+5" and "٣", which a person did not mean.
        if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise _invalid(name, value, f"a whole number from {low} to {high}")
        return int(value)

    return parse


def _fraction(name: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value) or not 0 < float(value) <= 1:
        raise _invalid(name, value, "a number above 0 and at most 1")
    return float(value)


def _auto(parse: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """Take `auto` as well, as a 0: scripts/fit.py finds the value."""

    def parse_or_auto(name: str, value: str) -> Any:
        try:
            return 0 if value == "auto" else parse(name, value)
        except SettingInvalid as error:
            raise SettingInvalid(error.found, f"auto, or {error.needed}", error.action) from None

    return parse_or_auto


def _boolean(name: str, value: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if value.lower() not in known:
        raise _invalid(name, value, "1 or 0")
    return known[value.lower()]


def _matching(pattern: str, allowed: str) -> Callable[[str, str], str]:
    def parse(name: str, value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise _invalid(name, value, allowed)
        return value

    return parse


def _choice(*allowed: str) -> Callable[[str, str], str]:
    return _matching("|".join(map(re.escape, allowed)), " or ".join(allowed))


def _address(name: str, value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise _invalid(name, value, "an IP address of this host, or 0.0.0.0 for all") from None


def _url(name: str, value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _invalid(name, value, "a URL such as https://modelscope.cn")
    return value.rstrip("/")


def _hosts(name: str, value: str) -> tuple[str, ...]:
    hosts = tuple(filter(None, (word.strip() for word in value.split(","))))
    for host in hosts:
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-f:]+\]", host, re.IGNORECASE):
            raise _invalid(name, host, "host names with commas between, without ports")
    return hosts


def _origins(name: str, value: str) -> tuple[str, ...]:
    origins = tuple(filter(None, (word.strip() for word in value.split(","))))
    for origin in origins:
        if not re.fullmatch(r"\*|https?://[\w.:\[\]-]+", origin):
            raise _invalid(name, origin, "origins such as http://localhost:3000, or *")
    return origins


def _sources(name: str, value: str) -> tuple[str, ...]:
    sources = tuple(filter(None, (word.strip() for word in value.split(","))))
    for source in sources or [value]:
        if source not in SOURCES and not source.startswith(("http://", "https://")):
            allowed = f"a list of {', '.join(SOURCES)} or URLs of hubs"
            raise _invalid(name, source, allowed)
    return tuple(_url(name, word) if "://" in word else word for word in sources)


def _arguments(name: str, value: str) -> tuple[str, ...]:
    try:
        arguments = tuple(shlex.split(value))
    except ValueError as error:
        raise _invalid(name, value, f"arguments as a shell would split them ({error})") from None
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag in _OWNED:
            # The value is left out: it may be a key.
            raise SettingInvalid(
                f"{name} contains {flag}",
                f"{_OWNED[flag]}, which is there for it",
                f"take {flag} out of {name} and use {_OWNED[flag]}",
            )
    return arguments


@dataclass(frozen=True)
class Settings:
    """What an operator may set (`.env.example` explains each), and the folders of this runtime.

    A number that is `auto` is 0 here. `models` holds snapshots, `caches` compile caches, `run`
    sockets and marks, `keys` who may come in. Replica k listens on `replica_port` + k; what the
    gateway asks about them on `agent_port` (0: nobody asks).
    """

    model_id: str
    model_revision: str
    modelscope_endpoint: str
    model_sources: tuple[str, ...]
    hf_endpoint: str
    hf_model_id: str
    hf_model_revision: str
    model_folder: Path
    verify: str
    progress: str
    download_workers: int
    download_patience: int
    served_model_name: str
    max_model_len: int
    dtype: str
    gpu_memory_utilization: float
    tensor_parallel_size: int
    quantization: str
    chat_template: str
    trust_remote_code: bool
    host: str
    port: int
    drain_seconds: int
    replicas: int
    hang_seconds: int
    request_seconds: int
    max_choices: int
    log_format: str
    vllm_args: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    key_rate: int
    key_concurrency: int
    replica_concurrency: int
    queue_length: int
    queue_seconds: int
    max_body_mb: int
    offer_tokenize: bool
    tls_cert: str
    tls_key: str
    replica_host: str
    replica_port: int
    agent_port: int
    variant: str
    models: Path
    caches: Path
    keys: Path
    run: Path

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read and validate every setting; an empty value counts as unset.

        Raises:
            SettingInvalid: names the variable, its value and what is allowed.
        """

        def read(name: str, default: str, parse: Callable[[str, str], Any]) -> Any:
            return parse(name, environ.get(name, "").strip() or default)

        def path(name: str, default: str) -> Path:
            return Path(environ.get(name, "") or default)

        if environ.get("VLLM_API_KEY"):
            raise SettingInvalid(
                "VLLM_API_KEY is set",
                "keys that the gateway knows: vLLM's own guards some routes only",
                "make key NAME=alice (docker compose run --rm key add alice), and unset it",
            )
        name = environ.get("MODEL", "").strip()
        model_id = read(
            "MODEL_ID",
            presets.named(name or DEFAULT_MODEL).model_id,
            _matching(_MODEL_ID, "owner/name, as the hub spells it"),
        )
        preset = presets.of(model_id)
        if name and presets.named(name) != preset:
            raise SettingInvalid(
                f"MODEL={name} and MODEL_ID={model_id}", "one of the two", "take one out of .env"
            )
        model_revision = read(
            "MODEL_REVISION", "master", _matching(_REVISION, "a branch, tag or commit")
        )
        return cls(
            model_id=model_id,
            model_revision=model_revision,
            modelscope_endpoint=read("MODELSCOPE_ENDPOINT", "https://modelscope.cn", _url),
            # ModelScope alone: another host's files may be code that the server runs.
            model_sources=read("MODEL_SOURCES", "modelscope", _sources),
            hf_endpoint=read("HF_ENDPOINT", "https://huggingface.co", _url),
            hf_model_id=read(
                "HF_MODEL_ID",
                (preset and preset.hf_model_id) or model_id,
                _matching(_MODEL_ID, "owner/name, as Hugging Face spells it"),
            ),
            hf_model_revision=read(
                "HF_MODEL_REVISION",
                # The two hubs' names for the branch that everybody means.
                "main" if model_revision == "master" else model_revision,
                _matching(_REVISION, "a branch, tag or commit"),
            ),
            model_folder=path("MODEL_FOLDER", "/dev/null"),
            verify=read("VERIFY", "size", _choice("size", "full")),
            progress=read("PROGRESS", "auto", _choice("auto", "lines", "json")),
            # GLM-4-9B-chat has ten shards; a hub slows each connection, not their sum.
            download_workers=read("DOWNLOAD_WORKERS", "10", _integer(1, 64)),
            download_patience=read("DOWNLOAD_PATIENCE", "300", _integer(1, 86400)),
            served_model_name=read(
                "SERVED_MODEL_NAME",
                name.lower() or DEFAULT_MODEL,
                _matching(r"[\w./:@-]+", "a name without spaces, such as glm-4-9b-chat"),
            ),
            max_model_len=read("MAX_MODEL_LEN", "auto", _auto(_integer(16, 10_000_000))),
            dtype=read("DTYPE", "auto", _choice(*DTYPES)),
            gpu_memory_utilization=read("GPU_MEMORY_UTILIZATION", "auto", _auto(_fraction)),
            tensor_parallel_size=read("TENSOR_PARALLEL_SIZE", "auto", _auto(_integer(1, 64))),
            quantization=read(
                "QUANTIZATION", "", _matching(r"[a-z0-9_-]*", "a method of vLLM, such as fp8")
            ),
            chat_template=environ.get("CHAT_TEMPLATE", "").strip(),
            # The tokenizer of some presets is remote code; nobody else's runs unasked.
            trust_remote_code=read(
                "TRUST_REMOTE_CODE", "1" if preset and preset.trust_remote_code else "0", _boolean
            ),
            host=read("HOST", "127.0.0.1", _address),
            port=read("PORT", "8000", _integer(1, 65535)),
            drain_seconds=read("DRAIN_SECONDS", "30", _integer(1, 3600)),
            replicas=read("REPLICAS", "auto", _auto(_integer(1, MOST_REPLICAS))),
            hang_seconds=read("HANG_SECONDS", "60", _integer(2, 3600)),
            request_seconds=read("REQUEST_SECONDS", "3600", _integer(1, 86400)),
            max_choices=read("MAX_CHOICES", "16", _integer(1, 1024)),
            log_format=read("LOG_FORMAT", "text", _choice("text", "json")),
            vllm_args=read("VLLM_ARGS", "", _arguments),
            allowed_hosts=read("ALLOWED_HOSTS", "", _hosts),
            allowed_origins=read("ALLOWED_ORIGINS", "", _origins),
            key_rate=read("KEY_RATE", "0", _integer(0, 1_000_000)),
            key_concurrency=read("KEY_CONCURRENCY", "0", _integer(0, 100_000)),
            replica_concurrency=read("REPLICA_CONCURRENCY", "256", _integer(1, 10_000)),
            queue_length=read("QUEUE_LENGTH", "256", _integer(1, 100_000)),
            queue_seconds=read("QUEUE_SECONDS", "60", _integer(1, 3600)),
            max_body_mb=read("MAX_BODY_MB", "16", _integer(1, 1024)),
            offer_tokenize=read("OFFER_TOKENIZE", "0", _boolean),
            tls_cert=environ.get("TLS_CERT", "").strip(),
            tls_key=environ.get("TLS_KEY", "").strip(),
            replica_host=read("REPLICA_HOST", environ.get("HOST") or "127.0.0.1", _address),
            replica_port=read("REPLICA_PORT", environ.get("PORT") or "8000", _integer(1, 65535)),
            agent_port=read("AGENT_PORT", "0", _integer(0, 65535)),
            variant=read("VARIANT", "cu121", _matching(r"cpu|cu[0-9]{3}", "cpu, cu118, cu121, …")),
            models=path("MODELS_DIR", "/models"),
            caches=path("CACHES_DIR", "/caches"),
            keys=path("KEYS_DIR", "/keys"),
            run=path("RUN_DIR", "/run/stack"),
        )

    @property
    def agent_socket(self) -> Path:
        """Where scripts/agent.py answers those inside."""
        return self.run / "agent.sock"

    @property
    def open_to_others(self) -> bool:
        """Whether other hosts reach the endpoint."""
        return not ipaddress.ip_address(self.host).is_loopback

    def check_files(self) -> None:
        """Raise SettingInvalid when a setting names a file that is not there.

        Apart from the rest: only the server sees its own files, `download` does not.
        """
        # vLLM takes a template itself as well, and that contains braces.
        template = self.chat_template
        if template and "{" not in template and not Path(template).is_file():
            raise _invalid("CHAT_TEMPLATE", template, "a file that the server sees, or a template")
