"""Writes crates/metal-candle-kernels/src/blocks/codebooks.bin: the codebooks of ggml's IQ1, IQ2 and IQ3 formats.

An entry is a u16, little endian. For IQ2_XXS, IQ2_XS, IQ2_S and IQ1_S, in this order, it has eight values of 2 bits, the first in
the lowest bits; for IQ3_XXS and IQ3_S four values of 3 bits, each in 4 bits. A value is the index of the magnitude: `VALUES` in
codebooks.rs. IQ1_M uses the codebook of IQ1_S.

Usage: python dev/reference_codebooks.py   (gguf and numpy; written with gguf 0.19)
"""

from pathlib import Path

import numpy as np
from gguf import quants

OUTPUT = Path(__file__).parent.parent / "crates/metal-candle-kernels/src/blocks/codebooks.bin"
# the class, the entries, the values of an entry and its bits, the magnitudes
CODEBOOKS = [
    (quants.IQ2_XXS, 256, 8, 2, [8, 25, 43]),
    (quants.IQ2_XS, 512, 8, 2, [8, 25, 43]),
    (quants.IQ2_S, 1024, 8, 2, [8, 25, 43]),
    (quants.IQ1_S, 2048, 8, 2, [-1, 0, 1]),
    (quants.IQ3_XXS, 256, 4, 4, [4, 12, 20, 28, 36, 44, 52, 62]),
    (quants.IQ3_S, 512, 4, 4, [1, 3, 5, 7, 9, 11, 13, 15]),
]


def main():
    with OUTPUT.open("wb") as file:
        for kind, entries, width, bits, magnitudes in CODEBOOKS:
            kind.init_grid()
            grid = np.asarray(kind.grid).reshape(entries, width)
            indices = np.array([[magnitudes.index(int(value)) for value in entry] for entry in grid])
            packed = (indices << (bits * np.arange(width))).sum(axis=1)
            file.write(packed.astype("<u2").tobytes())


main()
