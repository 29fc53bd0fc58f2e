"""What holds for every file: imports run one way, locks are hashed, nothing private is written."""

import ast
import re
import sys
from pathlib import Path

import pytest

from scripts import errors, variants
from tests.stacks import ROOT

# What a module of scripts/ may import of scripts/, from the bottom up. Jobs import no other job.
LAYERS = [
    {"errors"},
    {"presets"},
    {
        "settings",
        "variants",
        "snapshot",
        "index",
        "pins",
        "progress",
        "follow",
        "middleware",
        "sums",
    },
    {"version", "registry"},
    {"gpu", "sources", "keys", "foreground"},
    {"plan", "dialect", "report"},
    {"compose", "host", "fetch", "fit"},
    {"roofline", "hf", "prompts", "chart"},
    {"offline"},
    {"measure"},
    {"doctor"},
]
LIBRARIES = set().union(*LAYERS)
# Modules that run in an image: no python-on-whales there, and no torch or vllm to wait for.
CONTAINER = {
    "download",
    "models",
    "hub",
    "serve",
    "supervise",
    "watch",
    "agent",
    "health",
    "restart",
    "middleware",
    "gateway",
    "key",
    "rehearsal",
    "install",
    "sbom",
    "bound",
    "generate",
    "measure",
    "bench",
    "bench_serve",
    "bench_start",
}
# Libraries that both sides import.
SHARED = {
    "errors",
    "presets",
    "fetch",
    "fit",
    "settings",
    "keys",
    "snapshot",
    "pins",
    "gpu",
    "variants",
    "sources",
    "progress",
    "follow",
    "dialect",
    "report",
    "roofline",
    "hf",
    "prompts",
    "offline",
}
HEAVY = {"torch", "vllm", "transformers"}
MODULES = sorted((ROOT / "scripts").glob("[a-z]*.py"))


def imported(path: Path) -> tuple[set[str], set[str]]:
    """Return modules of scripts/ and top-level packages that a file imports at module level."""
    own, packages = set(), set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "scripts":
            own |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scripts."):
            own.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom):
            packages.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    return own, packages


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way(path: Path) -> None:
    own, packages = imported(path)
    below: set[str] = set()
    for layer in LAYERS:
        if path.stem in layer:
            break
        below |= layer
    # settings and variants need nothing of each other; a job takes any library, never a job.
    assert own <= below | {"errors"} - {path.stem}, f"{path.stem} imports {own - below}"
    assert "tests" not in packages
    assert packages.isdisjoint(HEAVY), f"{path.stem} imports {packages & HEAVY} at its top"
    if path.stem in CONTAINER | SHARED:
        assert "python_on_whales" not in packages
        assert own.isdisjoint({"plan", "compose", "host"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_says_its_job_in_one_sentence(path: Path) -> None:
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert first.endswith("."), f"{path.name}: {first!r}"


def test_what_runs_inside_vllm_needs_only_the_standard_library() -> None:
    own, packages = imported(ROOT / "scripts" / "middleware.py")
    assert own == set()
    assert packages <= sys.stdlib_module_names


def test_each_image_gets_every_script_it_imports() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    for target in ("download", "serve", "gateway"):
        stage = dockerfile.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        copied = set(re.findall(r"scripts/(\w+)\.py", stage)) - {"__init__"}
        for name in copied:
            own, _ = imported(ROOT / "scripts" / f"{name}.py")
            assert own <= copied, f"{target}: {name} imports {own - copied}"


def test_readme_shows_the_table_of_variants() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for variant in variants.load().values():
        capabilities = " to ".join(variant.capabilities) or "–"
        cells = [f"`{variant.short}`", variant.cuda or "–", f"{variant.vllm} ({variant.engine})"]
        cells += [variant.least_driver or "–", capabilities, variant.why]
        assert f"| {' | '.join(cells)} |" in readme


def test_readme_shows_the_table_of_advisories() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for variant in variants.load().values():
        for known in variant.advisories:
            row = (", ".join(known.ids), known.what, known.contained)
            rows.setdefault(row, []).append(f"`{variant.short}`")
    for (ids, what, contained), names in rows.items():
        assert f"| {ids} | {', '.join(names)} | {what} | {contained} |" in readme
    assert len(rows) == len(re.findall(r"^\| (?:CVE|GHSA)-", readme, re.MULTILINE))


def test_every_advisory_says_what_contains_it() -> None:
    for variant in variants.load().values():
        for known in variant.advisories:
            assert known.contained and "nothing" not in known.contained, known.ids


def test_readme_lists_every_exit_code() -> None:
    table = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("| exit code |")[1].split("\n\n")[0]
    )
    listed = {int(code) for code in re.findall(r"\b\d+\b", table)}
    # 13 is the rehearsal's own: no operator's command ends with it.
    assert {kind.exit_code for kind in errors.StackError.__subclasses__()} - {13} == listed
