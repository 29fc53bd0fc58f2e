"""Sources take over from each other, a pin is kept, the hub gives what is verified and no more."""

import json
import subprocess
from pathlib import Path

import pytest
import requests

from scripts import snapshot
from tests.download.conftest import FILES, MB, MODEL_ID, REVISION, SHARD, Hub, Job
from tests.download.test_faults import MODEL, good, quick, refused
from tests.stacks import ROOT, Done, free_port, run


def hugging_face(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_MODEL_REVISION": REVISION}


def test_the_next_source_takes_over_in_the_middle_of_a_file(
    job: Job, hub: Hub, second_hub: Hub, row
) -> None:
    hub.fail(
        quick(kind="drop", after=10 * MB, path=SHARD, times=1),
        quick(kind="status", status=404, path=SHARD),
    )
    done = job.run(MODEL_SOURCES=f"{hub.url},{second_hub.url}")
    good(job, done, "going on with the next source")
    assert second_hub.sent() == FILES[SHARD] - 10 * MB
    row("one file is lost at the first source", "good, from the second", second_hub.sent())


def test_hugging_face_takes_over_from_modelscope_with_the_same_sha256(
    job: Job, hub: Hub, second_hub: Hub, row
) -> None:
    hub.fail(
        quick(kind="drop", after=10 * MB, path=SHARD, times=1),
        quick(kind="status", status=500, path=SHARD),
    )
    done = job.run(
        MODEL_SOURCES=f"{hub.url},huggingface", DOWNLOAD_PATIENCE="3", **hugging_face(second_hub)
    )
    good(job, done, "going on with the next source")
    assert second_hub.sent() == FILES[SHARD] - 10 * MB
    row("500s at ModelScope", "good, from Hugging Face", second_hub.sent())


def test_a_dead_first_source(job: Job, hub: Hub, row) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    done = job.run(MODEL_SOURCES=f"{dead},huggingface", DOWNLOAD_PATIENCE="2", **hugging_face(hub))
    good(job, done, "trying the next source")
    assert snapshot.read(job.where).source == "huggingface"
    row("the first source is dead", "good, from Hugging Face alone", hub.sent())


def test_connections_to_hugging_face_that_break(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="drop", after=5 * MB))
    good(job, job.run(MODEL_SOURCES="huggingface", **hugging_face(hub)))
    assert hub.sent() < MODEL + MB
    row("Hugging Face drops every 5 MB", "good, in the same run", hub.sent())


@pytest.mark.parametrize(
    ("faults", "code", "text"),
    [
        ([{"on": "listing", "kind": "status", "status": 403}], 19, "HF_TOKEN"),
        ([{"on": "file", "kind": "status", "status": 404, "path": SHARD}], 6, "does not have"),
        ([{"on": "file", "kind": "corrupt", "path": SHARD}], 6, "is not good, 2 times"),
        ([{"on": "listing", "kind": "html"}], 4, "does not answer as a hub does"),
    ],
    ids=["403", "404", "corrupt", "html"],
)
def test_faults_of_hugging_face(job: Job, hub: Hub, faults: list, code: int, text: str) -> None:
    hub.fail(*faults)
    done = job.run(MODEL_SOURCES="huggingface", DOWNLOAD_PATIENCE="2", **hugging_face(hub))
    refused(job, done, code, text)


def test_hugging_face_lacks_the_model_or_the_revision(job: Job, hub: Hub) -> None:
    more = {"MODEL_SOURCES": "huggingface", **hugging_face(hub)}
    refused(job, job.run(**{**more, "HF_MODEL_ID": "tests/none"}), 5, "tests/none")
    refused(job, job.run(**{**more, "HF_MODEL_REVISION": "v9"}), 18, "v9", "MODEL_REVISION")


def test_no_source_has_it_says_why_for_each(job: Job, hub: Hub, second_hub: Hub) -> None:
    hub.fail(quick(kind="corrupt", path=SHARD))
    second_hub.fail(quick(kind="status", status=404, path=SHARD))
    done = job.run(MODEL_SOURCES=f"{hub.url},{second_hub.url}")
    refused(job, done, 6, "no source gives it", "is not good, 2 times", "does not have")


def test_a_folder_is_a_source(job: Job, hub: Hub, row) -> None:
    more = {"MODEL_SOURCES": "folder", "MODEL_FOLDER": str(hub.origin)}
    good(job, job.run(**more), "asking folder")
    assert hub.sent() == 0
    row("files of a folder", "good, no network", hub.sent())


def test_a_folder_that_is_none(job: Job) -> None:
    more = {"MODEL_SOURCES": "folder", "MODEL_FOLDER": "/none"}
    refused(job, job.run(**more), 4, "/none", "MODEL_FOLDER")


def test_a_token_goes_only_to_the_hub_it_is_for(job: Job, hub: Hub) -> None:
    # The fault layer notes the path alone; the SDK sends its token as a cookie.
    script = (
        "import os; from scripts import sources; from scripts.settings import Settings;"
        "found = sources.choose(Settings.from_environ());"
        "print([s._api.legacy.token if hasattr(s, '_api') else s._token for s in found])"
    )
    done = run(
        job.python, "-c", script,
        **job.settings(MODEL_SOURCES="modelscope,http://other:1,huggingface,hf-mirror"),
        MODELSCOPE_API_TOKEN="ms-secret", HF_TOKEN="hf-secret",
    )  # fmt: skip
    assert done.check().output.strip() == "['ms-secret', '', 'hf-secret', False]"


@pytest.fixture
def pin(job: Job):
    """A pin of the model, removed again."""
    path = snapshot.pin(MODEL_ID)
    yield path
    path.unlink(missing_ok=True)


def test_a_pinned_model_must_be_the_same_file_by_file(job: Job, hub: Hub, pin: Path, row) -> None:
    job.run().check()
    manifest = models(job, "--pin").check().output
    pin.write_text(manifest)
    good(job, job.run(), "nothing to do")

    # The hub's branch moves on.
    config = hub.origin / "config.json"
    was = config.read_bytes()
    try:
        config.write_bytes(was + b" ")
        hub.mark()
        done = job.run("--refresh")
        done.check(21).says("config.json: expected 300 bytes", "found 301 bytes", "pinned")
        row("the hub has other files than the pin", "code 21, names the file", 0)
    finally:
        config.write_bytes(was)
        hub.mark()
    assert job.gate(), "expected the good snapshot to stay"
    good(job, job.run("--refresh"))


def test_a_snapshot_that_is_not_what_is_pinned_is_brought_anew(
    job: Job, hub: Hub, pin: Path
) -> None:
    job.run().check()
    document = json.loads(models(job, "--pin").check().output)
    document["files"] = [f for f in document["files"] if f["path"] != "config.json"]
    pin.write_text(json.dumps(document))
    job.run().check(21).says("config.json is new")


def test_a_pin_of_another_revision_does_not_hold_and_says_so(job: Job, pin: Path) -> None:
    job.run().check()
    document = json.loads(models(job, "--pin").check().output)
    pin.write_text(json.dumps({**document, "revision": "v0"}))
    good(job, job.run(), "not pinned", "v0")


def models(job: Job, *arguments: str) -> Done:
    return run(job.python, "-m", "scripts.models", *arguments, **job.settings())


def test_models_lists_and_removes(job: Job, hub: Hub) -> None:
    models(job).check().says("no model", "make download")
    job.run().check()
    models(job).check().says(MODEL_ID, REVISION, "0.08", "complete", "GB free")
    (job.where / "config.json").unlink()
    models(job).check().says("config.json is missing")
    models(job, "--remove", "tests/none").check(5).says(MODEL_ID)
    models(job, "--remove", MODEL_ID).check().says("removed tests/model, 0.08 GB")
    assert not job.where.exists()


def test_json_lines_tell_progress_files_and_the_end(job: Job, hub: Hub) -> None:
    hub.fail(quick(kind="slow", rate=15 * MB))
    events = [json.loads(line) for line in job.run(PROGRESS="json").check().output.splitlines()]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress and progress[-1]["total"] == sum_of(hub)
    assert progress[-1]["bytes_per_second"] > 0
    assert {e["path"] for e in events if e["event"] == "file"} >= set(FILES)
    assert events[-1]["event"] == "complete" and events[-1]["model_id"] == MODEL_ID


def test_a_terminal_gets_a_live_bar(job: Job, hub: Hub) -> None:
    hub.fail(quick(kind="slow", rate=15 * MB))
    command = [
        "script",
        "-qec",
        f"stty cols 100 rows 40; {job.python} -m scripts.download",
        "/dev/null",
    ]
    done = run(*command, timeout=60, **job.settings()).check()
    done.says("fetching:", "B/s", "complete and verified")


def test_json_lines_tell_an_error(job: Job, hub: Hub) -> None:
    done = job.run(PROGRESS="json", MODEL_ID="tests/none").check(5)
    lines = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert (lines[-1]["event"], lines[-1]["exit_code"]) == ("error", 5)


def sum_of(hub: Hub) -> int:
    return sum(path.stat().st_size for path in snapshot.paths(hub.origin))


def test_the_hub_gives_ranges_and_no_file_that_is_not_verified(job: Job, hub: Hub) -> None:
    job.run().check()
    port = free_port()
    command = [job.python, "-m", "scripts.hub", "--models", str(job.models), "--port", str(port)]
    process = subprocess.Popen([*command, "--host", "127.0.0.1"], cwd=ROOT)
    try:
        from tests.download.conftest import answers
        from tests.stacks import wait_for

        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url), 30, "a hub")
        where = f"{url}/api/v1/models/{MODEL_ID}/repo"
        content = (hub.origin / SHARD).read_bytes()
        part = requests.get(
            where, params={"FilePath": SHARD}, headers={"Range": "bytes=5-9"}, timeout=10
        )
        assert (part.status_code, part.content) == (206, content[5:10])

        def ask(path: str) -> requests.Response:
            return requests.get(where, params={"FilePath": path}, timeout=10)

        for path in ("../model/config.json", ".snapshot.json", "none", "", "/etc/passwd"):
            assert ask(path).status_code == 404, path
        (job.where / "config.json.gz").write_bytes(b"unverified")
        assert ask("config.json").status_code == 404
        (job.where / "config.json.gz").unlink()
        (job.where / "config.json").write_bytes(b"x" * 300)
        for path in ("config.json", SHARD):
            refusal = ask(path)
            assert refusal.status_code == 404 and "not complete" in refusal.text
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0


def test_programs_of_hugging_face_fetch_from_the_hub(job: Job, hub: Hub, tmp_path: Path) -> None:
    script = (
        "from huggingface_hub import snapshot_download;"
        f"print(snapshot_download('{MODEL_ID}', revision='{REVISION}', local_dir='{tmp_path}/x'))"
    )
    environ = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    run(job.python, "-c", script, timeout=60, **environ).check()
    assert (tmp_path / "x" / SHARD).read_bytes() == (hub.origin / SHARD).read_bytes()
