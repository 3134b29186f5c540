"""Writes crates/metal-candle/tests/golden/packed: tiny quantized models and matrices as the tools that people use write them, with the logits
of mlx-lm and transformers, and the values that the matrices stand for.

    python dev/reference_packed.py
"""

import itertools
from pathlib import Path

import mlx.core as mx
import torch
from safetensors.torch import save_file

from families import build_config, make_model
from packed import COMMON, mlx_logits, write_mlx

FOLDER = Path(__file__).resolve().parent.parent / "crates" / "metal-candle" / "tests" / "golden" / "packed"
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9]


def mlx_matrices():
    """A matrix of each width and group of MLX, with scales of each dtype in turn, and its values in f32."""
    tensors = {}
    dtypes = itertools.cycle([mx.bfloat16, mx.float16, mx.float32])
    modes = [("affine", bits, group) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)]
    for number, (mode, bits, group) in enumerate(modes + [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]):
        values = 0.3 * torch.randn(3, max(group, 64), generator=torch.Generator().manual_seed(number))
        values[1] = 0
        values = mx.array(values.numpy()).astype(next(dtypes))
        name = f"{mode}_{bits}_{group}"
        weight, *scales = mx.quantize(values, group_size=group, bits=bits, mode=mode)
        tensors |= {f"{name}.{part}": value for part, value in zip(("weight", "scales", "biases"), [weight, *scales])}
        wide = [value if value.dtype == mx.uint8 else value.astype(mx.float32) for value in scales]
        expected = mx.dequantize(weight, *wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        tensors[f"{name}.expected"] = expected.astype(mx.float32)
    mx.save_safetensors(str(FOLDER / "mlx.safetensors"), tensors)


def mlx_model(name, seed, config, **settings):
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    write_mlx(folder, make_model(build_config(**(COMMON | config)), seed, None), **settings)
    (folder / "model.safetensors.index.json").unlink()
    save_file(dict(ids=torch.tensor(IDS), logits=mlx_logits(folder, IDS)), FOLDER / f"{name}.safetensors")


def mixed(path, module):
    """More bits for some modules, and one that stays dense."""
    if "v_proj" in path:
        return dict(bits=6, group_size=32)
    if "gate_proj" in path:
        return dict(bits=5, group_size=64)
    return "down_proj" not in path


def main():
    FOLDER.mkdir(exist_ok=True)
    mlx_matrices()
    mlx_model("mlx-llama", 1, dict(model_type="llama", intermediate_size=64, tie_word_embeddings=True), predicate=mixed)
    narrow = dict(model_type="qwen2", hidden_size=32, intermediate_size=64)
    mlx_model("mlx-qwen2", 2, narrow, mode="mxfp4", dtype="float16")


if __name__ == "__main__":
    main()
