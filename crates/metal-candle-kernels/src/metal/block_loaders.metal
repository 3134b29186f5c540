// Rows of weights: elements of type T, or quantized blocks as GGUF files store them (`blocks/` has the same formats for the CPU).
//
// FORMAT_<name> and BYTES_<name> are defined for each format before this text; format 0 is T itself. Bit `i` of FORMATS says
// whether matrices of format `i` occur. Where only one does, no kernel asks which it is.
#ifndef FORMATS
#define FORMATS 1
#endif
#define HAS(format) ((FORMATS >> (format)) & 1)
#define HAS_BLOCKS (FORMATS > 1)
#define IS(found, format) (HAS(format) && (FORMATS == (1 << (format)) || (found) == (format)))
#define IS_DENSE(found) IS(found, 0)

// The bytes of a row of so many weights.
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

// A row of a matrix.
FUNCTION GLOBAL const uchar* row_of(GLOBAL const uchar* w, uint format, uint row, uint columns) {
    return w + wide(row) * row_bytes(format, columns);
}

#if HAS_BLOCKS
// Blocks whose length is not a multiple of four begin at even addresses, those of MXFP4 anywhere.
FUNCTION uint two_bytes(GLOBAL const uchar* from) { return *(GLOBAL const ushort*)from; }
FUNCTION uint four_bytes(GLOBAL const uchar* from) { return two_bytes(from) | (two_bytes(from + 2) << 16); }
FUNCTION uint four_aligned(GLOBAL const uchar* from) { return *(GLOBAL const uint*)from; }
FUNCTION uint four_single(GLOBAL const uchar* from) {
    return uint(from[0]) | (uint(from[1]) << 8) | (uint(from[2]) << 16) | (uint(from[3]) << 24);
}
FUNCTION float half_at(GLOBAL const uchar* from) { return half_bits_to_float(ushort(two_bytes(from))); }

// scale q + offset for the bytes q of two words, and for signed bytes without an offset.
FUNCTION void shifted(uint low, uint high, float scale, float offset, PRIVATE float* y) {
    UNROLL for (uint k = 0; k < 4; k++) {
        y[k] = float((low >> (8 * k)) & 0xffu) * scale + offset;
        y[4 + k] = float((high >> (8 * k)) & 0xffu) * scale + offset;
    }
}
FUNCTION void scaled(uint low, uint high, float scale, PRIVATE float* y) {
    UNROLL for (uint k = 0; k < 4; k++) {
        y[k] = float(int(low << (24 - 8 * k)) >> 24) * scale;
        y[4 + k] = float(int(high << (24 - 8 * k)) >> 24) * scale;
    }
}

// The signed byte with this index in a table of sixteen, four of them a word.
FUNCTION float looked_up(uint index, uint t0, uint t1, uint t2, uint t3) {
    const uint word = index < 8 ? (index < 4 ? t0 : t1) : (index < 12 ? t2 : t3);
    return float(int(word << (24 - 8 * (index & 3))) >> 24);
}
FUNCTION void looked_up8(
    uint low, uint high, uint t0, uint t1, uint t2, uint t3, float scale, PRIVATE float* y) {
    UNROLL for (uint k = 0; k < 4; k++) {
        y[k] = looked_up((low >> (8 * k)) & 15u, t0, t1, t2, t3) * scale;
        y[4 + k] = looked_up((high >> (8 * k)) & 15u, t0, t1, t2, t3) * scale;
    }
}
// The tables of IQ4_NL and IQ4_XS, and of MXFP4 (doubled).
#define IQ4_TABLE 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u
#define FP4_TABLE 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu

// Four bits of each byte of `bits`, from bit `from` on a single one, moved to bit `to`.
FUNCTION uint one_bit(uint bits, uint from, uint to) { return ((bits >> from) & 0x01010101u) << to; }
// The four lowest bits of a word as the fifth bits of four bytes.
FUNCTION uint fifth_bits(uint bits) {
    return ((bits & 1u) << 4) | ((bits & 2u) << 11) | ((bits & 4u) << 18) | ((bits & 8u) << 25);
}

// The scale and the minimum of group `group` of a block of Q4_K or Q5_K, of 6 bits each.
FUNCTION void scale_and_minimum(GLOBAL const uchar* block, uint group_of_block, PRIVATE float* scale, PRIVATE float* minimum) {
    const uint both = four_aligned(block);
    const uint place = group_of_block & 3u;
    const uint a = block[4 + place], b = block[8 + place], c = block[12 + place];
    const bool is_low = group_of_block < 4;
    const uint q = is_low ? a & 63u : (c & 15u) | ((a >> 6) << 4);
    const uint m = is_low ? b & 63u : (c >> 4) | ((b >> 6) << 4);
    *scale = half_bits_to_float(ushort(both & 0xffffu)) * float(q);
    *minimum = half_bits_to_float(ushort(both >> 16)) * float(m);
}

// The weights i to i + 7 of a quantized row; i is a multiple of eight.
FUNCTION void load8_blocks(GLOBAL const uchar* row, uint format, uint i, PRIVATE float* y) {
    const uint nibble = i / 16 % 2 * 4;
    const uint mask = 0x0f0f0f0fu;
    if (IS(format, FORMAT_Q4_0)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q4_0;
        GLOBAL const uchar* q = block + 2 + i % 16;
        const float d = half_at(block);
        shifted((four_bytes(q) >> nibble) & mask, (four_bytes(q + 4) >> nibble) & mask, d, -8.0f * d, y);
    } else if (IS(format, FORMAT_Q4_1)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q4_1;
        GLOBAL const uchar* q = block + 4 + i % 16;
        shifted(
            (four_aligned(q) >> nibble) & mask, (four_aligned(q + 4) >> nibble) & mask, half_at(block), half_at(block + 2), y);
    } else if (IS(format, FORMAT_Q5_0)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q5_0;
        GLOBAL const uchar* q = block + 6 + i % 16;
        const float d = half_at(block);
        const uint bits = four_bytes(block + 2) >> (i % 32);
        const uint low = ((four_bytes(q) >> nibble) & mask) | fifth_bits(bits);
        const uint high = ((four_bytes(q + 4) >> nibble) & mask) | fifth_bits(bits >> 4);
        shifted(low, high, d, -16.0f * d, y);
    } else if (IS(format, FORMAT_Q5_1)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q5_1;
        GLOBAL const uchar* q = block + 8 + i % 16;
        const uint bits = four_aligned(block + 4) >> (i % 32);
        const uint low = ((four_aligned(q) >> nibble) & mask) | fifth_bits(bits);
        const uint high = ((four_aligned(q + 4) >> nibble) & mask) | fifth_bits(bits >> 4);
        shifted(low, high, half_at(block), half_at(block + 2), y);
    } else if (IS(format, FORMAT_Q8_0)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_Q8_0;
        GLOBAL const uchar* q = block + 2 + i % 32;
        scaled(four_bytes(q), four_bytes(q + 4), half_at(block), y);
    } else if (IS(format, FORMAT_IQ4_NL)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_IQ4_NL;
        GLOBAL const uchar* q = block + 2 + i % 16;
        looked_up8(four_bytes(q) >> nibble, four_bytes(q + 4) >> nibble, IQ4_TABLE, half_at(block), y);
    } else if (IS(format, FORMAT_MXFP4)) {
        GLOBAL const uchar* block = row + i / 32 * BYTES_MXFP4;
        GLOBAL const uchar* q = block + 1 + i % 16;
        // half of the scale, since the table is doubled; the two smallest are subnormal
        const uint exponent = block[0];
        const float scale = bits_to_float(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
        looked_up8(four_single(q) >> nibble, four_single(q + 4) >> nibble, FP4_TABLE, scale, y);
    } else if (IS(format, FORMAT_Q2_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q2_K;
        GLOBAL const uchar* q = block + 16 + i / 128 % 2 * 32 + i % 32;
        const uint shift = i / 32 % 4 * 2;
        const uint both = block[i / 16 % 16];
        const float scale = half_at(block + 80) * float(both & 15u);
        const float minimum = half_at(block + 82) * float(both >> 4);
        shifted(
            (four_aligned(q) >> shift) & 0x03030303u, (four_aligned(q + 4) >> shift) & 0x03030303u, scale, -minimum, y);
    } else if (IS(format, FORMAT_Q3_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q3_K;
        GLOBAL const uchar* q = block + 32 + i / 128 % 2 * 32 + i % 32;
        GLOBAL const uchar* bits = block + i % 32;
        const uint shift = i / 32 % 4 * 2, bit = i / 32 % 8, part = i / 16 % 16;
        const uint low = ((four_bytes(q) >> shift) & 0x03030303u) | one_bit(four_bytes(bits), bit, 2);
        const uint high = ((four_bytes(q + 4) >> shift) & 0x03030303u) | one_bit(four_bytes(bits + 4), bit, 2);
        const uint s = ((uint(block[96 + part % 8]) >> (part / 8 * 4)) & 15u) |
            (((uint(block[104 + part % 4]) >> (part / 4 * 2)) & 3u) << 4);
        const float scale = half_at(block + 108) * (float(s) - 32.0f);
        shifted(low, high, scale, -4.0f * scale, y);
    } else if (IS(format, FORMAT_Q4_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q4_K;
        const uint part = i / 32 % 8;
        const uint2 q = *(GLOBAL const uint2*)(block + 16 + part / 2 * 32 + i % 32);
        const uint shift = part % 2 * 4;
        float scale, minimum;
        scale_and_minimum(block, part, &scale, &minimum);
        shifted((q.x >> shift) & mask, (q.y >> shift) & mask, scale, -minimum, y);
    } else if (IS(format, FORMAT_Q5_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q5_K;
        const uint part = i / 32 % 8;
        const uint2 q = *(GLOBAL const uint2*)(block + 48 + part / 2 * 32 + i % 32);
        const uint2 bits = *(GLOBAL const uint2*)(block + 16 + i % 32);
        const uint shift = part % 2 * 4;
        float scale, minimum;
        scale_and_minimum(block, part, &scale, &minimum);
        const uint low = ((q.x >> shift) & mask) | one_bit(bits.x, part, 4);
        const uint high = ((q.y >> shift) & mask) | one_bit(bits.y, part, 4);
        shifted(low, high, scale, -minimum, y);
    } else if (IS(format, FORMAT_Q6_K)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_Q6_K;
        const uint upper = i / 128 % 2, quarter = i / 32 % 4;
        GLOBAL const uchar* q = block + 64 * upper + quarter % 2 * 32 + i % 32;
        GLOBAL const uchar* bits = block + 128 + 32 * upper + i % 32;
        const uint shift = quarter / 2 * 4, pair = quarter * 2;
        const uint low = ((four_bytes(q) >> shift) & mask) | (((four_bytes(bits) >> pair) & 0x03030303u) << 4);
        const uint high = ((four_bytes(q + 4) >> shift) & mask) | (((four_bytes(bits + 4) >> pair) & 0x03030303u) << 4);
        const uint s = block[192 + i / 16 % 16];
        const float scale = half_at(block + 208) * float(int(s << 24) >> 24);
        shifted(low, high, scale, -32.0f * scale, y);
    } else if (IS(format, FORMAT_IQ4_XS)) {
        GLOBAL const uchar* block = row + i / 256 * BYTES_IQ4_XS;
        const uint part = i / 32 % 8;
        const uint2 q = *(GLOBAL const uint2*)(block + 8 + part * 16 + i % 16);
        const uint s = ((uint(block[4 + part / 2]) >> (part % 2 * 4)) & 15u) | (((two_bytes(block + 2) >> (part * 2)) & 3u) << 4);
        looked_up8(q.x >> nibble, q.y >> nibble, IQ4_TABLE, half_at(block) * (float(s) - 32.0f), y);
    }
}

// Asks for the lines of a quantized row that the warp will read soon.
FUNCTION void ask_for_blocks(GLOBAL const uchar* row, uint num_bytes, uint my_lane) {
    for (uint at = 128 * my_lane; at < num_bytes; at += 128 * 32) PREFETCH(row + at);
}
#endif

// The weights i to i + 7 of a row of any format that occurs; i is a multiple of eight.
FUNCTION void load8_row(GLOBAL const uchar* row, uint format, uint i, PRIVATE float* y) {
    if (IS_DENSE(format)) {
        load8((GLOBAL const T*)row + i, y);
        return;
    }
#if HAS_BLOCKS
    load8_blocks(row, format, i, y);
#endif
}
