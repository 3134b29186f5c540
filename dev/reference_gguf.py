"""Writes crates/metal-candle/tests/golden/gguf: tiny models as llama.cpp's converter writes them, with logits of transformers; and
fuzz/seeds/gguf: tiny models with a tokenizer.

    python dev/reference_gguf.py LLAMA_CPP [NAME ...]

LLAMA_CPP is a source tree of llama.cpp. With names, only these models are written. The models in transformers have the dequantized values of the quantized matrices.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from check_gguf import CASES, COMMON, convert
from families import build_config, make_model

import gguf

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "crates" / "metal-candle" / "tests" / "golden" / "gguf"
SEEDS = ROOT / "fuzz" / "seeds" / "gguf"
WIDE, NARROW = dict(intermediate_size=64), dict(hidden_size=32, intermediate_size=32, head_dim=8)
# a case's index is its seed, so add new cases at the end
MODELS = {
    "llama-tied": ("MOSTLY_Q8_0", WIDE), "gemma2": ("MOSTLY_F16", WIDE), "phi3": ("MOSTLY_Q8_0", WIDE), "qwen2": ("MOSTLY_BF16", WIDE),
    "arcee": ("MOSTLY_BF16", NARROW), "ernie4_5": ("MOSTLY_BF16", NARROW), "exaone4": ("MOSTLY_BF16", NARROW), "glm": ("MOSTLY_BF16", NARROW),
    "hunyuan_v1_dense": ("MOSTLY_BF16", NARROW), "ministral3": ("MOSTLY_BF16", NARROW), "seed_oss": ("MOSTLY_BF16", NARROW), "stablelm": ("MOSTLY_BF16", dict(hidden_size=32, intermediate_size=32)),
    "jais2": ("MOSTLY_BF16", NARROW),
}


def write_seed(kind, quantized, architecture="llama"):
    """A model of one layer with a vocabulary of bytes."""
    writer = gguf.GGUFWriter(SEEDS / kind, architecture)
    width, heads = (256, 4) if "K" in quantized.name else (32, 2)
    tokens = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "aa"] if kind != "pieces" else (
        ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "aa", "▁a"]
    )
    for key, value in dict(
        block_count=1, context_length=64, embedding_length=width, feed_forward_length=width, head_count=heads, head_count_kv=1,
        layer_norm_rms_eps=1e-5, rope_freq_base=1e4,
    ).items():
        getattr(writer, f"add_{key}")(value)
    if architecture == "mistral3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_rope_scaling_yarn_log_mul(0.7)
        writer.add_attn_temperature_scale(0.3)
    writer.add_tokenizer_model("llama" if kind == "pieces" else "gpt2")
    writer.add_token_list(tokens)
    if kind != "pieces":
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(["a a"])
    else:
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    head = width // heads
    shapes = dict(token_embd=(len(tokens), width), output_norm=(width,)) | {
        f"blk.0.{name}": shape for name, shape in dict(
            attn_norm=(width,), ffn_norm=(width,), attn_q=(width, width), attn_k=(head, width), attn_v=(head, width), attn_output=(width, width),
            ffn_gate=(width, width), ffn_up=(width, width), ffn_down=(width, width),
        ).items()
    }
    if architecture == "chatglm":
        shapes["blk.0.ffn_up"] = (2 * width, width)
        del shapes["blk.0.ffn_gate"]
    if architecture == "exaone4":
        for name in ("attn_norm", "ffn_norm"):
            del shapes[f"blk.0.{name}"]
        shapes |= {"blk.0.post_attention_norm": (width,), "blk.0.post_ffw_norm": (width,), "blk.0.attn_q_norm": (head,), "blk.0.attn_k_norm": (head,)}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    names = sys.argv[2:]
    if not names:
        SEEDS.mkdir(exist_ok=True)
        write_seed("bytes", gguf.GGMLQuantizationType.Q4_0)
        write_seed("pieces", gguf.GGMLQuantizationType.Q8_0)
        for architecture in ("chatglm", "exaone4", "mistral3"):
            write_seed(architecture, gguf.GGMLQuantizationType.Q8_0, architecture)
    FOLDER.mkdir(exist_ok=True)
    for number, (name, (kind, sizes)) in enumerate(MODELS.items()):
        if names and name not in names:
            continue
        model = make_model(build_config(**(COMMON | CASES[name] | sizes)), 200 + number)
        if kind == "MOSTLY_Q8_0":
            quantized = gguf.GGMLQuantizationType.Q8_0
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        blocks = gguf.quants.quantize(parameter.numpy(), quantized)
                        parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, quantized)))
        with tempfile.TemporaryDirectory() as folder:
            # the converter writes the folder's name into the file
            model.save_pretrained(Path(folder) / name)
            convert(Path(folder) / name, FOLDER / f"{name}.gguf", kind)
        ids = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        save_file(dict(ids=ids, logits=logits), FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
