"""Writes crates/metal-candle/tests/golden/families: a tiny model of each family with logits, gradients and greedy tokens.

    python dev/reference_families.py [NAME ...]

The README.md of the golden folder describes each file. Values come from transformers (eager attention, f32) and peft.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from families import NO_MAMBA, build_config, greedy_tokens, make_model, next_token_loss, wrap_all_linear

FOLDER = Path(__file__).resolve().parent.parent / "crates" / "metal-candle" / "tests" / "golden" / "families"
COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, tie_word_embeddings=False,
)
SLIDING, FULL = "sliding_attention", "full_attention"
# At these sizes, a released yarn does not rotate the slowest pairs; this one blends pairs 1 to 3 of 8.
YARN = dict(rope_type="yarn", rope_theta=8e3, factor=4.0, original_max_position_embeddings=400)
LLAMA3 = dict(rope_type="llama3", rope_theta=8e3, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=3e3, factor=4.0)
PLAIN = dict(rope_type="default", rope_theta=500.0)
MULTIPLIERS = dict(embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5)
LONGROPE = dict(
    rope_type="longrope", rope_theta=2e3, short_factor=[1.0, 1.3, 2.1, 3.7], long_factor=[1.4, 2.6, 5.1, 9.3], partial_rotary_factor=0.5, factor=3.0
)

CASES = {
    "qwen2-window": dict(model_type="qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2-yarn": dict(model_type="qwen2", head_dim=16, tie_word_embeddings=True, max_position_embeddings=1600, rope_parameters=YARN | dict(truncate=False)),
    "qwen3": dict(model_type="qwen3", head_dim=16, num_hidden_layers=3, attention_bias=True, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "llama-llama3": dict(model_type="llama", head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama-linear": dict(model_type="llama", num_key_value_heads=None, tie_word_embeddings=True, rope_parameters=LINEAR),
    "llama-dynamic": dict(model_type="llama", max_position_embeddings=16, rope_parameters=LINEAR | dict(rope_type="dynamic")),
    "llama-yarn": dict(model_type="llama", head_dim=16, max_position_embeddings=1600, rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=0.5, attention_factor=1.2)),
    "mistral": dict(model_type="mistral", head_dim=16, sliding_window=4, rope_parameters=PLAIN),
    "ministral": dict(model_type="ministral", num_hidden_layers=3, head_dim=16, sliding_window=4, layer_types=[SLIDING, FULL, SLIDING]),
    "ministral3": dict(
        model_type="ministral3", head_dim=16, sliding_window=None,
        rope_parameters=YARN | dict(
            rope_theta=1e3, original_max_position_embeddings=8, max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0, llama_4_scaling_beta=0.3
        ),
    ),
    "ministral3-window": dict(
        model_type="ministral3", head_dim=8, sliding_window=4, num_hidden_layers=2,
        rope_parameters=PLAIN | dict(llama_4_scaling_beta=0.2, original_max_position_embeddings=6),
    ),
    "smollm3": dict(
        model_type="smollm3", num_hidden_layers=3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, no_rope_layers=[1, 0, 1],
        use_sliding_window=True, sliding_window=4,
    ),
    "phi3-long": dict(model_type="phi3", original_max_position_embeddings=16, rope_parameters=LONGROPE | dict(short_factor=[1.0, 1.3], long_factor=[1.9, 4.1])),
    "phi3-short": dict(
        model_type="phi3", hidden_size=64, intermediate_size=40, original_max_position_embeddings=40, sliding_window=4, rope_parameters=LONGROPE
    ),
    "phi3-partial": dict(model_type="phi3", tie_word_embeddings=True, rope_parameters=PLAIN | dict(partial_rotary_factor=0.75)),
    "olmo": dict(model_type="olmo", attention_bias=True, clip_qkv=1.5),
    "olmo2": dict(model_type="olmo2", attention_bias=True, rope_parameters=PLAIN),
    "olmo3": dict(
        model_type="olmo3", num_hidden_layers=3, attention_bias=True, sliding_window=4, layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={SLIDING: dict(rope_type="default", rope_theta=1e3), FULL: YARN | dict(original_max_position_embeddings=64)},
    ),
    "granite": dict(model_type="granite", attention_bias=True, mlp_bias=True, rope_parameters=LINEAR, **MULTIPLIERS),
    "granitemoehybrid-rope": dict(
        model_type="granitemoehybrid", attention_bias=True, shared_intermediate_size=40, layer_types=[FULL] * 2, position_embedding_type="rope",
        **MULTIPLIERS, **NO_MAMBA,
    ),
    "granitemoehybrid-nope": dict(
        model_type="granitemoehybrid", tie_word_embeddings=True, shared_intermediate_size=40, layer_types=[FULL] * 2, position_embedding_type=None,
        **MULTIPLIERS, **NO_MAMBA,
    ),
    "starcoder2": dict(model_type="starcoder2", use_bias=True, sliding_window=4, tie_word_embeddings=True, rope_parameters=PLAIN),
    "gemma": dict(model_type="gemma", head_dim=16, attention_bias=True, tie_word_embeddings=True, hidden_act="gelu", rope_parameters=PLAIN),
    "gemma2": dict(
        model_type="gemma2", head_dim=8, attention_bias=True, tie_word_embeddings=True, sliding_window=4, query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
    ),
    "gemma3-text": dict(
        model_type="gemma3_text", num_hidden_layers=3, head_dim=16, attention_bias=True, tie_word_embeddings=True, sliding_window=4,
        layer_types=[SLIDING, FULL, SLIDING], query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        rope_parameters={SLIDING: dict(rope_type="default", rope_theta=1e2), FULL: LINEAR},
    ),
    "gemma3-multimodal": dict(
        model_type="gemma3", num_hidden_layers=2, head_dim=8, tie_word_embeddings=True, sliding_window=4, layer_types=[SLIDING, FULL],
        query_pre_attn_scalar=16, rope_parameters={SLIDING: dict(rope_type="default", rope_theta=1e2), FULL: LINEAR},
    ),
    "glm": dict(model_type="glm", head_dim=16, attention_bias=True),
    "glm4": dict(model_type="glm4", head_dim=16, attention_bias=True, rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)),
    "cohere": dict(model_type="cohere", use_qk_norm=True, attention_bias=True, logit_scale=0.25, tie_word_embeddings=True),
    "cohere2": dict(
        model_type="cohere2", num_hidden_layers=3, attention_bias=True, logit_scale=0.25, tie_word_embeddings=True, sliding_window=4,
        layer_types=[SLIDING, FULL, SLIDING],
    ),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1, rope_parameters=PLAIN),
    "mistral3-multimodal": dict(model_type="mistral3", head_dim=8, sliding_window=4, rope_parameters=PLAIN),
    "arcee": dict(model_type="arcee", head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=YARN | dict(truncate=None)),
    "exaone4": dict(
        model_type="exaone4", num_hidden_layers=3, head_dim=16, sliding_window=4, layer_types=[SLIDING, FULL, SLIDING], rope_parameters=LLAMA3,
    ),
    "seed_oss": dict(model_type="seed_oss", num_key_value_heads=1, head_dim=16, attention_bias=False, attention_out_bias=True, mlp_bias=True),
    "ernie4_5": dict(model_type="ernie4_5", head_dim=16, use_bias=True, tie_word_embeddings=True, rope_parameters=PLAIN),
    "helium": dict(model_type="helium", head_dim=8, attention_bias=True, mlp_bias=True, rope_parameters=PLAIN),
    "hunyuan_v1_dense": dict(
        model_type="hunyuan_v1_dense", head_dim=16, attention_bias=True, rope_parameters=dict(rope_type="dynamic", rope_theta=1e2, factor=1.0, alpha=30.0),
    ),
    "llama-original": dict(model_type="llama", original_max_position_embeddings=16, rope_parameters=LLAMA3),
    "cohere2-heads": dict(model_type="cohere2", head_dim=16, sliding_window=4, tie_word_embeddings=True, layer_types=[SLIDING, FULL]),
    "stablelm": dict(model_type="stablelm", use_qkv_bias=True, rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)),
    "stablelm-parallel": dict(model_type="stablelm", num_attention_heads=2, num_key_value_heads=1, use_parallel_residual=True, tie_word_embeddings=True),
    "jais2": dict(model_type="jais2", head_dim=16, rope_parameters=PLAIN),
    # 7 of 14 elements, so 4 pairs
    "glm4-odd": dict(model_type="glm4", head_dim=14, rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)),
}
# Replacements in config.json, equivalent for transformers: the key next to the settings takes precedence.
FILES = {"llama-original": dict(rope_parameters=LLAMA3)}
# The index of a case is its seed, so add new cases at the end.
LENGTH, PROMPT, GENERATED = 24, 8, 16
# A test must not depend on two nearly equal logits.
SMALLEST_LEAD = 5e-3


def saved_files(model):
    """The text of config.json and the tensors, as transformers saves them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return (Path(folder) / "config.json").read_text(), tensors


def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


def make_case(name, keys, seed):
    config = build_config(**(COMMON | keys))
    model = make_model(config, seed)
    ids = torch.randint(0, config.get_text_config().vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()
    text, weights = saved_files(model)
    text = json.dumps(json.loads(text) | FILES.get(name, {}), indent=2) + "\n"
    with torch.no_grad():
        logits = logits_of(model, ids)
    greedy, lead = greedy_tokens(model, ids[:PROMPT], GENERATED)
    if lead < SMALLEST_LEAD:
        return None
    out = {f"weight.{key}": tensor.bfloat16() for key, tensor in weights.items()}
    out |= dict(ids=torch.tensor(ids), logits=logits, loss=next_token_loss(logits, ids), greedy=torch.tensor(greedy))
    wrapped = wrap_all_linear(model, rank=2, alpha=4, seed=seed + 1)
    lora_loss = next_token_loss(logits_of(wrapped, ids), ids)
    lora_loss.backward()
    out["lora_loss"] = lora_loss
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            path, letter = key.removeprefix("base_model.model.").removesuffix(".default.weight").split(".lora_")
            out[f"lora_{letter.lower()}.{path}"] = parameter
            out[f"grad_{letter.lower()}.{path}"] = parameter.grad
    FOLDER.mkdir(exist_ok=True)
    out = {key: (tensor.to(torch.uint32) if tensor.dtype == torch.int64 else tensor).detach().contiguous().clone() for key, tensor in out.items()}
    save_file(out, FOLDER / f"{name}.safetensors", metadata={"config.json": text})
    return dict(loss=out["loss"].item(), largest=logits.abs().max().item(), lead=lead, linears=sum(key.startswith("lora_a.") for key in out))


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for number, (name, keys) in enumerate(CASES.items()):
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        seed = 1000 * (number + 1)
        while (summary := make_case(name, keys, seed)) is None:
            seed += 10
        size = (FOLDER / f"{name}.safetensors").stat().st_size
        print(f"{name:<24} {size:>8} bytes  " + "  ".join(f"{key} {value:.4g}" for key, value in summary.items()), flush=True)


if __name__ == "__main__":
    main()
