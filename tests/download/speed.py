"""Measure downloads side by side with hyperfine: unthrottled, and with each connection throttled.

    python -m tests.download.speed PYTHON [--runs 5] [--shard 200] [--rate 8]
    unshare --net sh -c 'ip link set lo up; tc qdisc add dev lo root tbf rate 10gbit burst 1mb \
        latency 50ms; python -m tests.download.speed PYTHON'     # on a line of 10 Gbit/s

PYTHON is the one of images/download.lock. Ten shards, as GLM-4-9B-chat has, from the local hub.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path

from scripts import snapshot
from tests.download.conftest import MB, MODEL_ID, REVISION, started_hub
from tests.stacks import ROOT, free_port, wait_for

SHARDS = 10
# The SDK as it is used by everybody, without a hash to compare with; then the data on the disk.
SDK = """
import os, sys
os.environ.update(MODELSCOPE_ENDPOINT=sys.argv[1], TQDM_DISABLE="1", MODELSCOPE_LOG_LEVEL="ERROR")
from modelscope_hub import HubApi
api = HubApi(endpoint=sys.argv[1], token="")
files = api.list_repo_files("tests/model", "model", revision="v1")
files = [{"Path": file.path, "Size": file.size} for file in files]
api.download_repo("tests/model", "model", revision="v1", local_dir=sys.argv[2], max_workers=10,
                  file_list=files)
"""


def write_model(models: Path, size: int) -> None:
    where = snapshot.folder(models, MODEL_ID)
    where.mkdir(parents=True)
    for number in range(SHARDS):
        with Path("/dev/urandom").open("rb") as source:
            (where / f"model-{number:05}.safetensors").write_bytes(source.read(size))
    snapshot.record(where, MODEL_ID, REVISION, "speed")


def measure(folder: Path, runs: int, commands: dict[str, str], prepare: str) -> dict[str, float]:
    """Return the median seconds of each command."""
    report = folder / "report.json"
    words = ["hyperfine", "--runs", str(runs), "--warmup", "1", "--prepare", prepare]
    words += ["--export-json", str(report), "--style", "basic"]
    for name, command in commands.items():
        words += ["--command-name", name, command]
    subprocess.run(words, check=True, cwd=ROOT)
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    return {result["command"]: statistics.median(result["times"]) for result in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shard", type=int, default=200, help="MB, unthrottled")
    parser.add_argument("--skip-throttled", action="store_true")
    parser.add_argument("--rate", type=int, default=8, help="MB/s of a throttled connection")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdk = folder / "sdk.py"
        sdk.write_text(SDK, encoding="utf-8")
        out = folder / "out"
        settings = {
            "MODELS_DIR": out,
            "CACHES_DIR": folder / "caches",
            "MODEL_ID": MODEL_ID,
            "MODEL_REVISION": REVISION,
            "VARIANT": "cpu",
        }
        pairs = " ".join(f"{key}={value}" for key, value in settings.items())
        prepare = f"rm -rf {out}; sync"

        write_model(folder / "large", options.shard * MB)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        hub = [options.python, "-m", "scripts.hub", "--models", str(folder / "large")]
        process = subprocess.Popen(
            [*hub, "--host", "127.0.0.1", "--port", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        try:
            from tests.download.conftest import answers

            wait_for(lambda: answers(url), 30, "a hub")
            plain = f"{options.python} {sdk} {url} {out}"
            ours = f"env {pairs} MODEL_SOURCES={url} {options.python} -m scripts.download"
            found = measure(
                folder,
                options.runs,
                {
                    "SDK, no hash": plain,
                    "SDK, no hash, then sync": f"sh -c {shlex.quote(f'{plain} && sync')}",
                    "download": ours,
                },
                prepare,
            )
        finally:
            process.terminate()
            process.wait(timeout=10)
        mine = found["download"]
        for other in ("SDK, no hash", "SDK, no hash, then sync"):
            print(f"unthrottled: download / {other}: {mine / found[other]:.2f}")
        if options.skip_throttled:
            return

        write_model(folder / "small", 20 * MB)
        with started_hub(options.python, folder / "small") as slow:
            slow.fail({"on": "file", "kind": "slow", "rate": options.rate * MB})
            where = f"{slow.url}/api/v1/models/{MODEL_ID}/repo?FilePath="
            files = [f"model-{number:05}.safetensors" for number in range(SHARDS)]
            curl = " ".join(f"-o /dev/null {shlex.quote(where + file)}" for file in files)
            found = measure(
                folder,
                3,
                {
                    "one curl": f"curl --silent --fail {curl}",
                    "download": f"env {pairs} MODEL_SOURCES={slow.url} {options.python}"
                    " -m scripts.download",
                },
                prepare,
            )
        ratio = found["one curl"] / found["download"]
        print(f"{options.rate} MB/s a connection: one curl / download: {ratio:.1f}")


if __name__ == "__main__":
    main()
