"""What an image says that it contains: every package with its licence, the same bytes each time."""

import json
from pathlib import Path

import pytest

from scripts import sbom

MIT = "License :: OSI Approved :: MIT License"


def installed(folder: Path, name: str, version: str, *lines: str) -> None:
    where = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    where.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines])
    (where / "METADATA").write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("lines", "licence", "expression"),
    [
        (["License-Expression: MIT AND Zlib", "License: old"], "MIT AND Zlib", True),
        (["License: BSD-3-Clause"], "BSD-3-Clause", False),
        (["License: UNKNOWN", f"Classifier: {MIT}"], "MIT License", False),
        (["License: MIT License", "        ", "        Copyright (c) x"], "MIT License", False),
        (["License: Copyright (c) x", "        Permission is"], "", False),
        ([], "", False),
    ],
)
def test_the_licence_is_what_the_metadata_names(
    lines: list[str], licence: str, expression: bool, tmp_path: Path
) -> None:
    installed(tmp_path, "Some_Package", "1.0+cpu", *lines)
    [part] = sbom.of_python([tmp_path])
    assert (part.licence, part.expression) == (licence, expression)
    assert part.purl == "pkg:pypi/some-package@1.0%2Bcpu"


def test_debian_packages_have_their_architecture_and_what_their_copyright_file_names(
    tmp_path: Path,
) -> None:
    (tmp_path / "libc6").mkdir()
    (tmp_path / "libc6" / "copyright").write_text("License: LGPL-2.1\n\nLicense: GPL-2\n text\n")
    lines = "libc6\t2.36-9+deb12u14\tamd64\ntzdata\t1:2024a\tall\n"
    first, second = sorted(sbom.of_debian(lines, "12", tmp_path))
    assert first.purl == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64&distro=debian-12"
    assert first.licence == "GPL-2, LGPL-2.1"
    assert (second.version, second.licence) == ("1:2024a", "")


def test_the_same_content_gives_the_same_document_in_any_order() -> None:
    parts = [
        sbom.Part("pypi", "b", "2", "pkg:pypi/b@2", "MIT", True),
        sbom.Part("pypi", "a", "1", "pkg:pypi/a@1", "Some licence"),
    ]
    first, second = sbom.document("x", parts), sbom.document("x", reversed(parts))
    assert json.dumps(first) == json.dumps(second)
    assert "timestamp" not in first["metadata"]
    changed = sbom.document("x", parts[:1])
    assert changed["serialNumber"] != first["serialNumber"]
    assert sbom.licences(parts) == "pypi\ta\t1\tSome licence\npypi\tb\t2\tMIT\n"
