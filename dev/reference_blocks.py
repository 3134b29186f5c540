"""Writes crates/metal-candle-kernels/src/blocks/golden.bin: blocks of each format and their weights as gguf dequantizes them.

For each format: the id and the number of blocks as u32, the blocks, the weights as f32; all little endian.

Usage: python dev/reference_blocks.py   (gguf and numpy; written with gguf 0.19)
"""

from pathlib import Path

import gguf
import numpy as np

OUTPUT = Path(__file__).parent.parent / "crates/metal-candle-kernels/src/blocks/golden.bin"

# name and the offsets of the f16 scales
FORMATS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}
# the first scale of each block; superblocks have the first two, and `THREE` the first three
SCALES = [0.0123, 3e-7, 0.0, -0.75, 1.0, 65504.0]
THREE = {"Q4_K", "Q6_K"}
EXPONENTS = [0, 1, 2, 127, 254, 120]


def blocks_of(name, random):
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    count = 6 if length == 32 else 3 if name in THREE else 2
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for index, block in enumerate(blocks):
        for offset, scale in zip(FORMATS[name], (SCALES[index], -0.3 * index + 0.0217)):
            block[offset:offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if name == "Q4_K":
        assert all(len(set(block[4:16])) == 12 for block in blocks[:1]), "choose another seed"
    if name == "Q6_K":
        assert (blocks[:, 192:208].view(np.int8) < 0).any(), "choose another seed"
    if name == "MXFP4":
        blocks[:, 0] = EXPONENTS
    return blocks


def main():
    random = np.random.default_rng(5)
    with OUTPUT.open("wb") as file:
        for name in FORMATS:
            kind = gguf.GGMLQuantizationType[name]
            blocks = blocks_of(name, random)
            with np.errstate(over="ignore"):
                weights = gguf.quants.dequantize(blocks, kind)
            file.write(np.array([kind.value, len(blocks)], "<u4").tobytes())
            file.write(blocks.tobytes())
            file.write(weights.astype("<f4").tobytes())


main()
