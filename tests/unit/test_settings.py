"""Settings: defaults, refusals that name variable, value and what is allowed, documentation."""

import re
from dataclasses import fields

import pytest

from scripts.errors import SettingInvalid
from scripts.settings import Settings
from tests.stacks import ROOT


def test_defaults_are_the_recipe() -> None:
    settings = Settings.from_environ({})
    assert settings.model_id == "ZhipuAI/glm-4-9b-chat"
    assert settings.served_model_name == "glm-4-9b-chat"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.dtype, settings.max_model_len) == ("auto", 0)


def test_an_empty_value_counts_as_unset() -> None:
    assert Settings.from_environ({"PORT": "", "DTYPE": " "}) == Settings.from_environ({})


def test_remote_code_runs_unasked_for_the_default_model_only() -> None:
    assert Settings.from_environ({}).trust_remote_code
    assert not Settings.from_environ({"MODEL_ID": "some/other"}).trust_remote_code
    asked = Settings.from_environ({"MODEL_ID": "some/other", "TRUST_REMOTE_CODE": "1"})
    assert asked.trust_remote_code


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MODEL_ID", "glm-4-9b-chat", "owner/name"),
        ("MODEL_ID", "../../etc/passwd", "owner/name"),
        ("MODEL_ID", "a/..", "owner/name"),
        ("MODEL_REVISION", "v 1", "branch, tag or commit"),
        ("MODELSCOPE_ENDPOINT", "hub:8100", "URL"),
        ("SERVED_MODEL_NAME", "two words", "without spaces"),
        ("MAX_MODEL_LEN", "8k", "whole number"),
        ("MAX_MODEL_LEN", "0", "from 16"),
        ("MAX_MODEL_LEN", "-1", "whole number"),
        ("MAX_MODEL_LEN", "1_000", "whole number"),
        ("DTYPE", "fp16", "auto or bfloat16 or float16 or float32"),
        ("GPU_MEMORY_UTILIZATION", "0", "above 0"),
        ("GPU_MEMORY_UTILIZATION", "90%", "at most 1"),
        ("GPU_MEMORY_UTILIZATION", "nan", "above 0"),
        ("TENSOR_PARALLEL_SIZE", "0", "from 1"),
        ("TRUST_REMOTE_CODE", "maybe", "1 or 0"),
        ("HOST", "localhost", "IP address"),
        ("PORT", "65536", "to 65535"),
        ("DRAIN_SECONDS", "0", "from 1"),
        ("VLLM_ARGS", '--x "', "shell would split"),
        ("VARIANT", "cuda12", "cu121"),
        ("MODEL_SOURCES", "modelscope.cn", "URLs of hubs"),
        ("MODEL_SOURCES", ",", "URLs of hubs"),
        ("VERIFY", "md5", "size or full"),
        ("REPLICAS", "9", "auto, or a whole number from 1 to 8"),
        ("HANG_SECONDS", "1", "from 2"),
        ("MAX_CHOICES", "0", "from 1"),
        ("MAX_BODY_MB", "2g", "whole number"),
        ("LOG_FORMAT", "xml", "text or json"),
        ("ALLOWED_HOSTS", "gpu.lan:8000", "without ports"),
        ("ALLOWED_ORIGINS", "localhost:3000", "http://localhost:3000"),
        ("KEY_RATE", "-1", "from 0"),
        ("QUEUE_SECONDS", "soon", "whole number"),
        ("OFFER_TOKENIZE", "on", "1 or 0"),
    ],
)
def test_a_wrong_value_is_refused_with_name_value_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(SettingInvalid) as refusal:
        Settings.from_environ({name: value})
    for text in (name, repr(value), allowed, ".env"):
        assert text in str(refusal.value)


@pytest.mark.parametrize("argument", ["--port 1", "--port=1", "--max_model_len 9", "-tp 2"])
def test_arguments_that_are_settings_are_refused(argument: str) -> None:
    with pytest.raises(SettingInvalid, match="which is there for it"):
        Settings.from_environ({"VLLM_ARGS": argument})


def test_a_key_among_the_arguments_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingInvalid) as refusal:
        Settings.from_environ({"VLLM_ARGS": "--api-key sk-very-secret"})
    assert "make key NAME=" in str(refusal.value)
    assert "sk-very-secret" not in str(refusal.value)


def test_the_key_of_vllm_itself_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingInvalid) as refusal:
        Settings.from_environ({"VLLM_API_KEY": "sk-very-secret"})
    for way in ("VLLM_API_KEY", "make key NAME=alice", "docker compose run --rm key add alice"):
        assert way in str(refusal.value)
    assert "sk-very-secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "opened"),
    [("127.0.0.1", False), ("127.0.0.2", False), ("::1", False), ("0.0.0.0", True), ("::", True)],
)
def test_whatever_is_not_loopback_is_open_to_others(host: str, opened: bool) -> None:
    assert Settings.from_environ({"HOST": host}).open_to_others is opened


def test_lists_of_hosts_and_origins_are_split_at_commas() -> None:
    settings = Settings.from_environ(
        {"ALLOWED_HOSTS": "gpu.lan, [fe80::1]", "ALLOWED_ORIGINS": "http://localhost:3000,*"}
    )
    assert settings.allowed_hosts == ("gpu.lan", "[fe80::1]")
    assert settings.allowed_origins == ("http://localhost:3000", "*")


def test_a_chat_template_that_is_not_there_is_refused_by_the_server() -> None:
    with pytest.raises(SettingInvalid, match=r"CHAT_TEMPLATE='/no/such\.jinja'"):
        Settings.from_environ({"CHAT_TEMPLATE": "/no/such.jinja"}).check_files()
    Settings.from_environ({"CHAT_TEMPLATE": "{{ messages }}"}).check_files()
    Settings.from_environ({"CHAT_TEMPLATE": __file__}).check_files()
    Settings.from_environ({}).check_files()


def documented() -> dict[str, str]:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    return dict(re.findall(r"^#([A-Z_]+)=(.*)$", text, re.MULTILINE))


def test_env_example_shows_every_setting_with_its_default() -> None:
    defaults = Settings.from_environ({})
    # Of this runtime: scripts/host.py and compose.yaml set them.
    internal = {"models", "caches", "keys", "run", "replica_host", "replica_port", "agent_port"}
    for field in fields(Settings):
        if field.name in internal:
            continue
        name = field.name.upper()
        assert name in documented(), f"{name} is not in .env.example"
        shown = Settings.from_environ({name: documented()[name]})
        assert getattr(shown, field.name) == getattr(defaults, field.name), name


def test_env_example_and_compose_name_the_same_variables() -> None:
    compose = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    passed = set(re.findall(r"^  +([A-Z_]+):$", compose, re.MULTILINE))
    interpolated = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose))
    # Not for operators: builds set these, and proxies are the shell's.
    ours = {"VERSION", "REVISION", "CUDA_LINE", "VLLM_RELEASE", "IMAGE", "HUB_VOLUME"}
    ours |= {"CREATED", "SOURCE_URL", "BASE_DIGEST", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
    # What `make publish` writes has these.
    ours |= {"SERVE_IMAGE", "DOWNLOAD_IMAGE", "GATEWAY_IMAGE"}
    assert (passed | set(interpolated)) - ours == set(documented())
    # A secret must be a file, so compose says none by another word.
    interpolated = {
        name: "" if name.startswith("TLS_") else default for name, default in interpolated.items()
    }
    for name, default in interpolated.items():
        assert name in ours or documented()[name] == default, name


def test_readme_lists_every_setting() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in documented() if f"`{name}`" not in readme]
    assert missing == []
