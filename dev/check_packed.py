"""Compares the logits of quantized checkpoints in a built `metal-candle` with mlx-lm and transformers.

    python dev/check_packed.py BINARY GPTQMODEL AUTOAWQ [NAME ...]

GPTQMODEL and AUTOAWQ are source trees, as for `reference_packed.py`. Models are tiny and random. Prints a table; exits with 1 if anything differs.
"""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import load_file

from check_gguf import CASES, FULL, PLAIN, SLIDING
from check_gguf import COMMON as SIZES
from families import build_config, make_model
from packed import mlx_logits, write_mlx
from packed_tools import awq, compressed, fp8, functions_of, gptq, logits_of, write_model

TOLERANCE = 2e-5
# for matrices that are stored dense in f16 or bf16
ROUNDED = dict(bfloat16=5e-2, float16=6e-3)
MLX = [dict(bits=bits, group_size=group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)] + [dict(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
WRITTEN = ["4bit", "8bit", "mxfp4", "2bit", "3bit", "5bit", "6bit"]
# not supported by mlx-lm
CHANGES = dict(gemma2=dict(sliding_window=64), gemma3=dict(rope_parameters={kind: PLAIN for kind in (SLIDING, FULL)}))
FAMILIES = ["llama", "llama-tied", "llama-llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "granite", "olmo2"]


def our_logits(binary, folder, ids, *flags):
    out = Path(folder) / "logits.safetensors"
    command = [binary, "logits", "--device", "cpu", "--model", str(folder), "--ids", ",".join(map(str, ids)), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    found = load_file(out)["logits"]
    out.unlink()
    return found


def check_mlx(binary, name, settings, seed):
    with tempfile.TemporaryDirectory() as folder:
        keys = SIZES | dict(vocab_size=64, hidden_size=64, intermediate_size=128) | CASES[name] | CHANGES.get(name, {})
        write_mlx(folder, make_model(build_config(**keys), seed, None), **settings)
        ids = torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        return compare(binary, folder, ids, mlx_logits(folder, ids))


def check_written(binary, name, kind, dtype, seed):
    """A model that `convert --mlx-type` writes: mlx-lm's logits of it beside ours."""
    with tempfile.TemporaryDirectory() as folder:
        source, written = Path(folder) / "source", Path(folder) / "written"
        keys = SIZES | dict(vocab_size=64, hidden_size=64, intermediate_size=128) | CASES[name] | CHANGES.get(name, {})
        make_model(build_config(**keys), seed, None).to(getattr(torch, dtype)).save_pretrained(source)
        command = [binary, "convert", "--model", source, "--format", "mlx", "--mlx-type", kind, "--output", written]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        ids = torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        return compare(binary, written, ids, mlx_logits(written, ids))


def compare(binary, folder, ids, expected):
    """The largest differences of logits relative to the largest logit: with weights as stored, and in f32."""
    found = [our_logits(binary, folder, ids, *flags) for flags in ([], ["--dtype", "f32"])]
    return [((logits - expected).abs().max() / expected.abs().max()).item() for logits in found]


def check_bitsandbytes(binary, folder, model, settings):
    """Writes a model quantized with bitsandbytes through transformers."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder / "source")
    config = transformers.BitsAndBytesConfig(**settings)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
    read.save_pretrained(folder / "model")
    modules = dict(read.named_modules())
    for name, parameter in model.named_parameters():
        if not name.endswith(".weight"):
            continue
        quantized = modules[name.rpartition(".")[0]].weight
        if hasattr(quantized, "quant_state"):
            quantized.quant_state.dtype = torch.float32
            parameter.data = dequantize_4bit(quantized.data, quantized.quant_state)
        elif quantized.dtype == torch.int8:
            parameter.data = int8_vectorwise_dequant(quantized.CB if quantized.CB is not None else quantized.data, quantized.SCB)
    return model


def other_methods(gptq_tool, awq_tool):
    """Names, functions that quantize a matrix, and the entries of `config.json`."""
    noise = torch.Generator().manual_seed(5)
    group = dict(type="int", strategy="group", group_size=32)
    float8 = lambda **keys: lambda weight: compressed(weight, noise, packed=False, num_bits=8, type="float", symmetric=True, **keys)
    ct = lambda kind, **weights: dict(quant_method="compressed-tensors", format=kind, config_groups=dict(group_0=dict(targets=["Linear"], weights=weights)))
    return {
        "fp8 blocks": (lambda weight: fp8(weight, (32, 32)), dict(quant_method="fp8", weight_block_size=[32, 32])),
        "fp8": (fp8, dict(quant_method="fp8", weight_block_size=None)),
        "gptq 4": (lambda weight: gptq(gptq_tool, *weight.shape, 4, 32, noise), dict(quant_method="gptq", bits=4, group_size=32)),
        "gptq 3 ordered": (lambda weight: gptq(gptq_tool, *weight.shape, 3, 32, noise, act_order=True), dict(quant_method="gptq", bits=3, group_size=32)),
        "gptq v2 8": (lambda weight: gptq(gptq_tool, *weight.shape, 8, 32, noise, less_one=False), dict(quant_method="gptq", bits=8, checkpoint_format="gptq_v2")),
        "awq": (lambda weight: awq(awq_tool, *weight.shape, 64, noise), dict(quant_method="awq", bits=4, group_size=64, version="gemm")),
        "compressed int4": (lambda weight: compressed(weight, noise, num_bits=4, symmetric=True, **group), ct("pack-quantized", num_bits=4)),
        "compressed zeros": (lambda weight: compressed(weight, noise, num_bits=4, symmetric=False, **group), ct("pack-quantized", num_bits=4)),
        "compressed rows": (float8(strategy="channel"), ct("float-quantized", num_bits=8)),
        "compressed blocks": (float8(strategy="block", block_structure=[16, 32]), ct("float-quantized", block_structure=[16, 32])),
    }


def check_other(binary, family, name, quantize, method):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        keys = SIZES | dict(vocab_size=64, hidden_size=64, intermediate_size=128) | CASES[family]
        model = make_model(build_config(**keys), 3, None)
        if name.startswith("bitsandbytes"):
            model = check_bitsandbytes(binary, folder, model, method)
            folder = folder / "model"
        else:
            write_model(folder, model, quantize, method)
        ids = list(range(30))
        return compare(binary, folder, ids, logits_of(model, ids))


def main():
    binary, gptq_model, auto_awq, *names = sys.argv[1:]
    has_failed = False

    def check(name, limits, run):
        nonlocal has_failed
        if names and not any(part in name for part in names):
            return
        try:
            found = run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        is_right = isinstance(found, list) and all(value < limit for value, limit in zip(found, limits))
        has_failed |= not is_right
        shown = found if isinstance(found, str) else " ".join(f"{value:.1e}" for value in found)
        print(f"{'ok  ' if is_right else 'FAIL'} {name:36} {shown}", flush=True)

    for number, family in enumerate(FAMILIES):
        for dtype, settings in zip(["bfloat16", "float16", "float32"] * len(MLX), MLX):
            # mlx-lm uses a different GELU in Gemma, and more bits for some matrices of Granite
            exact = 1e-3 if family == "gemma" else TOLERANCE
            is_dense = settings.get("bits") in (6, 8) or family == "granite"
            limits = ROUNDED.get(dtype, exact) if is_dense else exact, exact
            name = f"mlx {family} {dtype} " + " ".join(map(str, settings.values()))
            check(name, limits, lambda: check_mlx(binary, family, settings | dict(dtype=dtype), number))
        for dtype, kind in zip(["bfloat16", "float16", "float32"] * len(WRITTEN), WRITTEN):
            exact = 1e-3 if family == "gemma" else TOLERANCE
            # inference with repacked matrices rounds activations to 8 bits
            limits = 0.25 if kind not in ("6bit", "8bit") else ROUNDED.get(dtype, exact), exact
            check(f"written {family} {dtype} {kind}", limits, lambda: check_written(binary, family, kind, dtype, number))
    methods = other_methods(
        functions_of(Path(gptq_model) / "gptqmodel/utils/model_dequant.py"), functions_of(Path(auto_awq) / "awq/utils/packing_utils.py")
    )
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            methods[f"bitsandbytes {kind} {nested}"] = None, dict(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    methods["bitsandbytes int8"] = None, dict(load_in_8bit=True)
    for family in ("llama-tied", "qwen2", "gemma3", "phi3"):
        for name, (quantize, method) in methods.items():
            check(f"{name} {family}", (ROUNDED["bfloat16"], TOLERANCE), lambda: check_other(binary, family, name, quantize, method))
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
