"""Writes crates/metal-candle-kernels/src/blocks/encode/quantized.bin: values, and their blocks quantized by ggml.

512 importances and 1536 values as f32, then for each format its id as u32, the blocks without and with the importance; all
little endian.

Usage: python dev/reference_quantizers.py LIBGGML_BASE
LIBGGML_BASE is libggml-base.so of llama.cpp built for x86-64 (written with ggml 0.25.3). On other processors the compiler may
fuse multiplications and additions, which changes some scales.
"""

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np

OUTPUT = Path(__file__).parent.parent / "crates/metal-candle-kernels/src/blocks/encode/quantized.bin"
FORMATS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
COLUMNS = 512


def special(random):
    """Eight blocks of 32 values, then a superblock of zeros."""
    values = np.zeros((16, 32))
    values[1] = 0.5
    values[2] = -0.25
    values[3] = np.resize([0.125, -0.125], 32)
    values[4] = random.standard_normal(32) * 0.01
    values[4, 7] = -1000
    values[5] = 1e-20
    values[6] = np.round(random.standard_normal(32) * 4) / 8
    values[7] = np.abs(random.standard_normal(32)) + 1
    return values.ravel()


def main():
    ggml = ctypes.CDLL(sys.argv[1])
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    random = np.random.default_rng(7)
    gaussian = random.standard_normal(COLUMNS) * 0.02
    values = np.stack([gaussian, random.laplace(0, 0.5, COLUMNS), special(random)]).astype("<f4")
    importance = np.exp(random.standard_normal(COLUMNS)).astype("<f4")
    with OUTPUT.open("wb") as file:
        file.write(importance.tobytes() + values.tobytes())
        for name in FORMATS:
            kind = gguf.GGMLQuantizationType[name]
            length, size = gguf.GGML_QUANT_SIZES[kind]
            file.write(np.array(kind.value, "<u4").tobytes())
            for weights in [None, importance.ctypes.data]:
                blocks = np.zeros(values.size // length * size, np.uint8)
                written = ggml.ggml_quantize_chunk(
                    kind.value, values.ctypes.data, blocks.ctypes.data, 0, len(values), COLUMNS, weights)
                assert written == blocks.size
                file.write(blocks.tobytes())


main()
