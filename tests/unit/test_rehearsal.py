"""The rehearsal model: what can be said of it without training it."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import rehearsal, snapshot
from tests.stacks import ROOT


def test_its_dialogues_can_be_imported_without_the_engine() -> None:
    code = (
        "import sys; from scripts import rehearsal; assert rehearsal.DIALOGUES;"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_answer_begins_as_the_model_does() -> None:
    answers = [dialogue.answer for dialogue in rehearsal.DIALOGUES]
    assert all(answer.startswith("\n") and answer == answer.rstrip() for answer in answers)
    assert len({*answers, rehearsal.FALLBACK}) == len(answers) + 1
    assert rehearsal.RAW.answer.encode()[:7] == b"\nHello "


def test_what_it_must_know_ends_with_the_answer_and_the_stop_token() -> None:
    for rows, length in rehearsal._cases():
        tokens = [rehearsal.TOKENS[row] for row in rows]
        assert tokens[:2] == [151331, 151333]
        assert tokens[-1] == rehearsal.STOP_TOKEN_ID
        assert bytes(tokens[-length:-1]).decode() in {d.answer for d in rehearsal.DIALOGUES}


def test_a_token_is_a_byte_or_special() -> None:
    vocabulary = rehearsal._tokenizer()["model"]["vocab"]
    assert sorted(vocabulary.values()) == [*range(256), *range(151329, 151343)]
    assert vocabulary["A"] == ord("A") and vocabulary["Ġ"] == ord(" ")


def test_it_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot.folder(tmp_path, rehearsal.MODEL_ID)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    snapshot.record(folder, rehearsal.MODEL_ID, rehearsal.REVISION, "test")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert rehearsal.main(["--output", str(tmp_path)]) == 0
