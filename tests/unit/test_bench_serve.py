"""What vLLM's client is told, and what is made of its results and of its failures."""

import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
from email.message import Message
from pathlib import Path

import pytest

from scripts import bench_serve, errors
from scripts.settings import Settings
from tests.stacks import ROOT, free_port, wait_for

KEY = "sk-a-very-secret-key"


def options(*words: str):
    return bench_serve.parser().parse_args(words)


def command(
    *words: str, concurrency: int = 4, url: str = "http://127.0.0.1:8000", **environ: str
) -> list[str]:
    return bench_serve.command(
        Settings.from_environ(environ),
        options(*words),
        url,
        Path("/models/a/b"),
        concurrency,
        Path("/tmp/x/4.json"),
    )


def value(made: list[str], name: str) -> str:
    assert made.count(name) == 1, made
    return made[made.index(name) + 1]


# --- what the client is told ---


def test_the_command_line_has_every_choice_and_never_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = command(SERVED_MODEL_NAME="my-model", TRUST_REMOTE_CODE="1")
    assert Path(made[0]).name == "vllm" and made[1:3] == ["bench", "serve"]
    wanted = {
        "--backend": "openai",
        "--endpoint": "/v1/completions",
        "--base-url": "http://127.0.0.1:8000",
        "--model": "my-model",
        "--tokenizer": "/models/a/b",
        "--dataset-name": "random",
        "--random-input-len": "256",
        "--random-output-len": "128",
        "--num-prompts": "16",
        "--num-warmups": "4",
        "--max-concurrency": "4",
        "--temperature": "0",
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,99",
        "--result-dir": "/tmp/x",
        "--result-filename": "4.json",
    }
    assert {name: value(made, name) for name in wanted} == wanted
    goodput = made.index("--goodput")
    assert made[goodput + 1 : goodput + 3] == ["ttft:1000", "tpot:50"]
    flags = {"--ignore-eos", "--save-result", "--save-detailed", "--trust-remote-code"}
    assert flags <= set(made)
    assert "--insecure" not in made
    assert KEY not in " ".join(made)


def test_each_concurrency_has_prompts_of_its_own_and_four_rounds_of_them() -> None:
    made = [command(concurrency=concurrency) for concurrency in (1, 4, 16, 64)]
    assert [value(one, "--num-prompts") for one in made] == ["16", "16", "64", "256"]
    seeds = [value(one, "--seed") for one in made]
    assert len(set(seeds)) == 4
    assert seeds == [value(command(concurrency=number), "--seed") for number in (1, 4, 16, 64)]
    assert value(command("--seed", "7"), "--seed") not in seeds


def test_options_reach_the_client() -> None:
    made = command(
        *("--num-prompts", "8", "--num-warmups", "0", "--input-len", "16", "--output-len", "9"),
        *("--slo", "e2el:2000.5"),
    )
    given = ("--num-prompts", "--num-warmups", "--random-input-len", "--random-output-len")
    assert [value(made, name) for name in given] == ["8", "0", "16", "9"]
    assert value(made, "--goodput") == "e2el:2000.5"
    assert "--goodput" not in command("--slo", "")
    assert options("--concurrency", "1, 4,16").concurrency == [1, 4, 16]
    assert options().concurrency == [1, 4, 16, 64]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--concurrency", "1,0"], "'0' is not a whole number above 0"),
        (["--concurrency", ""], "'' is not a whole number"),
        (["--num-prompts", "-3"], "'-3' is not a whole number"),
        (["--slo", "ttft"], "'ttft' is not like ttft:1000"),
        (["--slo", "itl:5"], "'itl:5' is not like"),
        (["--url", "127.0.0.1:8000"], "it must be like http://127.0.0.1:8000"),
        (["--url", "http://user:word@host"], "it must be like"),
    ],
)
def test_what_is_not_an_option_is_told(
    words: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        options(*words)
    assert end.value.code == 2
    assert told in capsys.readouterr().err


# --- where it goes ---


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"HOST": "0.0.0.0", "PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"HOST": "192.0.2.7"}, "http://192.0.2.7:8000"),
        ({"HOST": "::"}, "http://[::1]:8000"),
        ({"TLS_CERT": "./cert.pem"}, "https://127.0.0.1:8000"),
    ],
)
def test_by_default_the_endpoint_of_this_host_is_measured(
    environ: dict[str, str], url: str
) -> None:
    assert bench_serve.own_url(Settings.from_environ(environ)) == url


def test_only_the_own_certificate_is_taken_unasked() -> None:
    own, foreign = "https://127.0.0.1:8000", "https://example.com"
    assert "--insecure" in command(url=own, TLS_CERT="./cert.pem")
    assert "--insecure" in command(url="https://192.0.2.7:1", TLS_CERT="c", HOST="192.0.2.7")
    assert "--insecure" not in command(url=foreign, TLS_CERT="./cert.pem")
    assert "--insecure" not in command(url=own)
    assert "--insecure" in command("--insecure", url=foreign)


def test_a_url_may_end_like_a_clients_base_url() -> None:
    assert options("--url", "https://host:1/v1/").url == "https://host:1"


def test_nothing_leaves_the_folder_and_no_proxy_is_between() -> None:
    environ = bench_serve.environment(Path("/tmp/x"))
    assert environ["HF_HUB_OFFLINE"] == environ["TRANSFORMERS_OFFLINE"] == "1"
    assert environ["HOME"] == environ["HF_HOME"] == environ["VLLM_CACHE_ROOT"] == "/tmp/x/caches"
    assert environ["NO_PROXY"] == environ["no_proxy"] == "*"


# --- what is refused before the load ---


@pytest.mark.parametrize("version", [None, "0.6.3.post1", "0.10.1.1"])
def test_a_vllm_without_such_a_client_is_refused(version: str | None) -> None:
    with pytest.raises(errors.SettingInvalid, match="BENCH_VARIANT=cpu"):
        bench_serve.require_client(version)


def test_the_vllm_of_the_image_is_taken() -> None:
    bench_serve.require_client("0.32.0+cpu")


def test_an_endpoint_that_is_down_is_told() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(errors.ServeFailed, match=rf"{url} does not answer: .*refused(.|\n)*make u"):
        bench_serve.look(url, KEY)


def refused(code: int, body: object, key: str = "") -> errors.StackError:
    stream = io.BytesIO(json.dumps(body).encode())
    error = urllib.error.HTTPError("http://x/v1/models", code, "Reason", Message(), stream)
    return bench_serve._refused("http://x", error, key)


def test_a_refused_key_is_told_and_not_shown() -> None:
    body = {"error": {"message": "a key is needed"}}
    without, other = refused(401, body), refused(401, body, KEY)
    assert isinstance(without, errors.SettingInvalid) and "wants a key" in str(without)
    assert "OPENAI_API_KEY" in without.action
    assert "does not know the key" in str(other) and KEY not in str(other)


def test_what_else_the_endpoint_says_is_told() -> None:
    assert "503 Reason: no replica" in str(refused(503, {"error": {"message": "no replica"}}))
    assert "404 Reason\n" in str(refused(404, "no error of OpenAI's form"))
    assert "KEY_RATE" in refused(429, {}).action


def test_a_key_that_is_none_is_refused_and_not_shown() -> None:
    with pytest.raises(errors.SettingInvalid) as told:
        bench_serve.look("http://127.0.0.1:1", f"{KEY}\nHost: evil")
    assert "OPENAI_API_KEY" in str(told.value) and KEY not in str(told.value)


def test_a_model_that_is_not_offered_or_too_small_is_refused() -> None:
    bench_serve.require_model({"a": 1024}, "a", 1024)
    bench_serve.require_model({"a": 0}, "a", 10**6)
    with pytest.raises(errors.SettingInvalid, match="SERVED_MODEL_NAME=a"):
        bench_serve.require_model({"a": 1024}, "b", 32)
    with pytest.raises(errors.SettingInvalid, match=r"1025 tokens(.|\n)*1024 at most"):
        bench_serve.require_model({"a": 1024}, "a", 1025)


# --- what comes of it ---


def result(concurrency: int, failures: list[str], completed: int) -> dict:
    """A result file of vLLM 0.32, abridged."""
    return {
        "date": "20261124-190909",
        "backend": "openai",
        "label": None,
        "num_prompts": 8,
        "request_rate": "inf",
        "max_concurrency": concurrency,
        "duration": 0.3669,
        "completed": completed,
        "failed": len(failures),
        "request_throughput": 21.804,
        "request_goodput": 20.5,
        "output_throughput": 348.864,
        "total_token_throughput": 708.63,
        "input_lens": [16] * 8,
        "ttfts": [0.0125] * 8,
        "itls": [[0.002] * 15] * 8,
        "latencies": [0.04] * 8,
        "queue_times": [0.0] * 8,
        "generated_texts": ["secret words"] * 8,
        "errors": [*failures, *[""] * completed],
        **{
            f"{part}_{name}_ms": base * factor
            for name, base in (("ttft", 10.25), ("tpot", 2.2), ("itl", 2.4), ("e2el", 45.0))
            for part, factor in (("mean", 1.1), ("median", 1), ("p50", 1), ("p99", 3))
        },
    }


def levels(*found: tuple[list[str], int]) -> list[dict]:
    sizes = (4**number for number in range(len(found)))
    return [bench_serve.level(result(size, *one)) for size, one in zip(sizes, found, strict=False)]


def document(found: list[dict], **slo: float) -> dict:
    return {
        "variant": "cpu",
        "machine": {"cpu": "AMD EPYC", "cpus": 2},
        "versions": {"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0"},
        "url": "http://127.0.0.1:8000",
        "served_model_name": "glm-4-9b-chat",
        "slo": slo,
        "levels": found,
    }


def test_a_level_is_vllms_result_without_its_lists_and_texts() -> None:
    (one,) = levels(([], 8))
    assert one["p99_ttft_ms"] == pytest.approx(30.75)
    assert one["max_concurrency"] == 1 and one["errors"] == {}
    assert not [name for name, part in one.items() if isinstance(part, list)]
    assert "secret words" not in json.dumps(one)


def test_errors_are_counted_by_their_last_line() -> None:
    traceback = "Traceback:\n  File\naiohttp.ClientPayloadError: broken off"
    (one,) = levels((["Too Many Requests", traceback, "Too Many Requests"], 5))
    expected = {"Too Many Requests": 2, "aiohttp.ClientPayloadError: broken off": 1}
    assert one["errors"] == expected and one["failed"] == 3


def test_the_table_has_a_line_for_each_level_and_tells_what_failed() -> None:
    text = bench_serve.table(
        document(
            levels(([], 8), (["Too Many Requests"] * 3, 5), (["Too Many Requests"] * 8, 0)),
            ttft=1000.0,
            tpot=50.0,
        )
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[3:6]]
    times = ["11.28 / 10.25 / 30.75", "2.42 / 2.20 / 6.60", "2.64 / 2.40 / 7.20"]
    assert rows[0] == ["1", "21.80", "348.86", "708.63", *times, "20.50", "0 of 8"]
    assert rows[1][0] == "4" and rows[1][-1] == "3 of 8"
    # vLLM's zeros for a level without an answer would look like a very fast server.
    assert rows[2] == ["16", "–", "–", "–", *["– / – / –"] * 3, "–", "8 of 8"]
    assert "goodput: requests/s with ttft ≤ 1000 ms, tpot ≤ 50 ms" in text
    assert "3 failed at 4 at once: Too Many Requests" in text
    assert "8 failed at 16 at once: Too Many Requests" in text


def test_a_level_without_an_answer_is_an_error() -> None:
    bench_serve.require_answers(levels(([], 8), (["Too Many Requests"] * 7, 1)))
    with pytest.raises(
        errors.StackError, match=r"at 4 at once no .*Too Many(.|\n)*KEY_RATE"
    ) as end:
        bench_serve.require_answers(levels(([], 8), (["Too Many Requests"] * 8, 0)))
    assert end.value.exit_code == 1


# --- the client ---


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_a_client_that_fails_or_hangs_is_told() -> None:
    bench_serve.run(python(""), 30)
    with pytest.raises(errors.ServeFailed, match="ended with code 3"):
        bench_serve.run(python("raise SystemExit(3)"), 30)
    with pytest.raises(errors.ServeFailed, match=r"took longer than 0.5 s"):
        bench_serve.run(python("import time; time.sleep(60)"), 0.5)


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path) -> None:
    def words(concurrency: int, path: Path) -> list[str]:
        text = json.dumps(result(concurrency, [], 8))
        return python(
            f"from pathlib import Path; Path({str(path)!r}).write_text({text!r})"
            if concurrency == 1
            else "raise SystemExit(3)"
        )

    found, failure = bench_serve._measure_all(options("--concurrency", "1,4,16"), words, tmp_path)
    assert [one["max_concurrency"] for one in found] == [1]
    assert "ended with code 3" in str(failure)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_client_too(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    mark = tmp_path / "pid"
    child = python(
        f"import os, time; from pathlib import Path; Path({str(mark)!r}).write_text("
        "str(os.getpid())); time.sleep(100)"
    )
    script = (
        "from scripts import bench_serve, errors;"
        " errors.end_on_sigterm();"
        f" errors.run(lambda: bench_serve.run({child!r}, 90))"
    )
    process = subprocess.Popen(
        python(script),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(lambda: mark.exists() and mark.read_text(), 30, "a client")
        process.send_signal(number)
        assert process.wait(timeout=30) == code, process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_another_tokenizer_is_a_folder_or_a_model_of_the_volume(tmp_path: Path) -> None:
    models, other = tmp_path / "models", tmp_path / "other"
    (models / "a" / "b").mkdir(parents=True)
    other.mkdir()
    settings = Settings.from_environ({"MODELS_DIR": str(models)})
    assert bench_serve._folder(settings, str(other)) == other
    assert bench_serve._folder(settings, "a/b") == models / "a" / "b"
    with pytest.raises(errors.SettingInvalid, match="--tokenizer c/d"):
        bench_serve._folder(settings, "c/d")
    with pytest.raises(errors.SnapshotMissing):
        bench_serve._folder(settings, None)
