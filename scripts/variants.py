"""Load and validate images/variants.toml, the table of what a host can run."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from scripts import presets
from scripts.errors import SettingInvalid

IMAGES = Path(__file__).resolve().parent.parent / "images"
TABLE = IMAGES / "variants.toml"


@dataclass(frozen=True)
class Advisory:
    """What is known against a variant's vLLM: ids, what it allows, and what contains it here."""

    ids: tuple[str, ...]
    what: str
    contained: str


@dataclass(frozen=True)
class Variant:
    """One line of images; images/variants.toml explains each field."""

    name: str
    cuda: str
    least_driver: str
    capabilities: tuple[str, ...]
    vllm: str
    engine: str
    resolved_before: str
    fresh: tuple[str, ...]
    size_gb: float
    why: str
    advisories: tuple[Advisory, ...]

    @property
    def lock(self) -> Path:
        """The hashed requirements that are this variant."""
        return IMAGES / f"{self.name}.lock"

    @property
    def omit(self) -> Path:
        """Requirements that the lock leaves out, each with its reason."""
        return IMAGES / f"{self.name}.omit"

    @property
    def metadata(self) -> Path:
        """What uv must be told of wheels that it cannot read from an index."""
        return IMAGES / f"{self.name}.metadata.toml"

    @property
    def short(self) -> str:
        """What `make up CUDA=` takes: 121 for cu121, cpu for cpu."""
        return self.name.removeprefix("cu") if self.cuda else self.name

    def drives(self, driver: str) -> bool:
        """Whether a driver of this version is new enough."""
        return number(self.least_driver) <= number(driver)

    def has_kernels(self, capability: tuple[int, ...]) -> bool:
        """Whether kernels were built for this compute capability (major, minor)."""
        least, greatest = map(number, self.capabilities)
        return least <= capability <= greatest


def number(version: str) -> tuple[int, ...]:
    """Return a dotted version as numbers that compare: (525, 60, 13)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def dotted(capability: Iterable[int]) -> str:
    """Return a compute capability as people write it: 8.6."""
    return ".".join(map(str, capability))


def load() -> dict[str, Variant]:
    """Return every variant by name; a table with missing or unknown keys is a TypeError."""
    tables = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    result = {}
    for name, table in tables.items():
        table["advisories"] = tuple(
            Advisory(tuple(row.pop("ids")), **row) for row in table.get("advisories", [])
        )
        table["capabilities"] = tuple(table["capabilities"])
        table["fresh"] = tuple(table["fresh"])
        result[name] = Variant(name=name, **table)
    return result


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


def require_model(variant: Variant, model_id: str) -> None:
    """Raise SettingInvalid when a variant's vLLM is older than a preset's architecture."""
    preset = presets.of(model_id)
    if not preset or number(variant.vllm) >= number(preset.least_vllm):
        return
    least = number(preset.least_vllm)
    newer = [v.short for v in load().values() if v.cuda and number(v.vllm) >= least]
    raise SettingInvalid(
        f"{variant.name} has vLLM {variant.vllm}",
        f"{preset.least_vllm} or newer for {model_id}",
        f"use CUDA={' or '.join(newer)}, or MODEL=glm-4-9b-chat",
    )


def fitting(driver: str, capabilities: Iterable[tuple[int, ...]]) -> list[Variant]:
    """Return the variants that this driver and all these GPUs can run, the newest CUDA first."""
    gpus = list(capabilities)
    found = [
        variant
        for variant in load().values()
        if variant.cuda and variant.drives(driver) and all(map(variant.has_kernels, gpus))
    ]
    return sorted(found, key=lambda variant: number(variant.cuda), reverse=True)


def record(name: str, **values: str) -> None:
    """Change text values of one variant in the table, leaving everything else as it is."""
    assert set(values) <= {field.name for field in fields(Variant)}
    text = TABLE.read_text(encoding="utf-8")
    head, section = text.split(f"\n[{name}]\n")
    section, *rest = re.split(r"\n(?=\[)", section, maxsplit=1)
    for key, value in values.items():
        section, count = re.subn(
            rf'^{key} = ".*"$', f'{key} = "{value}"', section, flags=re.MULTILINE
        )
        assert count == 1, (name, key)
    TABLE.write_text(f"{head}\n[{name}]\n" + "\n".join([section, *rest]), encoding="utf-8")
