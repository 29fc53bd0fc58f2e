"""Make transformers' own model of a snapshot, also of one in ChatGLM's original layout.

The code that such a snapshot brings fails under newer transformers; transformers' Glm is the same
architecture under other names (convert_glm_weights_to_hf.py of transformers has them).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NAMES = (
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.encoder.layers.", "model.layers."),
    ("transformer.output_layer.", "lm_head."),
    (".self_attention.dense.", ".self_attn.o_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.gate_up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
)
_FUSED = ".self_attention.query_key_value."


def load(where: Path, dtype: "torch.dtype", device: str, *, dummy: bool, trust: bool) -> Any:
    """Return the model of folder `where` on a device, ready to generate, with PyTorch's attention.

    `dummy` leaves the weights random; `trust` lets the model's own code run.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    document = json.loads((where / "config.json").read_text(encoding="utf-8"))
    original = document.get("model_type") == "chatglm"
    sdpa = {"attn_implementation": "sdpa"}
    if not original and not dummy:
        known = {"torch_dtype": dtype, "trust_remote_code": trust, **sdpa}
        return AutoModelForCausalLM.from_pretrained(where, **known).to(device).eval()
    config = _glm(document) if original else AutoConfig.from_pretrained(where)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, **sdpa)
    finally:
        torch.set_default_dtype(before)
    model = model.to(dtype).eval()
    if not dummy:
        _fill(model, where, config)
    return model


def _glm(document: dict[str, Any]) -> Any:
    """Return transformers' configuration of ChatGLM's config.json."""
    import transformers

    theta = 10000.0 * document.get("rope_ratio", 1)
    rotary = {"rope_theta": theta, "partial_rotary_factor": 0.5}
    if int(transformers.__version__.split(".")[0]) >= 5:
        rotary = {"rope_parameters": {"rope_type": "default", **rotary}}
    return transformers.GlmConfig(
        vocab_size=document["padded_vocab_size"],
        hidden_size=document["hidden_size"],
        intermediate_size=document["ffn_hidden_size"],
        num_hidden_layers=document["num_layers"],
        num_attention_heads=document["num_attention_heads"],
        num_key_value_heads=document["multi_query_group_num"],
        head_dim=document["kv_channels"],
        attention_bias=document["add_qkv_bias"],
        rms_norm_eps=document["layernorm_epsilon"],
        max_position_embeddings=document["seq_length"],
        eos_token_id=document["eos_token_id"],
        pad_token_id=document["pad_token_id"],
        tie_word_embeddings=False,
        **rotary,
    )


def _fill(model: Any, where: Path, config: Any) -> None:
    """Copy ChatGLM's weights into transformers' names; raise KeyError if one is left without."""
    import torch
    from safetensors import safe_open

    wanted = dict(model.named_parameters())
    sizes = [
        heads * config.head_dim
        for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    ]
    with torch.no_grad():
        for file in sorted(where.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    if name.endswith("inv_freq"):
                        continue
                    tensor = stored.get_tensor(name)
                    for old, new in _NAMES:
                        name = name.replace(old, new)
                    if _FUSED not in name:
                        wanted.pop(name).copy_(tensor)
                        continue
                    for part, letter in zip(tensor.split(sizes), "qkv", strict=True):
                        wanted.pop(name.replace(_FUSED, f".self_attn.{letter}_proj.")).copy_(part)
    if wanted:
        raise KeyError(f"the snapshot has no {', '.join(sorted(wanted))}")
