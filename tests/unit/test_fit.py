"""What fits on a card, against what vLLM itself said on one."""

import dataclasses
from pathlib import Path

import pytest

from scripts import errors, fit, presets, variants
from scripts.fit import Shape
from scripts.gpu import Gpu
from scripts.settings import Settings

GIB = 1 << 30
# https://modelscope.cn/models/ZhipuAI/glm-4-9b-chat, config.json
GLM4 = {
    "num_layers": 40,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 151552,
    "seq_length": 131072,
    "torch_dtype": "bfloat16",
}
SHAPE = Shape.parse(GLM4)
# vLLM's own "Model loading took 17.56 GiB".
WEIGHTS = int(17.56 * GIB)
# As CUDA sees them (torch.cuda.mem_get_info).
H100, RTX4090, T4 = int(79.18 * GIB), int(23.64 * GIB), int(14.75 * GIB)


def card(total: int, name: str = "card", capability=(9, 0), free: int | None = None) -> Gpu:
    return Gpu(0, name, capability, total, total if free is None else free)


def variant(name: str):
    return variants.load()[name]


@pytest.mark.parametrize(
    ("name", "environ", "measured"),
    [
        # "# GPU blocks: …" of 16 tokens; vLLM 0.6.3.post1, bfloat16.
        ("cu121", {"GPU_MEMORY_UTILIZATION": "0.5"}, 530_624),
        ("cu121", {"GPU_MEMORY_UTILIZATION": "0.27"}, 53_216),
        ("cu121", {}, 1_360_864),
        ("cu121", {"VLLM_ARGS": "--kv-cache-dtype fp8"}, 2_721_744),
        ("cu121", {"QUANTIZATION": "fp8"}, 1_550_912),
        ("cu121", {"VLLM_ARGS": "--enable-chunked-prefill=False"}, 1_345_760),
        (
            "cu121",
            {"VLLM_ARGS": "--enable-chunked-prefill=False", "MAX_MODEL_LEN": "32768"},
            1_280_896,
        ),
        # "GPU KV cache size: … tokens"; vLLM 0.32.0, bfloat16.
        ("cu130", {"GPU_MEMORY_UTILIZATION": "0.5"}, 495_488),
        ("cu130", {}, 1_325_744),
        ("cu130", {"VLLM_ARGS": "--kv-cache-dtype fp8"}, 2_640_528),
        ("cu130", {"QUANTIZATION": "fp8"}, 1_524_800),
    ],
)
def test_the_sum_is_what_vllm_said_on_an_h100_and_a_little_less(
    name: str, environ: dict[str, str], measured: int
) -> None:
    # tests/gpu asks a real one again.
    _, lines = resolve(card(H100), VARIANT=name, **{"MAX_MODEL_LEN": "8192", **environ})
    [tokens] = [int(line.split()[-2]) for line in lines if line.startswith("/ ")]
    assert 0.95 * measured < tokens <= measured


def test_24_gb_hold_what_was_published() -> None:
    # 53,376 tokens of cache were reported for GLM-4-9B-chat in bfloat16 on 24 GB.
    low, high = (
        fit.compute(SHAPE, WEIGHTS, RTX4090, variant("cu121"), share=share, pieces=True).tokens
        for share in (0.90, 0.95)
    )
    assert 0.9 * 53_376 < low < 53_376 < high
    # The original recipe allowed 2,048.
    assert resolve(card(RTX4090, capability=(8, 9)))[0].max_model_len > 23 * 2048
    assert resolve(card(RTX4090, capability=(8, 9)), VARIANT="cu130")[0].max_model_len > 15 * 2048


def test_fp8_halves_all_but_the_embeddings_and_is_offered_where_it_helps() -> None:
    ends = 2 * 151552 * 4096 * 2
    assert SHAPE.in_fp8(WEIGHTS) == (WEIGHTS - ends) // 2 + ends
    _, lines = resolve(card(RTX4090, capability=(8, 9)), VARIANT="cu130")
    assert "QUANTIZATION=fp8 would make it 131072 tokens" in lines
    found, lines = resolve(card(RTX4090, capability=(8, 9)), VARIANT="cu130", QUANTIZATION="fp8")
    assert found.max_model_len == 131072 and not any("would make" in line for line in lines)


def test_a_tokens_cache_has_40_kib() -> None:
    assert SHAPE.token_bytes(2, 1) == 40 * 1024
    assert SHAPE.token_bytes(1, 1) == 20 * 1024
    assert SHAPE.token_bytes(2, 2) == 20 * 1024
    # Two KV heads on four cards: each has one.
    assert SHAPE.token_bytes(2, 4) == 20 * 1024


def test_the_sum_can_be_checked_by_hand() -> None:
    found = fit.compute(SHAPE, WEIGHTS, RTX4090, variant("cu130"))
    room = sum(size for _, size in found.terms)
    assert found.tokens == room // found.token // 16 * 16
    text = "\n".join(found.lines())
    for part in ("0.90 of the card's 23.64 GiB", "weights", "17.56 GiB", "40960 bytes a token"):
        assert part in text


@pytest.mark.parametrize("name", ["cu118", "cu121", "cu130"])
@pytest.mark.parametrize("total", [RTX4090, H100, int(39.4 * GIB), int(31.7 * GIB)])
def test_the_context_is_never_above_the_cache_or_the_models_limit(name: str, total: int) -> None:
    found = fit.compute(SHAPE, WEIGHTS, total, variant(name))
    assert found.context <= min(found.tokens, SHAPE.longest)
    assert found.context == SHAPE.longest or found.context % 256 == 0


def test_keys_of_transformers_and_latent_attention_are_read() -> None:
    llama = Shape.parse(
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        }
    )
    assert (llama.kv_heads, llama.head_size) == (8, 128)
    assert llama.token_bytes(2, 1) == 2 * 32 * 8 * 128 * 2
    latent = Shape.parse({**GLM4, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert latent.token_bytes(2, 1) == 40 * 576 * 2
    with pytest.raises(errors.SettingInvalid, match="num_hidden_layers"):
        Shape.parse({k: v for k, v in GLM4.items() if k != "num_layers"})


def test_a_model_of_an_unknown_kind_is_served_with_what_is_set(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(errors.SettingInvalid, match="set MAX_MODEL_LEN"):
        fit.of_folder(Settings.from_environ({}), [card(H100)], tmp_path, WEIGHTS)
    settings = Settings.from_environ({"MAX_MODEL_LEN": "2048"})
    found, lines = fit.of_folder(settings, [card(H100)], tmp_path, WEIGHTS)
    assert (found.max_model_len, found.tensor_parallel_size) == (2048, 1)
    assert lines[0].startswith("no sum: config.json")


def resolve(*gpus: Gpu, weights: int = WEIGHTS, step: int = 0, **environ: str):
    settings = Settings.from_environ({"VARIANT": "cu121", **environ})
    return fit.resolve(settings, list(gpus), SHAPE, weights, step)


def test_auto_finds_a_value_for_everything() -> None:
    found, lines = resolve(card(RTX4090, capability=(8, 9)))
    assert found.dtype == "bfloat16" and found.tensor_parallel_size == 1
    assert found.gpu_memory_utilization == 0.9 and found.max_model_len > 15_000
    assert lines[-1].startswith("so: bfloat16, MAX_MODEL_LEN=")


def test_a_card_without_bfloat16_gets_float16() -> None:
    v100 = card(int(31.7 * GIB), capability=(7, 0))
    assert resolve(v100)[0].dtype == "float16"


def test_what_the_user_sets_stays() -> None:
    found, _ = resolve(
        card(H100), MAX_MODEL_LEN="4096", GPU_MEMORY_UTILIZATION="0.5", DTYPE="float16"
    )
    assert (found.max_model_len, found.gpu_memory_utilization) == (4096, 0.5)
    assert found.dtype == "float16"


def test_the_sum_is_for_the_context_that_is_set() -> None:
    whole = "--enable-chunked-prefill=False"
    _, lines = resolve(card(H100), MAX_MODEL_LEN="8192", VLLM_ARGS=whole)
    assert any("working memory for 8192 tokens" in line for line in lines)
    assert any("= 134" in line and "tokens" in line for line in lines)


def test_a_context_that_does_not_fit_is_warned_of() -> None:
    _, lines = resolve(card(RTX4090, capability=(8, 9)), MAX_MODEL_LEN="131072")
    assert any("MAX_MODEL_LEN=131072 is more than fits" in line for line in lines)


def test_a_card_that_others_use_gives_what_is_free() -> None:
    found, _ = resolve(card(H100, free=40 * GIB))
    assert found.gpu_memory_utilization == 0.50


def test_two_small_cards_share_a_model_that_one_cannot_hold() -> None:
    found, _ = resolve(card(T4, capability=(7, 5)), card(T4, capability=(7, 5)))
    assert found.tensor_parallel_size == 2 and found.dtype == "float16"
    assert found.max_model_len >= 4096


def test_a_model_that_does_not_fit_is_refused_with_the_sum_and_a_smaller_one() -> None:
    with pytest.raises(errors.GpuMemoryShort) as caught:
        resolve(card(T4, "Tesla T4", (7, 5)))
    for text in ("Tesla T4", "- weights", "17.56 GiB", "MODEL=glm-4-9b-chat-int4 ("):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", list(presets.load()))
def test_every_preset_fits_a_24_gb_card_or_says_why_not(name: str) -> None:
    preset = presets.named(name)
    settings = Settings.from_environ({"MODEL": name, "VARIANT": "cu130"})
    assert settings.model_id == preset.model_id and settings.served_model_name == name
    assert settings.trust_remote_code == preset.trust_remote_code
    gpus = [card(RTX4090, capability=(8, 9))]
    found, _ = fit.resolve(settings, gpus, Shape.parse(preset.config), preset.weights)
    assert found.max_model_len > 8192
    assert preset.stop_token_ids == (151329, 151336, 151338)


def test_a_model_too_new_for_the_variant_is_refused_with_one_that_has_it() -> None:
    with pytest.raises(errors.SettingInvalid, match=r"0\.8\.5 or newer[\s\S]*CUDA=118 or 130"):
        variants.require_model(variants.load()["cu121"], "ZhipuAI/GLM-4-9B-0414")


def test_two_names_for_a_model_are_refused() -> None:
    with pytest.raises(errors.SettingInvalid, match="MODEL=glm-4-9b-chat and MODEL_ID=a/b"):
        Settings.from_environ({"MODEL": "glm-4-9b-chat", "MODEL_ID": "a/b"})
    with pytest.raises(errors.SettingInvalid, match="glm-4-9b-chat-int4"):
        Settings.from_environ({"MODEL": "gpt-5"})


@pytest.mark.parametrize("count", ["2", "3"])
def test_gpus_that_cannot_share_the_model_are_refused(count: str) -> None:
    with pytest.raises(errors.GpuUnsupported, match=f"TENSOR_PARALLEL_SIZE={count}.*32 attention"):
        resolve(card(H100), *[card(H100)] * (2 if count == "3" else 0), TENSOR_PARALLEL_SIZE=count)


def test_failed_starts_take_a_shorter_context_and_then_a_smaller_share() -> None:
    found = [resolve(card(RTX4090, capability=(8, 9)), step=step)[0] for step in (0, 1, 2)]
    contexts = [settings.max_model_len for settings in found]
    assert contexts[1] == contexts[0] // 2 and contexts[2] < contexts[1]
    shares = [settings.gpu_memory_utilization for settings in found]
    assert shares == [0.9, 0.9, pytest.approx(0.86)]
    # What the user set is what is tried.
    set_by_hand = resolve(card(H100), step=2, MAX_MODEL_LEN="4096", GPU_MEMORY_UTILIZATION="0.5")
    assert set_by_hand[0].max_model_len == 4096
    assert set_by_hand[0].gpu_memory_utilization == 0.5


def test_the_old_engine_takes_prompts_in_pieces_where_the_card_can_and_nobody_decided() -> None:
    found = resolve(card(H100))[0]
    assert found.max_model_len == 131072
    assert found.vllm_args[0] == "--enable-chunked-prefill"
    for whole in (
        resolve(card(H100), VLLM_ARGS="--enable-chunked-prefill=False")[0],
        resolve(card(H100, capability=(7, 0)))[0],
    ):
        assert whole.max_model_len == 32768
        assert "--max-num-batched-tokens" not in whole.vllm_args
    assert resolve(card(H100), VARIANT="cu130")[0].max_model_len == 131072


def test_a_cpu_and_a_part_of_a_card_that_tells_nothing_get_a_modest_context() -> None:
    assert resolve(VARIANT="cpu")[0].max_model_len == 8192
    assert resolve(card(0))[0].max_model_len == 8192
    tiny = dataclasses.replace(SHAPE, longest=1024)
    settings = Settings.from_environ({"VARIANT": "cpu"})
    assert fit.resolve(settings, [], tiny, WEIGHTS)[0].max_model_len == 1024
