"""The load test measures the running gateway as its clients see it, and says why when it cannot."""

import base64
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.conftest import Gateway
from tests.stacks import ROOT, free_port

pytestmark = pytest.mark.docker

SMALL = ("--num-prompts", "8", "--input-len", "16", "--output-len", "16")


def bench(
    gateway: Gateway, *words: str, volume: str = "", **environ: str
) -> subprocess.CompletedProcess:
    """Run the one-shot; unlike in Done its two outputs are apart, for one of them is the result."""
    command = ["docker", "compose", "--env-file", "rehearsal.env", "run", "--rm", "-T"]
    command += ["--volume", volume] if volume else []
    return subprocess.run(
        [*command, "bench-serve", *words, *SMALL],
        cwd=ROOT,
        env={**os.environ, **gateway.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_gateway_is_measured_at_each_concurrency(gateway: Gateway) -> None:
    done = bench(gateway, "--concurrency", "1,4")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["job"] == "bench-serve" and found["url"] == gateway.url
    assert found["model"]["id"] == "rehearsal/glm-4-tiny"
    assert found["slo"] == {"ttft": 1000, "tpot": 50}
    assert [level["max_concurrency"] for level in found["levels"]] == [1, 4]
    for level in found["levels"]:
        assert (level["completed"], level["failed"], level["errors"]) == (8, 0, {})
        assert level["total_output_tokens"] == 8 * 16
        assert 0 < level["p50_ttft_ms"] <= level["p99_ttft_ms"]
        assert level["mean_tpot_ms"] > 0 and level["mean_itl_ms"] > 0
        assert level["request_throughput"] > 0
        assert level["request_goodput"] is not None
    # Beside vLLM's own progress, a table for people.
    assert "| at once | requests/s |" in done.stderr
    assert done.stderr.count("| 0 of 8 |") == 2


def test_a_wrong_url_is_told(gateway: Gateway) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = bench(gateway, "--url", url)
    assert (done.returncode, done.stdout) == (12, "")
    assert f"error: {url} does not answer" in done.stderr and "make up" in done.stderr


@pytest.fixture
def key(gateway: Gateway) -> Iterator[str]:
    """A key, while the test runs."""
    done = gateway.compose("run", "--rm", "key", "add", "bench").check()
    yield next(line for line in done.output.splitlines() if line.startswith("sk-"))
    gateway.compose("run", "--rm", "key", "revoke", "bench").check()


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(gateway: Gateway, key: str) -> None:
    without = bench(gateway, "--concurrency", "2")
    assert (without.returncode, without.stdout) == (2, "")
    assert "wants a key" in without.stderr and "OPENAI_API_KEY" in without.stderr
    done = bench(gateway, "--concurrency", "2", OPENAI_API_KEY=key)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["levels"][0]["completed"] == 8
    assert key not in done.stdout + done.stderr


# As GLM-4's own tokenizer: code that knows nothing of an argument of today's transformers.
OLD_CODE = """
import base64
from transformers import PreTrainedTokenizer

class OldTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file) as lines:
            pairs = [line.split() for line in lines]
        self.ranks = {base64.b64decode(token).decode("latin-1"): int(rank) for token, rank in pairs}
        self.tokens = {rank: token for token, rank in self.ranks.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.ranks)

    def get_vocab(self):
        return dict(self.ranks)

    def _tokenize(self, text, **kwargs):
        return list(text.encode().decode("latin-1"))

    def _convert_token_to_id(self, token):
        return self.ranks[token]

    def _convert_id_to_token(self, index):
        return self.tokens[index]

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None,
             pad_to_multiple_of=None, return_attention_mask=None):
        return encoded_inputs
"""


@pytest.fixture
def old_tokenizer() -> Iterator[Path]:
    """A folder with such a tokenizer; not below pytest's own, which another user cannot read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "tokenization_old.py").write_text(OLD_CODE)
        lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
        (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
        config = {"auto_map": {"AutoTokenizer": ["tokenization_old.OldTokenizer", None]}}
        config |= {"tokenizer_class": "OldTokenizer"}
        config["added_tokens_decoder"] = {"256": {"content": "<|endoftext|>", "special": True}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
        yield folder


def test_a_tokenizer_too_old_for_the_client_gives_its_vocabulary(
    gateway: Gateway, old_tokenizer: Path
) -> None:
    words = ("--concurrency", "2", "--tokenizer", "/old")
    done = bench(gateway, *words, volume=f"{old_tokenizer}:/old:ro", TRUST_REMOTE_CODE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "padding_side'); its vocabulary is used without its code" in done.stderr
    found = json.loads(done.stdout)
    assert found["tokenizer"] == {"folder": "/old", "without_its_code": True}
    assert found["levels"][0]["completed"] == 8
