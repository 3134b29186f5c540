"""Writes crates/metal-candle/tests/golden/packed: tiny quantized models and matrices in the formats of common tools, with the logits
of mlx-lm and transformers, and the dequantized values of the matrices.

    python dev/reference_packed.py GPTQMODEL AUTOAWQ

GPTQMODEL and AUTOAWQ are source trees of GPTQModel 7 and AutoAWQ 0.2. It also needs mlx-lm, bitsandbytes, compressed-tensors and transformers.
"""

import itertools
import sys
from pathlib import Path

import mlx.core as mx
import torch
from safetensors.torch import save_file

from families import build_config, make_model
from packed import COMMON, mlx_logits, write_mlx
from packed_tools import awq, compressed, fp8, functions_of, gptq, int8, logits_of, nf4, write_model

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
    """More bits for some modules, and one dense module."""
    if "v_proj" in path:
        return dict(bits=6, group_size=32)
    if "gate_proj" in path:
        return dict(bits=5, group_size=64)
    return "down_proj" not in path


def write_matrices(file, modules):
    """Writes modules and their values."""
    tensors = {}
    for name, (parts, expected) in modules.items():
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()} | {f"{name}.expected": expected.contiguous()}
    save_file(tensors, FOLDER / f"{file}.safetensors")


def other_matrices(gptq_tool, awq_tool, noise):
    drawn = lambda *shape: 0.3 * torch.randn(*shape, generator=noise)
    wide = drawn(8, 48)
    wide[2] = 0
    write_matrices("bitsandbytes", dict(
        # blocks of 64 over rows of 48, with a shorter last block
        nf4=nf4(drawn(5, 48).bfloat16()), nested=nf4(drawn(260, 64).half()[:4], nested=True), fp4=nf4(drawn(3, 64), "fp4"), int8=int8(wide),
    ))
    write_matrices("fp8", dict(blocks=fp8(drawn(8, 48), (4, 16)), whole=fp8(drawn(3, 16))))
    v1 = lambda *args, **keys: gptq(gptq_tool, *args, noise, **keys)
    write_matrices("gptq", {
        "2": v1(16, 64, 2, 32), "3": v1(32, 64, 3, 32), "4": v1(8, 64, 4, 32), "8": v1(4, 64, 8, 32),
        "symmetric_4": v1(8, 128, 4, 64, symmetric=True), "symmetric_8": v1(4, 64, 8, 32, symmetric=True), "ordered": v1(8, 64, 4, 16, act_order=True),
    })
    v2 = lambda *args, **keys: v1(*args, less_one=False, **keys)
    write_matrices("gptq_v2", {"3": v2(32, 32, 3, 32), "4": v2(8, 64, 4, 32), "symmetric_4": v2(8, 64, 4, 32, symmetric=True)})
    write_matrices("awq", dict(f16=awq(awq_tool, 16, 64, 32, noise), bf16=awq(awq_tool, 8, 64, 64, noise, torch.bfloat16)))
    packed = lambda **keys: compressed(drawn(16, 64), noise, type="int", strategy="group", group_size=32, **keys)
    plain = lambda **keys: compressed(drawn(4, 32), noise, packed=False, num_bits=8, **keys)
    write_matrices("compressed", dict(
        int4=packed(num_bits=4, symmetric=True), zeros4=packed(num_bits=4, symmetric=False), int8=packed(num_bits=8, symmetric=True),
        f32=packed(num_bits=4, symmetric=True, dtype=torch.float32),
        row=compressed(drawn(4, 36), noise, num_bits=8, type="int", strategy="channel", symmetric=True),
        bytes=plain(type="int", strategy="channel", symmetric=True), byte_matrix=plain(type="int", strategy="tensor", symmetric=True),
        float_rows=plain(type="float", strategy="channel", symmetric=True), float_matrix=plain(type="float", strategy="tensor", symmetric=True),
        float_blocks=plain(type="float", strategy="block", block_structure=[2, 16], symmetric=True),
    ))


def with_bias(tensors, expected):
    """Adds a bias to each layer, as AutoGPTQ does."""
    return tensors | dict(bias=torch.zeros(len(expected), dtype=torch.float16)), expected


def other_model(name, seed, config, quantize, method):
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    model = make_model(build_config(**(COMMON | config)), seed, None)
    write_model(folder, model, quantize, method)
    (folder / "generation_config.json").unlink()
    save_file(dict(ids=torch.tensor(IDS), logits=logits_of(model, IDS)), FOLDER / f"{name}.safetensors")


def main():
    gptq_tool = functions_of(Path(sys.argv[1]) / "gptqmodel/utils/model_dequant.py")
    awq_tool = functions_of(Path(sys.argv[2]) / "awq/utils/packing_utils.py")
    FOLDER.mkdir(exist_ok=True)
    mlx_matrices()
    mlx_model("mlx-llama", 1, dict(model_type="llama", intermediate_size=64, tie_word_embeddings=True), predicate=mixed)
    narrow = dict(model_type="qwen2", hidden_size=32, intermediate_size=64)
    mlx_model("mlx-qwen2", 2, narrow, mode="mxfp4", dtype="float16")
    noise = torch.Generator().manual_seed(7)
    other_matrices(gptq_tool, awq_tool, noise)
    four_bits = dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4")
    other_model("bnb-llama", 3, dict(model_type="llama", hidden_size=32), lambda weight: nf4(weight.bfloat16(), nested=True), four_bits)
    ordered = dict(quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=False)
    biased = lambda weight: with_bias(*gptq(gptq_tool, *weight.shape, 4, 32, noise, act_order=True))
    other_model("gptq-llama", 4, dict(model_type="llama", hidden_size=32, tie_word_embeddings=True), biased, ordered)


if __name__ == "__main__":
    main()
