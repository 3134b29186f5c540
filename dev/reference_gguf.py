"""Writes crates/metal-candle/tests/golden/gguf: tiny models as llama.cpp's converter writes them, with logits of transformers.

    python dev/reference_gguf.py LLAMA_CPP

LLAMA_CPP is a source tree of llama.cpp. The models of transformers have the values that the quantized matrices stand for.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from check_gguf import CASES, COMMON, convert
from families import build_config, make_model

import gguf

FOLDER = Path(__file__).resolve().parent.parent / "crates" / "metal-candle" / "tests" / "golden" / "gguf"
TYPES = {"llama-tied": "MOSTLY_Q8_0", "gemma2": "MOSTLY_F16", "phi3": "MOSTLY_Q8_0", "qwen2": "MOSTLY_BF16"}


def main():
    FOLDER.mkdir(exist_ok=True)
    for number, (name, kind) in enumerate(TYPES.items()):
        model = make_model(build_config(**(COMMON | CASES[name] | dict(intermediate_size=64))), 200 + number)
        if kind == "MOSTLY_Q8_0":
            quantized = gguf.GGMLQuantizationType.Q8_0
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        blocks = gguf.quants.quantize(parameter.numpy(), quantized)
                        parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, quantized)))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            convert(Path(folder), FOLDER / f"{name}.gguf", kind)
        ids = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        save_file(dict(ids=ids, logits=logits), FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
