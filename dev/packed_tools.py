"""Matrices in the formats of bitsandbytes, GPTQ, AWQ and compressed-tensors, with their values according to these tools.

Each function returns the tensors of a module, by the rest of their names, and the matrix in f32. One source file each of GPTQModel and AutoAWQ is used:
`gptqmodel/utils/model_dequant.py` and `awq/utils/packing_utils.py`.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


def functions_of(file):
    """The functions of a file that need only torch; the packages around it need many others."""
    tree = ast.parse(Path(file).read_text())
    tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef) or (isinstance(part, ast.Assign) and "AWQ" in ast.unparse(part))]
    names = dict(torch=torch, PLANAR_BITS=())
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), str(file), "exec"), names)
    return SimpleNamespace(**names)


def nf4(weight, kind="nf4", nested=False):
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    tensors = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    # on the CPU, bitsandbytes 0.50 starts a block with each row when it dequantizes, but not when it quantizes
    state.shape, state.dtype = (1, weight.numel()), torch.float32
    return tensors, bnb.dequantize_4bit(packed, state).reshape(weight.shape)


def int8(weight):
    codes, largest, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = dict(weight=codes, SCB=largest, weight_format=torch.tensor(0, dtype=torch.uint8))
    return tensors, bnb.int8_vectorwise_dequant(codes, largest)


def fp8(weight, blocks=None):
    """The block sizes; none for a single scale."""
    rows, columns = weight.shape
    of_rows, of_columns = blocks or (rows, columns)
    scales = weight.reshape(rows // of_rows, of_rows, columns // of_columns, of_columns).abs().amax((1, 3)) / 448
    wide = scales.repeat_interleave(of_rows, 0).repeat_interleave(of_columns, 1)
    codes = (weight / wide).to(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    return dict(weight=codes, weight_scale_inv=scales if blocks else scales.reshape(())), expected


def words(*shape, noise):
    return torch.randint(-(2**31), 2**31, shape, generator=noise).to(torch.int32)


def scales_of(groups, rows, noise, dtype=torch.float16):
    return (0.01 * torch.rand(groups, rows, generator=noise) + 0.001).to(dtype)


def gptq(tool, rows, columns, bits, group, noise, symmetric=False, act_order=False, less_one=True):
    """Random words; `less_one` for zero points in the first version of the format."""
    groups = columns // group
    codes, zeros = words(columns * bits // 32, rows, noise=noise), words(groups, rows * bits // 32, noise=noise)
    if symmetric:
        zero = 2 ** (bits - 1) - less_one
        zeros = tool.pack_cols(torch.full((groups, rows), zero), bits, pack_dtype=torch.int32)
    scales, g_idx = scales_of(groups, rows, noise) * 2.0 ** (4 - bits), (torch.arange(columns) // group).int()
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=noise)]
    wide = tool.unpack_cols(tool._correct_gptq_v1_qzeros(zeros, bits) if less_one else zeros, bits)
    expected = (scales.float()[g_idx] * (tool.unpack_rows(codes, bits) - wide[g_idx])).T
    return dict(qweight=codes, qzeros=zeros, scales=scales, g_idx=g_idx), expected.contiguous()


def awq(tool, rows, columns, group, noise, dtype=torch.float16):
    codes, zeros = words(columns, rows // 8, noise=noise), words(columns // group, rows // 8, noise=noise)
    scales = scales_of(columns // group, rows, noise, dtype)
    expected = tool.dequantize_gemm(codes, zeros, scales.float(), 4, group).T
    return dict(qweight=codes, qzeros=zeros, scales=scales), expected.contiguous()


def compressed(weight, noise, dtype=torch.bfloat16, packed=True, **settings):
    """Rounds to the nearest value; `settings` are a weight scheme."""
    rows, columns = weight.shape
    args = QuantizationArgs(**settings)
    group = settings.get("group_size") or columns
    is_float = settings.get("type") == "float"
    if settings["strategy"] == "block":
        of_rows, of_columns = settings["block_structure"]
        blocks = weight.reshape(rows // of_rows, of_rows, columns // of_columns, of_columns)
        largest = blocks.abs().amax((1, 3))
    else:
        largest = weight.reshape(rows, columns // group, group).abs().amax(2)
        largest = largest.amax().reshape(1) if settings["strategy"] == "tensor" else largest
    state = dict(weight=weight.to(dtype), weight_scale=(largest / (448 if is_float else 2 ** (settings["num_bits"] - 1) - 0.5)).to(dtype))
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-4, 4, state["weight_scale"].shape, generator=noise).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor
    tensors = compressor.compress(state, scheme)
    wide = {name: value.float() if name == "weight_scale" else value for name, value in tensors.items()}
    return tensors, compressor.decompress(wide, scheme)["weight"].float()


def write_model(folder, model, quantize, method):
    """Writes a checkpoint whose linear layers except the head are quantized by `quantize(weight)`, and sets their values in the model."""
    model.save_pretrained(folder)
    tensors = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    for name, value in model.state_dict().items():
        module, _, part = name.rpartition(".")
        if module in linears and part == "weight":
            parts, expected = quantize(value)
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
            linears[module].weight.data = expected
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = value.bfloat16()
    save_file(tensors, Path(folder) / "model.safetensors", metadata=dict(format="pt"))
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | dict(quantization_config=method), indent=1))


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
