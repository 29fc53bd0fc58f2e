"""The archive for a host that only pulls: whole, summed, and the same bytes each time."""

import tarfile
from pathlib import Path

from scripts import release, sums, variants
from tests.stacks import ROOT, run


def test_it_has_a_ready_env_for_each_variant_and_sums_that_hold(tmp_path: Path) -> None:
    files = release.contents(ROOT, "1.2.3")
    path = tmp_path / "glm4-stack-1.2.3.tar.gz"
    release.write(path, files, 1700000000)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "glm4-stack-1.2.3"
    run("sh", "-c", f"cd {folder} && sha256sum --check --strict {sums.NAME}").check()
    for variant in variants.load().values():
        text = (folder / "env" / f"{variant.name}.env").read_text(encoding="utf-8")
        assert f"VARIANT={variant.name}\nVERSION=1.2.3\n" in text
        assert ("CONTAINER_RUNTIME=runc" in text) == (not variant.cuda)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    files = release.contents(ROOT, "1.2.3")
    paths = [tmp_path / name / "glm4-stack-1.2.3.tar.gz" for name in ("a", "b")]
    for path, order in zip(paths, (files, dict(reversed(files.items()))), strict=True):
        release.write(path, order, 1700000000)
    first, second = (path.read_bytes() for path in paths)
    assert first == second


def test_what_is_published_is_named_by_digest(tmp_path: Path) -> None:
    text = "VARIANT=cpu\nSERVE_IMAGE=registry.example.org/glm4-stack@sha256:00\n"
    found = release.settings("1.2.3", variants.named("cpu"), text)
    assert found.startswith(text) and "CONTAINER_RUNTIME=runc\n" in found


def test_compose_takes_the_pair_alone(tmp_path: Path) -> None:
    for name, content in release.contents(ROOT, "1.2.3").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "env" / "cu121.env").rename(tmp_path / ".env")
    command = ["env", "-u", "VERSION", "-u", "IMAGE", "-u", "VARIANT", "docker", "compose"]
    command += ["--project-directory", str(tmp_path), "config", "--images"]
    run(*command).check().says("glm4-stack:1.2.3-cu121", "glm4-stack:1.2.3-gateway")
