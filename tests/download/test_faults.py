"""Whatever the hub, the line or the disk does: the snapshot is good or absent."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts import snapshot
from tests.download.conftest import (
    FILES,
    MB,
    MODEL_ID,
    SHARD,
    TOTAL,
    Hub,
    Job,
    end,
    write_model,
)
from tests.stacks import Done, free_port, wait_for

MODEL = TOTAL + 170  # With the index.
# What is sent twice at most for each connection that breaks: what the sockets held.
IN_FLIGHT = 4 * MB


def good(job: Job, done: Done, *texts: str) -> None:
    done.check().says("complete and verified", *texts)
    assert job.gate(), done.explain("an open gate")


def refused(job: Job, done: Done, code: int, *texts: str) -> None:
    done.check(code).says("error: ", "needed: ", "to do: ", *texts)
    assert done.output.count("error: ") == 1, done.output
    assert "Traceback" not in done.output, done.output
    assert not job.gate(), done.explain("a shut gate")


def quick(**fault) -> dict:
    return {"on": "file", **fault}


# --- The line and the hub: what passes ---


def test_nothing_is_wrong(job: Job, hub: Hub, row) -> None:
    good(job, job.run())
    assert hub.sent() < MODEL + 1000
    row("none", "good", hub.sent())


@pytest.mark.parametrize("kind", ["drop", "reset"])
def test_connections_that_break_every_few_megabytes(job: Job, hub: Hub, row, kind: str) -> None:
    hub.fail(quick(kind=kind, after=3 * MB))
    good(job, job.run())
    # The 40 MB shard breaks 13 times; the SDK alone gives up at the sixth.
    assert len(hub.spans()[SHARD]) > 12
    assert hub.sent() < MODEL + 40 * 300_000
    row(f"{kind} every 3 MB", "good, in the same run", hub.sent())


def test_an_object_that_ends_early_once(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="short", bytes=MB, path=SHARD, times=1))
    good(job, job.run())
    row("a truncated object once", "good, in the same run", hub.sent())


def test_an_object_that_is_always_short(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="short", bytes=MB, path=SHARD))
    refused(job, job.run(), 6, SHARD, "gives another")
    row("a truncated object always", "code 6, names the file", hub.sent())


def test_500_on_a_file(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="status", status=500, path=SHARD, times=3))
    good(job, job.run())
    row("500 on a file, three times", "good, in the same run", hub.sent())


def test_500_on_a_file_without_end(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="status", status=500, path=SHARD))
    refused(job, job.run(DOWNLOAD_PATIENCE="3"), 4, SHARD, "no byte", "what has arrived is kept")
    row("500 on a file always", "code 4 after DOWNLOAD_PATIENCE", hub.sent())
    hub.fail()
    good(job, job.run())
    assert hub.sent() < FILES[SHARD] + 1000


def test_500_on_the_listing(job: Job, hub: Hub, row) -> None:
    hub.fail({"on": "listing", "kind": "status", "status": 500, "times": 2})
    good(job, job.run())
    row("500 on the listing, twice", "good, in the same run", hub.sent())
    hub.fail({"on": "listing", "kind": "status", "status": 500})
    done = job.run("--refresh", DOWNLOAD_PATIENCE="3")
    done.check(4).says("does not list")
    assert job.gate()
    row("500 on the listing always", "code 4, a good snapshot stays good", hub.sent())


def test_429_with_retry_after_is_waited_for(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="status", status=429, path=SHARD, times=1, retry_after=3))
    begin = time.monotonic()
    done = job.run()
    assert time.monotonic() - begin >= 3
    good(job, done, "trying again in 3 s")
    row("429 with Retry-After: 3", "good, after 3 s", hub.sent())


def test_403_on_a_file(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="status", status=403, path=SHARD))
    refused(job, job.run(), 19, "does not let us have", SHARD, "MODELSCOPE_API_TOKEN")
    row("403 on a file", "code 19", hub.sent())


def test_403_on_the_listing(job: Job, hub: Hub, row) -> None:
    hub.fail({"on": "listing", "kind": "status", "status": 403})
    refused(job, job.run(), 19, "does not let us have", MODEL_ID)
    row("403 on the listing", "code 19, at once", hub.sent())


def test_404_on_a_file(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="status", status=404, path=SHARD))
    refused(job, job.run(), 6, "does not have", SHARD)
    row("404 on a file", "code 6", hub.sent())


def test_a_wrong_byte_once(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="corrupt", path=SHARD, times=1))
    good(job, job.run(), "is not good")
    row("a wrong byte once", "good, in the same run", hub.sent())


def test_a_wrong_byte_always(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="corrupt", path=SHARD))
    refused(job, job.run(), 6, SHARD, "is not good, 2 times", "sha256")
    assert not (job.where / SHARD).exists()
    row("a wrong byte always", "code 6, names file and sha256", hub.sent())
    hub.fail()
    good(job, job.run())


def test_a_hub_that_ignores_range(job: Job, hub: Hub, row) -> None:
    hub.fail(
        quick(kind="drop", after=10 * MB, path=SHARD, times=1),
        quick(kind="", no_range=True),
    )
    good(job, job.run())
    row("a drop, then Range is ignored", "good, in the same run", hub.sent())


def test_a_hub_that_sends_the_same_beginning_for_ever(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="drop", after=10 * MB, path=SHARD, no_range=True))
    # What comes a second time is no progress.
    refused(job, job.run(DOWNLOAD_PATIENCE="3"), 4, SHARD, "no byte")
    row("drops every 10 MB, Range ignored", "code 4 after DOWNLOAD_PATIENCE", hub.sent())


def test_a_slow_line(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="slow", rate=8 * MB, path="*.safetensors"))
    good(job, job.run(PROGRESS="lines"), "fetching", "MB/s", "left")
    row("8 MB/s a connection", "good; a line every 5 s", hub.sent())


def test_a_stalled_connection(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="stall", after=10 * MB, path=SHARD, times=1))
    begin = time.monotonic()
    good(job, job.run(MODELSCOPE_DOWNLOAD_TIMEOUT="2"))
    assert time.monotonic() - begin < 30
    assert hub.sent() < MODEL + IN_FLIGHT
    row("a stall after 10 MB", "good, in the same run", hub.sent())


def test_the_sdks_own_deadline(job: Job, hub: Hub, row) -> None:
    hub.fail(quick(kind="slow", rate=8 * MB, path=SHARD))
    good(job, job.run(MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT="2"))
    assert len(hub.spans()[SHARD]) > 1
    row("the SDK's deadline of a file", "good, in the same run", hub.sent())


# --- The listing: what cannot be believed ---


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        ({"kind": "success false"}, ["is empty"]),
        ({"kind": "empty"}, ["is empty"]),
        ({"kind": "no sha256", "path": SHARD}, [SHARD, "no sha256"]),
        ({"kind": "size 0", "path": SHARD}, [SHARD, "size is 0"]),
        ({"kind": "omit", "path": SHARD}, [SHARD, "index.json", "lacks"]),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_listing_that_cannot_be_used(job: Job, hub: Hub, row, fault: dict, texts) -> None:
    hub.fail({"on": "listing", **fault})
    refused(job, job.run(), 6, *texts)
    # The large shards were not fetched for nothing.
    assert hub.sent() < 6 * MB
    row(f"listing: {fault['kind']}", "code 6, with the reason", hub.sent())


def test_html_instead_of_json(job: Job, hub: Hub, row) -> None:
    hub.fail({"on": "listing", "kind": "html"})
    refused(job, job.run(), 4, "does not answer as a hub does", "portal")
    row("HTML instead of JSON", "code 4", hub.sent())


def test_a_wrong_id(job: Job, hub: Hub, row) -> None:
    done = job.run(MODEL_ID="tests/none")
    refused(job, done, 5, "does not have tests/none", "MODEL_ID")
    row("a wrong id", "code 5, at once", hub.sent())


def test_a_wrong_revision(job: Job, hub: Hub, row) -> None:
    done = job.run(MODEL_REVISION="v9")
    refused(job, done, 18, "but not at revision 'v9'", "MODEL_REVISION")
    row("a wrong revision", "code 18, at once", hub.sent())


def test_a_dead_hub(job: Job, row) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    refused(job, job.run(MODEL_SOURCES=dead, DOWNLOAD_PATIENCE="2"), 4, dead, "MODEL_SOURCES")
    row("no hub", "code 4", 0)


# --- This machine ---


@pytest.mark.parametrize("workers", ["1", "4"], ids=["single", "parallel"])
def test_kill_9_sends_no_byte_twice_beyond_one_part(
    job: Job, hub: Hub, row, tmp_path: Path, workers: str
) -> None:
    parts = {
        "MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS": workers,
        "MODELSCOPE_DOWNLOAD_PARALLEL_THRESHOLD_MB": "8",
        "MODELSCOPE_DOWNLOAD_PART_SIZE_MB": "4",
    }
    hub.fail(quick(kind="slow", rate=20 * MB))
    for share in (0.2, 0.4, 0.6, 0.8):
        process = job.start(tmp_path / "log", **parts)
        wait_for(
            lambda at=share: hub.sent() > at * MODEL,
            60,
            f"{share:.0%} of the model",
            (tmp_path / "log").read_text,
        )
        assert end(process) == -signal.SIGKILL
        assert not job.gate()
    good(job, job.run(**parts))
    part = 4 * 1024**2
    assert hub.sent() < MODEL + 4 * (part + IN_FLIGHT), hub.spans()
    name = "parts of 4 MiB" if workers != "1" else "one stream a file"
    row(f"kill -9 four times, {name}", "good at the fifth run", hub.sent())


def test_kill_9_while_the_parts_are_joined(job: Job, hub: Hub, row) -> None:
    # What the SDK leaves then: the first parts joined and gone, the others still there.
    content = (hub.origin / SHARD).read_bytes()
    part = 4 * 1024**2
    target = job.where / SHARD
    target.parent.mkdir(parents=True)
    target.with_name(f"{SHARD}.parallel_tmp").write_bytes(content[: part + 1000])
    for start in range(part, len(content), part):
        stop = min(start + part, len(content))
        target.with_name(f"{SHARD}_{start}_{stop - 1}").write_bytes(content[start:stop])
    parallel = {
        "MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS": "4",
        "MODELSCOPE_DOWNLOAD_PARALLEL_THRESHOLD_MB": "8",
        "MODELSCOPE_DOWNLOAD_PART_SIZE_MB": "4",
    }
    good(job, job.run(**parallel))
    assert SHARD not in hub.spans()
    row("kill -9 while parts are joined", "good; no byte of the file again", hub.sent())


def test_sigterm_ends_it_within_two_seconds(job: Job, hub: Hub, row, tmp_path: Path) -> None:
    hub.fail(quick(kind="slow", rate=10 * MB))
    process = job.start(tmp_path / "log")
    wait_for(lambda: hub.sent() > 20 * MB, 60, "20 MB", (tmp_path / "log").read_text)
    begin = time.monotonic()
    assert end(process, signal.SIGTERM) == 143
    assert time.monotonic() - begin < 2
    assert "run the same command again" in (tmp_path / "log").read_text()
    assert not job.gate()
    good(job, job.run())
    assert hub.sent() < MODEL + 3 * IN_FLIGHT
    row("SIGTERM", "code 143 within 2 s; good at the next run", hub.sent())


def test_the_second_of_two_waits_and_finds_the_work_done(
    job: Job, hub: Hub, row, tmp_path: Path
) -> None:
    hub.fail(quick(kind="slow", rate=15 * MB))
    first = job.start(tmp_path / "first")
    wait_for(lambda: hub.sent() > MB, 60, "the first at work", (tmp_path / "first").read_text)
    # Another home, as in another container: the SDK's own locks lie there.
    (tmp_path / "home").mkdir()
    good(job, job.run(HOME=str(tmp_path / "home")), "waiting for it", "nothing to do")
    assert first.wait(timeout=30) == 0
    assert hub.sent() < MODEL + 1000
    row("two at once", "the second waits; both good", hub.sent())


def test_too_little_room(job: Job, hub: Hub, row, small_disk) -> None:
    job.models = small_disk(60) / "models"
    refused(job, job.run(), 7, "GB free", "make room", "make models")
    assert hub.sent() == 0
    row("too little room", "code 7 before the first byte", hub.sent())


def test_a_disk_that_fills_up_meanwhile(
    job: Job, hub: Hub, row, tmp_path: Path, small_disk
) -> None:
    disk = small_disk(200)
    job.models = disk / "models"
    hub.fail(quick(kind="slow", rate=10 * MB))
    process = job.start(tmp_path / "log")
    wait_for(lambda: hub.sent() > 10 * MB, 60, "10 MB", (tmp_path / "log").read_text)
    filler = disk / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 170 * MB)
    assert process.wait(timeout=30) == 7, (tmp_path / "log").read_text()
    assert "is full" in (tmp_path / "log").read_text()
    assert not job.gate()
    filler.unlink()
    hub.fail()
    good(job, job.run())
    row("the disk fills up meanwhile", "code 7; good after room is made", hub.sent())


def test_a_read_only_volume(job: Job, hub: Hub, row) -> None:
    job.models.mkdir()
    subprocess.run(["mount", "--bind", job.models, job.models], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", job.models], check=True)
        refused(job, job.run(), 20, "Read-only file system", "owner or mount")
        assert hub.sent() == 0
        row("a read-only volume", "code 20 before the first byte", hub.sent())
    finally:
        subprocess.run(["umount", job.models], check=True)


# --- What is there already ---


def test_the_hub_is_down_and_the_snapshot_complete(job: Job, row) -> None:
    job.run().check()
    # A network of its own, without any route.
    command = ["unshare", "--net", job.python, "-m", "scripts.download"]
    for verify in ("size", "full"):
        begin = time.monotonic()
        done = run_plain(command, job.settings(VERIFY=verify))
        good(job, done, "nothing to do")
        seconds = time.monotonic() - begin
        row(f"no route, complete, VERIFY={verify}", f"good in {seconds:.1f} s", 0)


def run_plain(command: list[str], environ: dict[str, str]) -> Done:
    from tests.stacks import run

    return run(*command, timeout=60, **environ)


def test_the_hub_is_down_and_the_snapshot_partial(job: Job, hub: Hub, row, tmp_path: Path) -> None:
    hub.fail(quick(kind="slow", rate=10 * MB))
    process = job.start(tmp_path / "log")
    wait_for(lambda: hub.sent() > 30 * MB, 60, "30 MB", (tmp_path / "log").read_text)
    end(process)
    kept = job.partial()
    dead = f"http://127.0.0.1:{free_port()}"
    refused(job, job.run(MODEL_SOURCES=dead, DOWNLOAD_PATIENCE="1"), 4, dead)
    assert job.partial() == kept
    good(job, job.run())
    row("hub down, partial, then up", "code 4, nothing lost; then good", hub.sent())


def test_a_changed_revision_fetches_what_differs(
    job: Job, hub: Hub, row, tmp_path: Path, python: str
) -> None:
    from tests.download.conftest import started_hub

    job.run().check()
    models = tmp_path / "second"
    where = snapshot.folder(models, MODEL_ID)
    write_model(where)
    (where / "config.json").write_bytes(b"{}" * 150)
    (where / "model-00003-of-00003.safetensors").unlink()
    (where / "extra.safetensors").write_bytes(b"1234")
    weights = '{"weight_map": {"a": "extra.safetensors"}}'
    (where / "model.safetensors.index.json").write_text(weights)
    snapshot.record(where, MODEL_ID, "v2", "test")
    with started_hub(python, models) as newer:
        newer.fail()
        done = job.run(MODEL_SOURCES=newer.url, MODEL_REVISION="v2")
        done.check().says("removed model-00003-of-00003.safetensors", "complete and verified")
        assert newer.sent() < 1000
        row("another revision", "good; only what differs was sent", newer.sent())
    assert snapshot.require(job.models, MODEL_ID, "v2") == job.where
    assert not job.gate()


@pytest.mark.parametrize("how", ["flipped", "shorter", "gone"])
def test_a_file_damaged_afterwards(job: Job, hub: Hub, row, how: str) -> None:
    job.run().check()
    path = job.where / SHARD
    if how == "flipped":
        with path.open("r+b") as stream:
            stream.seek(1000)
            stream.write(b"damaged")
    elif how == "shorter":
        os.truncate(path, 1000)
    else:
        path.unlink()
    assert not job.gate(), "expected `serve` to refuse a damaged file"
    hub.fail()
    good(job, job.run())
    assert hub.sent() <= FILES[SHARD]
    row(f"a file {how} afterwards", "serve refuses; good at the next run", hub.sent())


def test_damage_that_leaves_the_time_as_it_was_is_found_by_verify_full(
    job: Job, hub: Hub, row
) -> None:
    job.run().check()
    path = job.where / SHARD
    was = path.stat()
    with path.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"damaged")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    hub.fail()
    good(job, job.run(VERIFY="full"), "has been damaged")
    assert hub.sent() == FILES[SHARD]
    row("rotten bytes, VERIFY=full", "found, fetched again, good", hub.sent())


def test_a_copied_volume_without_its_times_is_hashed_and_taken(job: Job, hub: Hub, row) -> None:
    job.run().check()
    for path in snapshot.paths(job.where):
        os.utime(path)
    assert not job.gate()
    hub.fail()
    good(job, job.run(), "nothing to do")
    assert hub.sent() == 0
    assert hub.asked() == ["/sent"] or all("/repo" not in asked for asked in hub.asked())
    row("a copied volume, times lost", "hashed, good, no network", hub.sent())


def test_nothing_is_fetched_again_after_a_success(job: Job, hub: Hub) -> None:
    job.run().check()
    hub.fail()
    good(job, job.run(), "nothing to do")
    assert all("/repo" not in asked for asked in hub.asked())
