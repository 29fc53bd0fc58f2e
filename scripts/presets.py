"""Models and cards by short names: images/presets.toml and images/gpus.toml."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from scripts.errors import SettingInvalid

_IMAGES = Path(__file__).resolve().parent.parent / "images"


@dataclass(frozen=True)
class Preset:
    """One model of images/presets.toml, which explains each field."""

    name: str
    model_id: str
    hf_model_id: str
    trust_remote_code: bool
    least_vllm: str
    stop_token_ids: tuple[int, ...]
    weights_gb: float
    config: dict

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return int(self.weights_gb * 1e9)


def load() -> dict[str, Preset]:
    """Return every preset by its name."""
    data = tomllib.loads((_IMAGES / "presets.toml").read_text(encoding="utf-8"))
    return {
        name: Preset(name, **{**values, "stop_token_ids": tuple(values["stop_token_ids"])})
        for name, values in data.items()
    }


def named(name: str) -> Preset:
    """Return a preset; raise SettingInvalid for an unknown name."""
    known = load()
    if name.lower() not in known:
        raise SettingInvalid(
            f"MODEL={name!r}", ", ".join(known), "choose one of these, or set MODEL_ID instead"
        )
    return known[name.lower()]


def of(model_id: str) -> Preset | None:
    """Return the preset of a model id, if it has one."""
    return next((preset for preset in load().values() if preset.model_id == model_id), None)


def card(name: str) -> tuple[int, tuple[int, int]]:
    """Return a card's memory in bytes and compute capability; raise for an unknown name."""
    known = tomllib.loads((_IMAGES / "gpus.toml").read_text(encoding="utf-8"))
    key = name.lower().replace(" ", "")
    if key not in known:
        raise SettingInvalid(f"GPU={name!r}", ", ".join(known), "choose one of these")
    memory, capability = known[key]
    major, minor = capability.split(".")
    return int(memory * (1 << 30)), (int(major), int(minor))
