"""A bundle's installer: it names what is not as it was packed, and starts nothing then."""

import shutil
from pathlib import Path

import pytest

from scripts import sums
from tests.stacks import ROOT, Done, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle with nothing to install in it."""
    where = tmp_path / "bundle"
    shutil.copytree(ROOT / "bundle", where)
    (where / "model").mkdir()
    for name in ("bundle.env", "NEEDS_MB", "model/weights", "model/.snapshot.json"):
        (where / name).write_text(f"1 {name}\n", encoding="utf-8")
    files = [path for path in where.rglob("*") if path.is_file()]
    pairs = {path.relative_to(where).as_posix(): sums.of_file(path) for path in files}
    (where / sums.NAME).write_text(sums.text(pairs) + sums.END, encoding="utf-8")
    return where


def install(folder: Path, *arguments: str) -> Done:
    return run(str(folder / "install.sh"), *arguments)


def test_a_whole_copy_passes(folder: Path) -> None:
    install(folder, "--check").check().says("every file is as it was packed")


@pytest.mark.parametrize("name", ["model/weights", "NEEDS_MB", "run.sh", "model/.snapshot.json"])
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    install(folder).check(6).says(f"not as they were packed: {name}", "copy them again")
    assert not (folder / ".env").exists()


def test_a_missing_and_a_cut_file_are_named(folder: Path) -> None:
    (folder / "model" / "weights").unlink()
    (folder / "NEEDS_MB").write_text("")
    install(folder).check(6).says("NEEDS_MB", "model/weights")


def test_a_list_of_sums_that_is_cut_at_a_line_is_not_believed(folder: Path) -> None:
    lines = (folder / sums.NAME).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / sums.NAME).write_text("".join(lines[:2]), encoding="utf-8")
    install(folder, "--check").check(6).says("SHA256SUMS is cut off")


def test_an_installer_that_is_cut_does_nothing(folder: Path) -> None:
    text = (folder / "install.sh").read_text(encoding="utf-8")
    (folder / "install.sh").write_text(text[: text.rindex("main ")], encoding="utf-8")
    assert install(folder).output == ""


def test_a_bundle_for_docker_says_what_a_host_without_it_needs(folder: Path) -> None:
    install(folder, "--host", "there").check(2).says("make bundle RUNTIME=host")


def test_unknown_words_show_how_it_is_used(folder: Path) -> None:
    install(folder, "--help").check(2).says("./install.sh --host DIR")


def test_settings_that_are_none_stay_out_of_the_bundle() -> None:
    from scripts import bundle, plan

    assert not {"HF_TOKEN", "MODELSCOPE_API_TOKEN", "OPENAI_API_KEY"} & set(bundle._SETTINGS)
    text = bundle.settings(_with_version(plan.make("cpu", "docker")), "docker")
    assert "MODEL_SOURCES=folder\n" in text and "CONTAINER_RUNTIME=runc\n" in text
    assert "MODEL_ID=rehearsal/glm-4-tiny\n" in text and "VERSION=1.2.3\n" in text
    assert "MODELSCOPE_ENDPOINT" not in text


def _with_version(chosen):
    chosen.environ["VERSION"] = "1.2.3"
    return chosen
