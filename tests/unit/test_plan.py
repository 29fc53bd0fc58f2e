"""What a host runs: the choice of variant, model and runtime."""

import dataclasses
from pathlib import Path

import pytest

from scripts import errors, plan, stack, variants
from scripts.variants import Variant


def variant(name: str, cuda: str, least: str, capabilities: tuple[str, ...] = ()) -> Variant:
    return dataclasses.replace(
        variants.load()["cpu"], name=name, cuda=cuda, least_driver=least, capabilities=capabilities
    )


TABLE = {
    "cpu": variant("cpu", "", ""),
    "cu118": variant("cu118", "11.8", "450.80.02", ("7.5", "9.0")),
    "cu121": variant("cu121", "12.1", "525.60.13", ("7.0", "9.0")),
    "cu130": variant("cu130", "13.0", "580", ("7.5", "12.1")),
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A host with a driver and an .env of the test's choosing, and no engine."""

    def make(driver: str = "", env: str = "", capabilities=((8, 6),), **environ: str):
        monkeypatch.setattr(plan, "gpus", lambda: (driver, list(capabilities)))
        monkeypatch.setattr(plan, "_engine_answers", lambda: False)
        monkeypatch.setattr(variants, "load", lambda: TABLE)
        monkeypatch.setattr(plan, "ROOT", tmp_path)
        (tmp_path / ".env").write_text(env)
        for name in ("MODEL_ID", "VARIANT", "PORT", "VLLM_VERSION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return plan.make(environ.get("CUDA", ""))

    return make


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("580.159.03", "cu130"),
        ("535.104", "cu121"),
        ("525.60.13", "cu121"),
        ("525.60.11", "cu118"),
        ("390.1", "cpu"),
        ("", "cpu"),
    ],
)
def test_the_newest_variant_that_the_driver_runs_is_chosen(host, driver, expected) -> None:
    assert host(driver).variant.name == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(7, 0)], "cu121"),
        ([(7, 5)], "cu130"),
        ([(12, 0)], "cu130"),
        ([(7, 0), (8, 6)], "cu121"),
        ([(7, 0), (12, 0)], "cpu"),
        ([(6, 1)], "cpu"),
        # Drivers that do not tell the capability.
        ([], "cu130"),
    ],
)
def test_a_card_without_kernels_moves_the_choice(host, capabilities, expected) -> None:
    chosen = host("580.159.03", capabilities=capabilities)
    assert chosen.variant.name == expected, chosen.reasons
    assert "580.159.03" in chosen.reasons[0]


def test_another_vllm_than_the_locks_is_refused_with_the_command_that_locks_it(host) -> None:
    locked = TABLE["cu121"].vllm
    assert host(CUDA="121", VLLM_VERSION=locked).variant.vllm == locked
    with pytest.raises(errors.SettingInvalid, match=r"make lock CUDA=121 VLLM_VERSION=0\.6\.2"):
        host(CUDA="121", VLLM_VERSION="0.6.2")


def test_without_a_gpu_it_is_a_rehearsal_and_says_how_to_serve_the_real_model(host) -> None:
    chosen = host()
    assert chosen.rehearsal and chosen.settings.model_id == "rehearsal/glm-4-tiny"
    assert any("make up MODEL_ID=ZhipuAI/glm-4-9b-chat" in reason for reason in chosen.reasons)


def test_a_model_chosen_by_the_user_is_never_replaced(host) -> None:
    assert host(env="MODEL_ID=some/model\n").settings.model_id == "some/model"
    assert not host(env="MODEL_ID=some/model\n").rehearsal


def test_the_shell_wins_over_env_files(host) -> None:
    assert host(env="PORT=8001\n").settings.port == 8001
    assert host(env="PORT=8001\n", PORT="8002").settings.port == 8002


def test_cuda_given_by_the_user_wins(host) -> None:
    for spelling in ("118", "11.8", "cu118"):
        assert host("580.1", CUDA=spelling).variant.name == "cu118"


def test_variant_of_env_wins_over_the_driver(host) -> None:
    assert host("580.1", env="VARIANT=cu121\n").variant.name == "cu121"


def test_configure_adds_what_was_chosen_and_changes_no_line(host, tmp_path: Path) -> None:
    own = "# mine\nPORT=9000\nMODEL_ID=a/b"
    assert stack.configure(host("535.104", env=own)) == 0
    text = (tmp_path / ".env").read_text()
    assert text.startswith(own + "\n") and text.count("PORT=") == 1
    for line in ("VARIANT=cu121", "SERVED_MODEL_NAME=glm-4-9b-chat", "# variant cu121: the newest"):
        assert line in text
    # Once more, and nothing is added.
    stack.configure(host("535.104", env=text))
    assert (tmp_path / ".env").read_text() == text


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(errors.SettingInvalid, match="RUNTIME='podman'"):
        plan.make(runtime="podman")
