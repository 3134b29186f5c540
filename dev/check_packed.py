"""Compares quantized checkpoints, as a built `metal-candle` reads them, with mlx-lm and transformers.

    python dev/check_packed.py BINARY [NAME ...]

Models are tiny and random. A table on standard output; exit code 1 if anything differs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from check_gguf import CASES, FULL, PLAIN, SLIDING
from check_gguf import COMMON as SIZES
from families import build_config, make_model
from packed import mlx_logits, write_mlx

TOLERANCE = 2e-5
# of matrices that are held dense in f16 or bf16
ROUNDED = dict(bfloat16=5e-2, float16=6e-3)
MLX = [dict(bits=bits, group_size=group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)] + [dict(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
# what mlx-lm does not read
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


def compare(binary, folder, ids, expected):
    """The largest differences of logits, as a part of the largest logit: with weights as they are held, and in f32."""
    found = [our_logits(binary, folder, ids, *flags) for flags in ([], ["--dtype", "f32"])]
    return [((logits - expected).abs().max() / expected.abs().max()).item() for logits in found]


def main():
    binary, *names = sys.argv[1:]
    has_failed = False
    for number, family in enumerate(FAMILIES):
        for dtype, settings in zip(["bfloat16", "float16", "float32"] * len(MLX), MLX):
            name = f"mlx {family} {dtype} " + " ".join(map(str, settings.values()))
            if names and not any(part in name for part in names):
                continue
            try:
                found = check_mlx(binary, family, settings | dict(dtype=dtype), number)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            is_dense = settings.get("bits") in (6, 8)
            # mlx-lm has another GELU in Gemma, and more bits for some matrices of Granite
            exact = 1e-3 if family == "gemma" else TOLERANCE
            limits = ROUNDED.get(dtype, exact) if is_dense or family == "granite" else exact, exact
            is_right = isinstance(found, list) and all(value < limit for value, limit in zip(found, limits))
            has_failed |= not is_right
            shown = found if isinstance(found, str) else " ".join(f"{value:.1e}" for value in found)
            print(f"{'ok  ' if is_right else 'FAIL'} {name:36} {shown}", flush=True)
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
