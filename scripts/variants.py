"""Load and validate images/variants.toml, the table of what a host can run."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from scripts.errors import SettingInvalid

IMAGES = Path(__file__).resolve().parent.parent / "images"


@dataclass(frozen=True)
class Variant:
    """One line of images: name, CUDA line, least NVIDIA driver, vLLM version, size budget (GB)."""

    name: str
    cuda: str
    least_driver: str
    vllm: str
    size_gb: float
    why: str

    @property
    def lock(self) -> Path:
        """The hashed requirements that are this variant."""
        return IMAGES / f"{self.name}.lock"

    @property
    def short(self) -> str:
        """What `make up CUDA=` takes: 121 for cu121, cpu for cpu."""
        return self.name.removeprefix("cu") if self.cuda else self.name


def load() -> dict[str, Variant]:
    """Return every variant by name; a table with missing or unknown keys is a TypeError."""
    tables = tomllib.loads((IMAGES / "variants.toml").read_text(encoding="utf-8"))
    return {name: Variant(name=name, **table) for name, table in tables.items()}


def named(short: str) -> Variant:
    """Return the variant for a value of CUDA=, such as 121, cu121, 12.1 or cpu.

    Raises:
        SettingInvalid: there is no such variant.
    """
    known = load()
    plain = short.lower().replace(".", "")
    for variant in known.values():
        if plain in (variant.short, variant.name):
            return variant
    raise SettingInvalid(
        f"CUDA={short!r}",
        "one of " + ", ".join(variant.short for variant in known.values()),
        "choose one of these, or leave CUDA= out",
    )
