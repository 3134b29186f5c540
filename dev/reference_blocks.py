"""Writes crates/metal-candle-kernels/src/blocks/golden.bin: blocks of each format and their weights dequantized by gguf.

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
    "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0],
    "TQ1_0": [52], "TQ2_0": [64],
}
# the entries of the codebook, and the entries of a block
CODEBOOKS = {
    "IQ1_S": (2048, 32), "IQ2_XXS": (256, 32), "IQ2_XS": (512, 32), "IQ2_S": (1024, 32), "IQ3_XXS": (256, 64),
    "IQ3_S": (512, 64),
}
# the first scale of each block; superblocks have the first two, and `THREE` the first three
SCALES = [0.0123, 3e-7, 0.0, -0.75, 1.0, 65504.0]
THREE = {"Q4_K", "Q6_K"}
EXPONENTS = [0, 1, 2, 127, 254, 120]


def set_entry(block, name, position, entry):
    """Sets the codebook entry of a position in the block."""
    low, high = entry & 255, entry >> 8
    if name == "IQ2_XXS":
        block[2 + 8 * (position // 4) + position % 4] = low
    elif name == "IQ2_XS":
        block[2 + 2 * position] = low
        block[3 + 2 * position] = block[3 + 2 * position] & 254 | high
    else:
        block[2 + position] = low
    # upper bits: where, in how many bytes, at which bit, how many
    at, size, bit, bits = {
        "IQ2_S": (66 + position // 4, 1, 2 * (position % 4), 2),
        "IQ3_S": (66 + position // 8, 1, position % 8, 1),
        "IQ1_S": (34 + 2 * (position // 4), 2, 3 * (position % 4), 3),
    }.get(name, (0, 0, 0, 0))
    word = int.from_bytes(block[at:at + size].tobytes(), "little")
    word = word & ~(((1 << bits) - 1) << bit) | (high << bit if size else 0)
    block[at:at + size] = np.frombuffer(word.to_bytes(size, "little"), np.uint8)


def blocks_of(name, random):
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    entries, per_block = CODEBOOKS.get(name, (0, 1))
    # every entry once
    count = entries // per_block or (6 if length == 32 or name == "IQ1_M" else 3 if name in THREE else 2)
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for index, block in enumerate(blocks):
        for offset, scale in zip(FORMATS[name], (SCALES[index % len(SCALES)], -0.3 * index + 0.0217)):
            block[offset:offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if name == "IQ1_M":
        # four bits of the scale in each of four words
        for block, scale in zip(blocks, SCALES):
            bits = int(np.float16(scale).view(np.uint16))
            for word in range(4):
                block[49 + 2 * word] = block[49 + 2 * word] & 15 | (bits >> (4 * word) & 15) << 4
    for entry in range(entries):
        set_entry(blocks[entry // per_block], name, entry % per_block, entry)
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
