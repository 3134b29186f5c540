// The kernels of `fused.metal` on tensor cores. CUDA only, for f16 and bf16: ranks are multiples of 8, widths multiples of 64, and
// every tensor starts at a multiple of 8 elements.
//
// A warp adds updates to tiles of 8 tokens and 64 columns, as the transposed product of a factor and z. The columns of a product of
// tiles can have any order, so the order is chosen such that a lane gets eight adjacent columns, those from 8 * (lane / 4) on, of
// tokens 2 * (lane % 4) and 2 * (lane % 4) + 1: a warp reads and writes whole cache lines.
// RANK_STEPS is the largest rank / 16, rounded up. Where warps do not share rows, a warp has WARP_TOKENS tokens, and loads the
// factors of an update once for all of them.

#define TILE_TOKENS 8
#define TILE_COLUMNS 64
// Tokens of a block, where its warps share rows.
#define BLOCK_TOKENS 16
#define WARPS 8

// The part of a factor, B or A, that belongs to a tile's columns.
struct Factor {
    uint of[RANK_STEPS][4][4];
};

// Loads the factor B: [columns, rank]; `b` is the row of the lane's first column.
FUNCTION void load_b(const T* b, uint rank, Factor& factor) {
    UNROLL for (uint step = 0; step < RANK_STEPS; step++) {
        const bool has_left = 16 * step < rank, has_right = 16 * step + 8 < rank;
        UNROLL for (uint j = 0; j < 4; j++) {
            const T* row = b + 2 * j * rank + 16 * step + 2 * (lane % 4);
            factor.of[step][j][0] = has_left ? *reinterpret_cast<const uint*>(row) : 0u;
            factor.of[step][j][1] = has_left ? *reinterpret_cast<const uint*>(row + rank) : 0u;
            factor.of[step][j][2] = has_right ? *reinterpret_cast<const uint*>(row + 8) : 0u;
            factor.of[step][j][3] = has_right ? *reinterpret_cast<const uint*>(row + rank + 8) : 0u;
        }
    }
}

// Loads the factor A: [rank, width]; `a` is the lane's first column.
FUNCTION void load_a(const T* a, uint rank, uint width, Factor& factor) {
    UNROLL for (uint step = 0; step < RANK_STEPS; step++) {
        UNROLL for (uint side = 0; side < 2; side++) {
            const T* row = a + wide(16 * step + 8 * side + 2 * (lane % 4)) * width;
            uint4 first = make_uint4(0, 0, 0, 0), second = first;
            if (16 * step + 8 * side < rank) {
                first = *reinterpret_cast<const uint4*>(row);
                second = *reinterpret_cast<const uint4*>(row + width);
            }
            const uint of_first[4] = {first.x, first.y, first.z, first.w};
            const uint of_second[4] = {second.x, second.y, second.z, second.w};
            UNROLL for (uint j = 0; j < 4; j++) {
                factor.of[step][j][2 * side] = __byte_perm(of_first[j], of_second[j], 0x5410);
                factor.of[step][j][2 * side + 1] = __byte_perm(of_first[j], of_second[j], 0x7632);
            }
        }
    }
}

// Adds scale * z B^T, or z A, of a tile of tokens to the lane's columns of its two tokens.
FUNCTION void add_update(
    const T* z, uint rank, float scale, const Factor& factor, uint first, uint tokens, float (*y)[8]) {
    if (rank == 0) return;
    const T* row = z + wide(MINIMUM(first + lane / 4, tokens - 1)) * rank + 2 * (lane % 4);
    float sums[4][4] = {};
    UNROLL for (uint step = 0; step < RANK_STEPS; step++) {
        uint2 of_z = make_uint2(0, 0);
        if (16 * step < rank) of_z.x = *reinterpret_cast<const uint*>(row + 16 * step);
        if (16 * step + 8 < rank) of_z.y = *reinterpret_cast<const uint*>(row + 16 * step + 8);
        UNROLL for (uint j = 0; j < 4; j++) multiply_tiles(sums[j], factor.of[step][j], of_z);
    }
    UNROLL for (uint j = 0; j < 4; j++) {
        UNROLL for (uint e = 0; e < 4; e++) y[e % 2][2 * j + e / 2] += scale * sums[j][e];
    }
}

FUNCTION uint4 load_packed(const T* x) { return *reinterpret_cast<const uint4*>(x); }

FUNCTION void unpack8(uint4 packed, float* y) {
    unpack(packed.x, y);
    unpack(packed.y, y + 2);
    unpack(packed.z, y + 4);
    unpack(packed.w, y + 6);
}

FUNCTION void store8(T* y, const float* x) {
    *reinterpret_cast<uint4*>(y) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// The values as they are after rounding to T.
FUNCTION void round8(float* x) {
    UNROLL for (uint i = 0; i < 8; i += 2) unpack(pack(x[i], x[i + 1]), x + i);
}

// The lane's first column in a tile, its token r, and the offset of both. A token after the last one is replaced with it.
#define COLUMN (8 * (lane / 4))
FUNCTION uint token_of(uint first, uint r) { return first + 2 * (lane % 4) + r; }
FUNCTION wide offset_of(uint first, uint r, uint tokens, uint width, uint column) {
    return wide(MINIMUM(token_of(first, r), tokens - 1)) * width + column;
}

// The error of the fast functions is far below the rounding to T.
FUNCTION float fast_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// The sums over the columns of a block's tokens: each lane has sums of its tokens of both tiles, and gets their totals.
FUNCTION void add_columns_of_block(float (*sums)[2], float (*scratch)[BLOCK_TOKENS]) {
    UNROLL for (uint i = 0; i < 4; i++) {
        float sum = sums[i / 2][i % 2];
        UNROLL for (uint mask = 4; mask < 32; mask *= 2) sum += warp_shuffle_xor(sum, mask);
        if (lane < 4) scratch[warp][TILE_TOKENS * (i / 2) + 2 * lane + i % 2] = sum;
    }
    BARRIER;
    UNROLL for (uint i = 0; i < 4; i++) {
        float sum = 0.0f;
        UNROLL for (uint w = 0; w < WARPS; w++) sum += scratch[w][token_of(TILE_TOKENS * (i / 2), i % 2)];
        sums[i / 2][i % 2] = sum;
    }
    BARRIER;
}

struct RotationWords {
    uint tokens;
    uint q_heads;
    uint kv_heads;
    uint half_dim;
    uint is_rotated;
    uint has_bias[3];
    uint ranks[3];
    float scales[3];
};

// A tile has 32 columns of the first half of a head, and the columns of the second half that are rotated with them: those of
// lane ^ 16.
KERNEL(finish_qkv)
(IN(float, cosines, 0), IN(float, sines, 1), OUT(T, q, 2), OUT(T, k, 3), OUT(T, v, 4), IN(T, q_bias, 5), IN(T, k_bias, 6),
 IN(T, v_bias, 7), IN(T, q_z, 8), IN(T, k_z, 9), IN(T, v_z, 10), IN(T, q_b, 11), IN(T, k_b, 12), IN(T, v_b, 13),
 WORDS(RotationWords, 14) INDICES) {
    const uint tiles_of_head = p.half_dim / (TILE_COLUMNS / 2);
    const uint tile = group.x * WARPS + warp;
    uint head = tile / tiles_of_head;
    if (head >= p.q_heads + 2 * p.kv_heads) return;
    T* x = q;
    const T* bias = q_bias;
    const T* z = q_z;
    const T* b = q_b;
    uint which = 0;
    if (head >= p.q_heads + p.kv_heads) {
        x = v, bias = v_bias, z = v_z, b = v_b, which = 2;
        head -= p.q_heads + p.kv_heads;
    } else if (head >= p.q_heads) {
        x = k, bias = k_bias, z = k_z, b = k_b, which = 1;
        head -= p.q_heads;
    }
    const uint width = (which == 0 ? p.q_heads : p.kv_heads) * 2 * p.half_dim;
    const uint rank = p.ranks[which];
    const bool is_second = lane >= 16;
    const uint i = tile % tiles_of_head * (TILE_COLUMNS / 2) + COLUMN % (TILE_COLUMNS / 2);
    const uint column = head * 2 * p.half_dim + (is_second ? p.half_dim : 0) + i;
    Factor factor;
    if (rank > 0) load_b(b + wide(column) * rank, rank, factor);
    float biases[8] = {};
    if (p.has_bias[which]) load8(bias + column, biases);
    const bool turns = p.is_rotated && which < 2;
    NO_UNROLL for (uint m = 0; m < WARP_TOKENS; m += TILE_TOKENS) {
        const uint first = group.y * WARP_TOKENS + m;
        if (first >= p.tokens) return;
        float values[2][8], c[2][8], s[2][8];
        UNROLL for (uint r = 0; r < 2; r++) {
            load8(x + offset_of(first, r, p.tokens, width, column), values[r]);
            if (turns) {
                const wide at = offset_of(first, r, p.tokens, p.half_dim, i);
                load8_shared(cosines + at, c[r]);
                load8_shared(sines + at, s[r]);
            }
            UNROLL for (uint j = 0; j < 8; j++) values[r][j] += biases[j];
        }
        add_update(z, rank, p.scales[which], factor, first, p.tokens, values);
        UNROLL for (uint r = 0; r < 2; r++) {
            if (turns) {
                UNROLL for (uint j = 0; j < 8; j++) {
                    const float other = warp_shuffle_xor(values[r][j], 16);
                    values[r][j] = values[r][j] * c[r][j] + (is_second ? other : -other) * s[r][j];
                }
            }
            if (token_of(first, r) < p.tokens) store8(x + offset_of(first, r, p.tokens, width, column), values[r]);
        }
    }
}

struct MlpWords {
    uint tokens;
    uint width;
    uint ranks[2];
    float scales[2];
};

// Gate and up are not changed; the backward pass adds the updates again.
KERNEL(finish_mlp)
(IN(T, gate, 0), IN(T, up, 1), OUT(T, y, 2), IN(T, gate_z, 3), IN(T, up_z, 4), IN(T, gate_b, 5), IN(T, up_b, 6),
 WORDS(MlpWords, 7) INDICES) {
    const uint column = (group.x * WARPS + warp) * TILE_COLUMNS + COLUMN;
    if (column >= p.width) return;
    Factor of_gate, of_up;
    if (p.ranks[0] > 0) load_b(gate_b + wide(column) * p.ranks[0], p.ranks[0], of_gate);
    if (p.ranks[1] > 0) load_b(up_b + wide(column) * p.ranks[1], p.ranks[1], of_up);
    NO_UNROLL for (uint m = 0; m < WARP_TOKENS; m += TILE_TOKENS) {
        const uint first = group.y * WARP_TOKENS + m;
        if (first >= p.tokens) return;
        float g[2][8], u[2][8];
        UNROLL for (uint r = 0; r < 2; r++) {
            const wide at = offset_of(first, r, p.tokens, p.width, column);
            load8(gate + at, g[r]);
            load8(up + at, u[r]);
        }
        add_update(gate_z, p.ranks[0], p.scales[0], of_gate, first, p.tokens, g);
        add_update(up_z, p.ranks[1], p.scales[1], of_up, first, p.tokens, u);
        UNROLL for (uint r = 0; r < 2; r++) {
            UNROLL for (uint j = 0; j < 8; j++) g[r][j] = g[r][j] * fast_sigmoid(g[r][j]) * u[r][j];
            if (token_of(first, r) < p.tokens) store8(y + offset_of(first, r, p.tokens, p.width, column), g[r]);
        }
    }
}

struct MlpBackwardWords {
    uint tokens;
    uint width;
    uint rank;
    uint ranks[2];
    float scales[2];
};

KERNEL(finish_mlp_backward)
(IN(T, gate, 0), IN(T, up, 1), OUT(T, dy, 2), OUT(T, d_up, 3), OUT(T, y, 4), IN(T, dz, 5), IN(T, a, 6), IN(T, gate_z, 7),
 IN(T, up_z, 8), IN(T, gate_b, 9), IN(T, up_b, 10), WORDS(MlpBackwardWords, 11) INDICES) {
    const uint column = (group.x * WARPS + warp) * TILE_COLUMNS + COLUMN;
    if (column >= p.width) return;
    Factor of_dy, of_gate, of_up;
    if (p.rank > 0) load_a(a + column, p.rank, p.width, of_dy);
    if (p.ranks[0] > 0) load_b(gate_b + wide(column) * p.ranks[0], p.ranks[0], of_gate);
    if (p.ranks[1] > 0) load_b(up_b + wide(column) * p.ranks[1], p.ranks[1], of_up);
    NO_UNROLL for (uint m = 0; m < WARP_TOKENS; m += TILE_TOKENS) {
        const uint first = group.y * WARP_TOKENS + m;
        if (first >= p.tokens) return;
        // all loads are started before the first value is needed
        uint4 packed[2][3];
        UNROLL for (uint r = 0; r < 2; r++) {
            const wide at = offset_of(first, r, p.tokens, p.width, column);
            packed[r][0] = load_packed(gate + at);
            packed[r][1] = load_packed(up + at);
            packed[r][2] = load_packed(dy + at);
        }
        float g[2][8], u[2][8], d[2][8];
        UNROLL for (uint r = 0; r < 2; r++) {
            unpack8(packed[r][0], g[r]);
            unpack8(packed[r][1], u[r]);
            unpack8(packed[r][2], d[r]);
        }
        add_update(gate_z, p.ranks[0], p.scales[0], of_gate, first, p.tokens, g);
        add_update(up_z, p.ranks[1], p.scales[1], of_up, first, p.tokens, u);
        add_update(dz, p.rank, 1.0f, of_dy, first, p.tokens, d);
        UNROLL for (uint r = 0; r < 2; r++) {
            UNROLL for (uint j = 0; j < 8; j++) {
                const float s = fast_sigmoid(g[r][j]);
                const float slope = u[r][j] * s * (1.0f + g[r][j] * (1.0f - s));
                g[r][j] *= s;
                u[r][j] *= g[r][j];
                g[r][j] *= d[r][j];
                d[r][j] *= slope;
            }
            if (token_of(first, r) < p.tokens) {
                const wide at = offset_of(first, r, p.tokens, p.width, column);
                store8(y + at, u[r]);
                store8(d_up + at, g[r]);
                store8(dy + at, d[r]);
            }
        }
    }
}

struct StreamWords {
    uint tokens;
    uint width;
    float eps;
    uint has_norm;
    uint rank;
    float scale;
};

// A block has BLOCK_TOKENS tokens.
KERNEL(finish_stream)
(IN(T, residual, 0), OUT(T, y, 1), IN(T, weight, 2), OUT(T, normed, 3), IN(T, z, 4), IN(T, b, 5), WORDS(StreamWords, 6)
 INDICES) {
    __shared__ float scratch[WARPS][BLOCK_TOKENS];
    const uint start = group.x * BLOCK_TOKENS;
    float squares[2][2] = {};
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        const uint column = tile + COLUMN;
        Factor factor;
        if (p.rank > 0) load_b(b + wide(column) * p.rank, p.rank, factor);
        uint4 packed[2][2][2];
        UNROLL for (uint t = 0; t < 2; t++) {
            UNROLL for (uint r = 0; r < 2; r++) {
                const wide at = offset_of(start + TILE_TOKENS * t, r, p.tokens, p.width, column);
                packed[t][r][0] = load_packed(y + at);
                packed[t][r][1] = load_packed(residual + at);
            }
        }
        UNROLL for (uint t = 0; t < 2; t++) {
            const uint first = start + TILE_TOKENS * t;
            float sums[2][8];
            UNROLL for (uint r = 0; r < 2; r++) {
                float other[8];
                unpack8(packed[t][r][0], sums[r]);
                unpack8(packed[t][r][1], other);
                UNROLL for (uint j = 0; j < 8; j++) sums[r][j] += other[j];
            }
            add_update(z, p.rank, p.scale, factor, first, p.tokens, sums);
            UNROLL for (uint r = 0; r < 2; r++) {
                if (token_of(first, r) >= p.tokens) continue;
                store8(y + offset_of(first, r, p.tokens, p.width, column), sums[r]);
                round8(sums[r]);
                UNROLL for (uint j = 0; j < 8; j++) squares[t][r] += sums[r][j] * sums[r][j];
            }
        }
    }
    if (!p.has_norm) return;
    add_columns_of_block(squares, scratch);
    UNROLL for (uint i = 0; i < 4; i++) squares[i / 2][i % 2] = RSQRT(squares[i / 2][i % 2] / float(p.width) + p.eps);
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        const uint column = tile + COLUMN;
        float w[8];
        load8(weight + column, w);
        uint4 packed[4];
        UNROLL for (uint i = 0; i < 4; i++) {
            packed[i] = load_packed(y + offset_of(start + TILE_TOKENS * (i / 2), i % 2, p.tokens, p.width, column));
        }
        UNROLL for (uint i = 0; i < 4; i++) {
            const uint first = start + TILE_TOKENS * (i / 2);
            if (token_of(first, i % 2) >= p.tokens) continue;
            float value[8];
            unpack8(packed[i], value);
            UNROLL for (uint j = 0; j < 8; j++) value[j] *= squares[i / 2][i % 2] * w[j];
            store8(normed + offset_of(first, i % 2, p.tokens, p.width, column), value);
        }
    }
}

struct NormBackwardWords {
    uint tokens;
    uint width;
    float eps;
    uint ranks[3];
};

// A block has BLOCK_TOKENS tokens.
KERNEL(finish_norm_backward)
(IN(T, x, 0), IN(T, weight, 1), OUT(T, dy, 2), IN(T, before, 3), OUT(T, normed, 4), IN(T, dz0, 5), IN(T, dz1, 6),
 IN(T, dz2, 7), IN(T, a0, 8), IN(T, a1, 9), IN(T, a2, 10), WORDS(NormBackwardWords, 11) INDICES) {
    __shared__ float scratch[WARPS][BLOCK_TOKENS];
    const T* dzs[3] = {dz0, dz1, dz2};
    const T* as[3] = {a0, a1, a2};
    const uint start = group.x * BLOCK_TOKENS;
    float squares[2][2] = {}, dots[2][2] = {};
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        const uint column = tile + COLUMN;
        // all loads are started before the first value is needed
        float w[8], sums[2][2][8];
        uint4 of_x[2][2];
        load8(weight + column, w);
        UNROLL for (uint t = 0; t < 2; t++) {
            UNROLL for (uint r = 0; r < 2; r++) {
                const wide at = offset_of(start + TILE_TOKENS * t, r, p.tokens, p.width, column);
                load8(dy + at, sums[t][r]);
                of_x[t][r] = load_packed(x + at);
            }
        }
        UNROLL for (uint i = 0; i < 3; i++) {
            if (p.ranks[i] == 0) continue;
            Factor factor;
            load_a(as[i] + column, p.ranks[i], p.width, factor);
            UNROLL for (uint t = 0; t < 2; t++) {
                add_update(dzs[i], p.ranks[i], 1.0f, factor, start + TILE_TOKENS * t, p.tokens, sums[t]);
            }
        }
        UNROLL for (uint t = 0; t < 2; t++) {
            const uint first = start + TILE_TOKENS * t;
            UNROLL for (uint r = 0; r < 2; r++) {
                if (token_of(first, r) >= p.tokens) continue;
                float value[8];
                unpack8(of_x[t][r], value);
                store8(dy + offset_of(first, r, p.tokens, p.width, column), sums[t][r]);
                round8(sums[t][r]);
                UNROLL for (uint j = 0; j < 8; j++) {
                    squares[t][r] += value[j] * value[j];
                    dots[t][r] += sums[t][r][j] * w[j] * value[j];
                }
            }
        }
    }
    add_columns_of_block(squares, scratch);
    add_columns_of_block(dots, scratch);
    UNROLL for (uint i = 0; i < 4; i++) {
        const float scale = RSQRT(squares[i / 2][i % 2] / float(p.width) + p.eps);
        squares[i / 2][i % 2] = scale;
        dots[i / 2][i % 2] *= scale / float(p.width);
    }
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        const uint column = tile + COLUMN;
        float w[8];
        load8(weight + column, w);
        UNROLL for (uint t = 0; t < 2; t++) {
            const uint first = start + TILE_TOKENS * t;
            uint4 packed[2][3];
            UNROLL for (uint r = 0; r < 2; r++) {
                const wide at = offset_of(first, r, p.tokens, p.width, column);
                packed[r][0] = load_packed(x + at);
                packed[r][1] = load_packed(dy + at);
                packed[r][2] = load_packed(before + at);
            }
            UNROLL for (uint r = 0; r < 2; r++) {
                if (token_of(first, r) >= p.tokens) continue;
                const wide at = offset_of(first, r, p.tokens, p.width, column);
                float value[8], d[8], through[8];
                unpack8(packed[r][0], value);
                unpack8(packed[r][1], d);
                unpack8(packed[r][2], through);
                UNROLL for (uint j = 0; j < 8; j++) {
                    const float n = value[j] * squares[t][r];
                    value[j] = n * w[j];
                    through[j] += (d[j] * w[j] - n * dots[t][r]) * squares[t][r];
                }
                store8(normed + at, value);
                store8(dy + at, through);
            }
        }
    }
}
