"""Compares the logits of GGUF files of llama.cpp's converter in a built `metal-candle` with those of the source models in transformers.

    python dev/check_gguf.py BINARY LLAMA_CPP [NAME ...]

LLAMA_CPP is a source tree of llama.cpp, for its `convert_hf_to_gguf.py`. Each model is tiny and random, converted to f32 without a tokenizer.
Prints a table; exits with 1 if anything differs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# an installed package with the same name may be older than the source tree
LLAMA_CPP = next((argument for argument in sys.argv[1:] if (Path(argument) / "gguf-py").is_dir()), "")
sys.path[:0] = [str(Path(LLAMA_CPP) / "gguf-py"), LLAMA_CPP]

import torch
from safetensors.torch import load_file

from families import NO_MAMBA, build_config, make_model

TOLERANCE = 1e-4
SLIDING, FULL = "sliding_attention", "full_attention"
PLAIN = dict(rope_type="default", rope_theta=500.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", rope_theta=8e3, factor=4.0, original_max_position_embeddings=400)
LINEAR = dict(rope_type="linear", rope_theta=3e3, factor=4.0)
COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, tie_word_embeddings=False,
)
CASES = {
    "llama": dict(model_type="llama", rope_parameters=PLAIN),
    "llama-tied": dict(model_type="llama", head_dim=32, num_key_value_heads=None, tie_word_embeddings=True, rope_parameters=LINEAR),
    "llama-llama3": dict(model_type="llama", head_dim=64, max_position_embeddings=131072, rope_parameters=LLAMA3),
    "llama-yarn": dict(model_type="llama", head_dim=16, max_position_embeddings=1600, rope_parameters=YARN),
    "mistral": dict(model_type="mistral", head_dim=16, sliding_window=None, rope_parameters=PLAIN),
    "qwen2": dict(model_type="qwen2", rope_parameters=PLAIN),
    "qwen2-yarn": dict(model_type="qwen2", tie_word_embeddings=True, max_position_embeddings=1600, rope_parameters=YARN),
    "qwen3": dict(model_type="qwen3", head_dim=32, rope_parameters=PLAIN),
    "gemma": dict(model_type="gemma", head_dim=16, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
    "gemma2": dict(
        model_type="gemma2", head_dim=16, tie_word_embeddings=True, sliding_window=4, query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text", num_hidden_layers=7, head_dim=16, tie_word_embeddings=True, sliding_window=4, query_pre_attn_scalar=16,
        layer_types=[SLIDING] * 5 + [FULL, SLIDING],
        rope_parameters={SLIDING: dict(rope_type="default", rope_theta=1e4), FULL: LINEAR},
    ),
    "phi3": dict(model_type="phi3", rope_parameters=PLAIN | dict(partial_rotary_factor=1.0), original_max_position_embeddings=64),
    "smollm3": dict(model_type="smollm3", num_hidden_layers=5, tie_word_embeddings=True, no_rope_layers=[1, 1, 1, 0, 1]),
    "granite": dict(
        model_type="granite", rope_parameters=PLAIN, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5
    ),
    "olmo2": dict(model_type="olmo2", rope_parameters=PLAIN),
    "olmo": dict(model_type="olmo", rope_parameters=PLAIN, clip_qkv=0.7),
    "olmo3": dict(model_type="olmo3", num_hidden_layers=5, sliding_window=4, rope_parameters=dict(YARN), max_position_embeddings=1600),
    "starcoder2": dict(model_type="starcoder2", rope_parameters=PLAIN, tie_word_embeddings=True, sliding_window=None),
    "cohere": dict(model_type="cohere", rope_parameters=PLAIN, tie_word_embeddings=True, logit_scale=0.25, use_qk_norm=True),
    "cohere2": dict(
        model_type="cohere2", num_hidden_layers=5, head_dim=16, rope_parameters=PLAIN, tie_word_embeddings=True, sliding_window=4, logit_scale=0.25,
        rotary_pct=1.0,
    ),
    "glm4": dict(model_type="glm4", head_dim=16, rope_parameters=PLAIN | dict(partial_rotary_factor=0.5), attention_bias=True),
    # the converter writes an epsilon of 1e-5 and a rotary base of 10,000, whatever the model's
    "glm": dict(
        model_type="glm", head_dim=16, rope_parameters=PLAIN | dict(rope_theta=1e4, partial_rotary_factor=0.5), attention_bias=True, rms_norm_eps=1e-5
    ),
    "arcee": dict(model_type="arcee", head_dim=16, rope_parameters=dict(YARN), max_position_embeddings=1600),
    "ernie4_5": dict(model_type="ernie4_5", head_dim=32, rope_parameters=PLAIN, tie_word_embeddings=True),
    "exaone4": dict(
        model_type="exaone4", head_dim=16, sliding_window=None, layer_types=[FULL] * 2, max_position_embeddings=131072, rope_parameters=LLAMA3
    ),
    # llama.cpp has windows in models of this number of layers only
    "exaone4-window": dict(model_type="exaone4", num_hidden_layers=64, head_dim=16, sliding_window=4, rope_parameters=PLAIN),
    "hunyuan_v1_dense": dict(
        model_type="hunyuan_v1_dense", head_dim=32, max_position_embeddings=32768,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=1.0, alpha=30.0),
    ),
    "ministral3": dict(
        model_type="ministral3", head_dim=32, sliding_window=None, max_position_embeddings=64,
        rope_parameters=YARN | dict(rope_theta=1e3, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7, llama_4_scaling_beta=0.3),
    ),
    "granitemoehybrid": dict(
        model_type="granitemoehybrid", shared_intermediate_size=96, layer_types=[FULL] * 2, position_embedding_type="rope", rope_parameters=PLAIN,
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5, num_experts_per_tok=0, **NO_MAMBA,
    ),
    # the converter writes no rotary base
    "stablelm": dict(model_type="stablelm", use_qkv_bias=True, rope_parameters=PLAIN | dict(rope_theta=1e4, partial_rotary_factor=0.25)),
    "stablelm-parallel": dict(model_type="stablelm", use_parallel_residual=True, rope_parameters=PLAIN | dict(rope_theta=1e4, partial_rotary_factor=0.5)),
    "jais2": dict(model_type="jais2", head_dim=32, rope_parameters=PLAIN),
    "seed_oss": dict(model_type="seed_oss", head_dim=32, rope_parameters=PLAIN, attention_bias=True, attention_out_bias=False),
}


def convert(folder, file, kind="ALL_F32"):
    """Runs the converter without a tokenizer."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    keys = ModelBase.load_hparams(folder, False)
    if keys["model_type"] == "granitemoehybrid":
        # the converter knows the names of released files, transformers writes others
        keys["layer_types"] = ["attention"] * keys["num_hidden_layers"]
        (Path(folder) / "config.json").write_text(json.dumps(keys))
    model_class = get_model_class(get_model_architecture(keys, ModelType.TEXT))
    # this class only chooses another one
    model_class = getattr(model_class, "Ministral3Model", model_class)
    # the converter of Gemma 3 counts the tokens
    vocab = {str(number): number for number in range(keys["vocab_size"])}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(dict(model=dict(vocab=vocab), added_tokens=[])))

    class WithoutTokenizer(model_class):
        model_arch = model_class.model_arch

        def set_vocab(self):
            self.gguf_writer.add_tokenizer_model("no_vocab")
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        WithoutTokenizer(folder, gguf.LlamaFileType[kind], file).write()


def difference(binary, name, seed):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = make_model(build_config(**(COMMON | CASES[name])), seed)
        model.save_pretrained(folder)
        file = folder / "gguf" / "model.gguf"
        file.parent.mkdir()
        convert(folder, file)
        ids = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        out = folder / "logits.safetensors"
        command = [binary, "logits", "--device", "cpu", "--model", str(file), "--ids", ",".join(map(str, ids)), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return done.stderr.strip()
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        found = load_file(out)["logits"]
        return ((found - expected).abs().max() / expected.abs().max()).item()


def main():
    binary, _, *names = sys.argv[1:]
    has_failed = False
    for number, name in enumerate(CASES):
        if names and name not in names:
            continue
        try:
            found = difference(binary, name, 100 + number)
        except Exception as error:  # the converter refuses some configurations
            found = f"not converted: {type(error).__name__}: {error}"
        is_right = isinstance(found, float) and found < TOLERANCE
        has_failed |= not is_right
        print(f"{'ok  ' if is_right else 'FAIL'} {name:14} {found if isinstance(found, str) else f'{found:.1e}'}", flush=True)
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
