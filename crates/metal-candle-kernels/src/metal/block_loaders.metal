// Loads rows of weights: elements of type T, or quantized GGUF blocks (`blocks/` implements the same formats on the CPU).
//
// The host defines FORMAT_<name> and BYTES_<name> for each format; format 0 is T. Bit `i` of FORMATS is set if the kernel reads
// matrices of format `i`. With only one format, the checks are resolved when the kernel is compiled.
#ifndef FORMATS
#define FORMATS 1
#endif
#define HAS(format) ((FORMATS >> (format)) & 1)
#define HAS_BLOCKS (FORMATS > 1)
#define IS(found, format) (HAS(format) && (FORMATS == (1 << (format)) || (found) == (format)))
#define IS_DENSE(found) IS(found, 0)

// The size in bytes of a row of `columns` weights.
FUNCTION wide row_bytes(uint format, uint columns) {
    if (IS_DENSE(format)) return wide(columns) * sizeof(T);
    const wide blocks = columns / 32;
    const wide superblocks = columns / 256;
    if (IS(format, FORMAT_Q4_0)) return blocks * BYTES_Q4_0;
    if (IS(format, FORMAT_Q4_1)) return blocks * BYTES_Q4_1;
    if (IS(format, FORMAT_Q5_0)) return blocks * BYTES_Q5_0;
    if (IS(format, FORMAT_Q5_1)) return blocks * BYTES_Q5_1;
    if (IS(format, FORMAT_Q8_0)) return blocks * BYTES_Q8_0;
    if (IS(format, FORMAT_IQ4_NL)) return blocks * BYTES_IQ4_NL;
    if (IS(format, FORMAT_MXFP4)) return blocks * BYTES_MXFP4;
    if (IS(format, FORMAT_Q2_K)) return superblocks * BYTES_Q2_K;
    if (IS(format, FORMAT_Q3_K)) return superblocks * BYTES_Q3_K;
    if (IS(format, FORMAT_Q4_K)) return superblocks * BYTES_Q4_K;
    if (IS(format, FORMAT_Q5_K)) return superblocks * BYTES_Q5_K;
    if (IS(format, FORMAT_Q6_K)) return superblocks * BYTES_Q6_K;
    if (IS(format, FORMAT_IQ4_XS)) return superblocks * BYTES_IQ4_XS;
    return 0;
}

// The address of a row of a matrix.
FUNCTION GLOBAL const uchar* row_of(GLOBAL const uchar* w, uint format, uint row, uint columns) {
    return w + wide(row) * row_bytes(format, columns);
}

#if HAS_BLOCKS
// Blocks whose size is not a multiple of four are aligned to two bytes; blocks of MXFP4 are not aligned.
FUNCTION uint two_bytes(GLOBAL const uchar* from) { return *(GLOBAL const ushort*)from; }
FUNCTION uint four_bytes(GLOBAL const uchar* from) { return two_bytes(from) | (two_bytes(from + 2) << 16); }
FUNCTION uint four_aligned(GLOBAL const uchar* from) { return *(GLOBAL const uint*)from; }
FUNCTION uint four_single(GLOBAL const uchar* from) {
    return uint(from[0]) | (uint(from[1]) << 8) | (uint(from[2]) << 16) | (uint(from[3]) << 24);
}
FUNCTION float half_at(GLOBAL const uchar* from) { return half_bits_to_float(ushort(two_bytes(from))); }

// Looks up one byte, or four, in a table of 16 bytes that is packed into four words.
FUNCTION uint lookup(uint index, uint t0, uint t1, uint t2, uint t3) {
    const uint word = index < 8 ? (index < 4 ? t0 : t1) : (index < 12 ? t2 : t3);
    return (word >> (8 * (index & 3))) & 0xffu;
}
FUNCTION uint lookup_four(uint indices, uint t0, uint t1, uint t2, uint t3) {
    uint bytes = 0;
    UNROLL for (uint k = 0; k < 4; k++) bytes |= lookup((indices >> (8 * k)) & 15u, t0, t1, t2, t3) << (8 * k);
    return bytes;
}
// The table of IQ4_NL and IQ4_XS, and the table of MXFP4 with doubled values.
#define IQ4_TABLE 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u
#define FP4_TABLE 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu

// Moves the four lowest bits of a word to the fifth bits of its four bytes.
FUNCTION uint fifth_bits(uint bits) {
    return ((bits & 1u) << 4) | ((bits & 2u) << 11) | ((bits & 4u) << 18) | ((bits & 8u) << 25);
}

// A weight is scale * (q - zero) + minimum. The byte q is signed in some formats.
FUNCTION bool has_signed_bytes(uint format) {
    return IS(format, FORMAT_Q8_0) || IS(format, FORMAT_IQ4_NL) || IS(format, FORMAT_IQ4_XS) || IS(format, FORMAT_MXFP4);
}
FUNCTION uint zero_of(uint format) {
    if (IS(format, FORMAT_Q4_0)) return 8;
    if (IS(format, FORMAT_Q5_0)) return 16;
    if (IS(format, FORMAT_Q3_K)) return 4;
    if (IS(format, FORMAT_Q6_K)) return 32;
    return 0;
}
FUNCTION bool has_minimum(uint format) {
    return IS(format, FORMAT_Q4_1) || IS(format, FORMAT_Q5_1) || IS(format, FORMAT_Q2_K) || IS(format, FORMAT_Q4_K) ||
        IS(format, FORMAT_Q5_K);
}
// Whether 16 weights share a scale, instead of 32.
FUNCTION bool has_short_groups(uint format) {
    return IS(format, FORMAT_Q2_K) || IS(format, FORMAT_Q3_K) || IS(format, FORMAT_Q6_K);
}

// The bytes q of weights i to i + 3 of a row; i is a multiple of four.
FUNCTION uint four_quants(GLOBAL const uchar* row, uint format, uint i) {
    // for formats with blocks of 32
    const uint nibble = i / 16 % 2 * 4;
    // for the other formats: the group of 32 in a block of 256
    const uint part = i / 32 % 8;
    const uint mask = 0x0f0f0f0fu;
    if (IS(format, FORMAT_Q4_0)) return (four_bytes(row + i / 32 * BYTES_Q4_0 + 2 + i % 16) >> nibble) & mask;
    if (IS(format, FORMAT_Q4_1)) return (four_aligned(row + i / 32 * BYTES_Q4_1 + 4 + i % 16) >> nibble) & mask;
    if (IS(format, FORMAT_Q5_0)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q5_0;
        return ((four_bytes(block + 6 + i % 16) >> nibble) & mask) | fifth_bits(four_bytes(block + 2) >> (i % 32));
    }
    if (IS(format, FORMAT_Q5_1)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q5_1;
        return ((four_aligned(block + 8 + i % 16) >> nibble) & mask) | fifth_bits(four_aligned(block + 4) >> (i % 32));
    }
    if (IS(format, FORMAT_Q8_0)) return four_bytes(row + i / 32 * BYTES_Q8_0 + 2 + i % 32);
    if (IS(format, FORMAT_IQ4_NL)) {
        return lookup_four(four_bytes(row + i / 32 * BYTES_IQ4_NL + 2 + i % 16) >> nibble, IQ4_TABLE);
    }
    if (IS(format, FORMAT_MXFP4)) {
        return lookup_four(four_single(row + i / 32 * BYTES_MXFP4 + 1 + i % 16) >> nibble, FP4_TABLE);
    }
    if (IS(format, FORMAT_Q2_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q2_K;
        return (four_aligned(block + 16 + part / 4 * 32 + i % 32) >> (part % 4 * 2)) & 0x03030303u;
    }
    if (IS(format, FORMAT_Q3_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q3_K;
        const uint low = (four_bytes(block + 32 + part / 4 * 32 + i % 32) >> (part % 4 * 2)) & 0x03030303u;
        return low | (((four_bytes(block + i % 32) >> part) & 0x01010101u) << 2);
    }
    if (IS(format, FORMAT_Q4_K)) {
        return (four_aligned(row + i / 256 * BYTES_Q4_K + 16 + part / 2 * 32 + i % 32) >> (part % 2 * 4)) & mask;
    }
    if (IS(format, FORMAT_Q5_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q5_K;
        const uint low = (four_aligned(block + 48 + part / 2 * 32 + i % 32) >> (part % 2 * 4)) & mask;
        return low | (((four_aligned(block + 16 + i % 32) >> part) & 0x01010101u) << 4);
    }
    if (IS(format, FORMAT_Q6_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q6_K;
        const uint quarter = part % 4;
        const uint low = (four_bytes(block + part / 4 * 64 + quarter % 2 * 32 + i % 32) >> (quarter / 2 * 4)) & mask;
        return low | (((four_bytes(block + 128 + part / 4 * 32 + i % 32) >> (quarter * 2)) & 0x03030303u) << 4);
    }
    if (IS(format, FORMAT_IQ4_XS)) {
        return lookup_four(four_aligned(row + i / 256 * BYTES_IQ4_XS + 8 + part * 16 + i % 16) >> nibble, IQ4_TABLE);
    }
    return 0;
}

// The scale and minimum of the group that contains weight i.
FUNCTION void scales_of(GLOBAL const uchar* row, uint format, uint i, PRIVATE float* scale, PRIVATE float* minimum) {
    const uint part = i / 32 % 8;
    const uint short_part = i / 16 % 16;
    *minimum = 0.0f;
    if (IS(format, FORMAT_Q4_0)) {
        *scale = half_at(row + i / 32 * BYTES_Q4_0);
    } else if (IS(format, FORMAT_Q4_1)) {
        *scale = half_at(row + i / 32 * BYTES_Q4_1);
        *minimum = half_at(row + i / 32 * BYTES_Q4_1 + 2);
    } else if (IS(format, FORMAT_Q5_0)) {
        *scale = half_at(row + i / 32 * BYTES_Q5_0);
    } else if (IS(format, FORMAT_Q5_1)) {
        *scale = half_at(row + i / 32 * BYTES_Q5_1);
        *minimum = half_at(row + i / 32 * BYTES_Q5_1 + 2);
    } else if (IS(format, FORMAT_Q8_0)) {
        *scale = half_at(row + i / 32 * BYTES_Q8_0);
    } else if (IS(format, FORMAT_IQ4_NL)) {
        *scale = half_at(row + i / 32 * BYTES_IQ4_NL);
    } else if (IS(format, FORMAT_MXFP4)) {
        // half the scale, because the table is doubled; the two smallest exponents are subnormal
        const uint exponent = row[i / 32 * BYTES_MXFP4];
        *scale = bits_to_float(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    } else if (IS(format, FORMAT_Q2_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q2_K;
        const uint both = block[short_part];
        *scale = half_at(block + 80) * float(both & 15u);
        *minimum = -half_at(block + 82) * float(both >> 4);
    } else if (IS(format, FORMAT_Q3_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q3_K;
        const uint s = ((uint(block[96 + short_part % 8]) >> (short_part / 8 * 4)) & 15u) |
            (((uint(block[104 + short_part % 4]) >> (short_part / 4 * 2)) & 3u) << 4);
        *scale = half_at(block + 108) * (float(s) - 32.0f);
    } else if (IS(format, FORMAT_Q4_K) || IS(format, FORMAT_Q5_K)) {
        GLOBAL const uchar* block = row + i / 256 * (IS(format, FORMAT_Q4_K) ? BYTES_Q4_K : BYTES_Q5_K);
        const uint both = four_aligned(block);
        const uint a = block[4 + part % 4], b = block[8 + part % 4], c = block[12 + part % 4];
        const bool is_low = part < 4;
        *scale = half_bits_to_float(ushort(both & 0xffffu)) * float(is_low ? a & 63u : (c & 15u) | ((a >> 6) << 4));
        *minimum = -half_bits_to_float(ushort(both >> 16)) * float(is_low ? b & 63u : (c >> 4) | ((b >> 6) << 4));
    } else if (IS(format, FORMAT_Q6_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q6_K;
        const uint s = block[192 + short_part];
        *scale = half_at(block + 208) * float(int(s << 24) >> 24);
    } else if (IS(format, FORMAT_IQ4_XS)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_IQ4_XS;
        const uint s = ((uint(block[4 + part / 2]) >> (part % 2 * 4)) & 15u) | (((two_bytes(block + 2) >> (part * 2)) & 3u) << 4);
        *scale = half_at(block) * (float(s) - 32.0f);
    }
}

// Dequantizes weights i to i + 7 of a quantized row; i is a multiple of eight.
FUNCTION void load8_blocks(GLOBAL const uchar* row, uint format, uint i, PRIVATE float* y) {
    float scale, minimum;
    scales_of(row, format, i, &scale, &minimum);
    const float offset = minimum - float(zero_of(format)) * scale;
    UNROLL for (uint first = 0; first < 8; first += 4) {
        const uint q = four_quants(row, format, i + first);
        UNROLL for (uint k = 0; k < 4; k++) {
            const float value = has_signed_bytes(format) ? float(int(q << (24 - 8 * k)) >> 24) : float((q >> (8 * k)) & 0xffu);
            y[first + k] = value * scale + offset;
        }
    }
}

// Prefetches a quantized row to the L2 cache, on CUDA.
FUNCTION void prefetch_blocks(GLOBAL const uchar* row, uint num_bytes, uint my_lane) {
    for (uint at = 128 * my_lane; at < num_bytes; at += 128 * 32) PREFETCH(row + at);
}
#endif

// Loads weights i to i + 7 of a row of any format in FORMATS; i is a multiple of eight.
FUNCTION void load8_row(GLOBAL const uchar* row, uint format, uint i, PRIVATE float* y) {
    if (IS_DENSE(format)) {
        load8((GLOBAL const T*)row + i, y);
        return;
    }
#if HAS_BLOCKS
    load8_blocks(row, format, i, y);
#endif
}
