// The kernels of `fused.metal` on tensor cores. CUDA only, for f16 and bf16: ranks are multiples of 8, widths multiples of 32, and
// every tensor starts at a multiple of 8 elements.
//
// A warp adds updates to tiles of 16 tokens and 32 columns. The columns of a product of tiles can have any order, so the order is
// chosen such that each lane gets eight adjacent columns of tokens g = lane / 4 and g + 8: those from 8 * (lane % 4) on.
// RANK_STEPS is the largest rank / 16, rounded up. Where warps do not share rows, a warp has WARP_TOKENS tokens, and loads the
// factors of an update once for all of them.

#define TILE_TOKENS 16
#define TILE_COLUMNS 32
#define WARPS 8

// The part of a factor, B or A, that belongs to 32 columns of the result.
struct Factor {
    uint2 of[RANK_STEPS][4];
};

// The column that a lane holds for tile j of eight columns.
FUNCTION uint factor_column(uint j) { return lane / 8 * 8 + 2 * j + lane / 4 % 2; }

// Loads columns first.. of B^T, with B: [columns, rank].
FUNCTION void load_b(const T* b, uint rank, uint first, Factor& factor) {
    UNROLL for (uint step = 0; step < RANK_STEPS; step++) {
        const uint r = 16 * step + 2 * (lane % 4);
        UNROLL for (uint j = 0; j < 4; j++) {
            const T* row = b + wide(first + factor_column(j)) * rank + r;
            factor.of[step][j].x = 16 * step < rank ? *reinterpret_cast<const uint*>(row) : 0u;
            factor.of[step][j].y = 16 * step + 8 < rank ? *reinterpret_cast<const uint*>(row + 8) : 0u;
        }
    }
}

// Loads columns first.. of A: [rank, width].
FUNCTION void load_a(const T* a, uint rank, uint width, uint first, Factor& factor) {
    UNROLL for (uint step = 0; step < RANK_STEPS; step++) {
        UNROLL for (uint j = 0; j < 4; j++) {
            const T* from = a + wide(16 * step + 2 * (lane % 4)) * width + first + factor_column(j);
            uint2 pairs = make_uint2(0, 0);
            if (16 * step < rank) pairs.x = from[0].bits | (uint(from[width].bits) << 16);
            if (16 * step + 8 < rank) pairs.y = from[8 * wide(width)].bits | (uint(from[9 * wide(width)].bits) << 16);
            factor.of[step][j] = pairs;
        }
    }
}

// Adds scale * z B^T, or z A, of a tile of tokens to the lane's columns of its two tokens.
FUNCTION void add_update(
    const T* z, uint rank, float scale, const Factor& factor, uint first, uint tokens, float (*y)[8]) {
    if (rank == 0) return;
    const uint g = lane / 4, q = lane % 4;
    const T* upper = z + MINIMUM(first + g, tokens - 1) * rank + 2 * q;
    const T* lower = z + MINIMUM(first + g + 8, tokens - 1) * rank + 2 * q;
    float sums[4][4] = {};
    UNROLL for (uint step = 0; step < RANK_STEPS; step++) {
        const uint r = 16 * step;
        uint of_z[4] = {};
        if (r < rank) {
            of_z[0] = *reinterpret_cast<const uint*>(upper + r);
            of_z[1] = *reinterpret_cast<const uint*>(lower + r);
        }
        if (r + 8 < rank) {
            of_z[2] = *reinterpret_cast<const uint*>(upper + r + 8);
            of_z[3] = *reinterpret_cast<const uint*>(lower + r + 8);
        }
        UNROLL for (uint j = 0; j < 4; j++) multiply_tiles(sums[j], of_z, factor.of[step][j]);
    }
    UNROLL for (uint j = 0; j < 4; j++) {
        UNROLL for (uint e = 0; e < 4; e++) y[e / 2][2 * j + e % 2] += scale * sums[j][e];
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

// The offset of the lane's columns of its token r. A token after the last one is replaced with it.
FUNCTION wide offset_of(uint first, uint r, uint tokens, uint width, uint tile) {
    return wide(MINIMUM(first + 8 * r + lane / 4, tokens - 1)) * width + tile + 8 * (lane % 4);
}

// The error of the fast functions is far below the rounding to T.
FUNCTION float fast_sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// The sums over the columns of a block's tile of tokens: each lane has sums of its two tokens, and gets their totals.
FUNCTION void add_columns_of_block(float* sums, float (*scratch)[TILE_TOKENS]) {
    UNROLL for (uint i = 0; i < 2; i++) {
        sums[i] += warp_shuffle_xor(sums[i], 1);
        sums[i] += warp_shuffle_xor(sums[i], 2);
        if (lane % 4 == 0) scratch[warp][8 * i + lane / 4] = sums[i];
    }
    BARRIER;
    UNROLL for (uint i = 0; i < 2; i++) {
        sums[i] = 0.0f;
        UNROLL for (uint w = 0; w < WARPS; w++) sums[i] += scratch[w][8 * i + lane / 4];
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

// A warp has 32 columns of the first half of a head, and the same columns of the second half.
KERNEL(finish_qkv)
(IN(float, cosines, 0), IN(float, sines, 1), OUT(T, q, 2), OUT(T, k, 3), OUT(T, v, 4), IN(T, q_bias, 5), IN(T, k_bias, 6),
 IN(T, v_bias, 7), IN(T, q_z, 8), IN(T, k_z, 9), IN(T, v_z, 10), IN(T, q_b, 11), IN(T, k_b, 12), IN(T, v_b, 13),
 WORDS(RotationWords, 14) INDICES) {
    const uint tiles_of_head = p.half_dim / TILE_COLUMNS;
    const uint tile = group.x * WARPS + warp;
    uint head = tile / tiles_of_head;
    const uint i = tile % tiles_of_head * TILE_COLUMNS + 8 * (lane % 4);
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
    const wide width = wide(which == 0 ? p.q_heads : p.kv_heads) * 2 * p.half_dim;
    const uint rank = p.ranks[which];
    const uint columns[2] = {head * 2 * p.half_dim + i, head * 2 * p.half_dim + p.half_dim + i};
    Factor factors[2];
    float biases[2][8] = {};
    UNROLL for (uint half = 0; half < 2; half++) {
        if (rank > 0) load_b(b, rank, columns[half] - 8 * (lane % 4), factors[half]);
        if (p.has_bias[which]) load8(bias + columns[half], biases[half]);
    }
    const bool turns = p.is_rotated && which < 2;
    NO_UNROLL for (uint m = 0; m < WARP_TOKENS; m += TILE_TOKENS) {
        const uint first = group.y * WARP_TOKENS + m;
        if (first >= p.tokens) return;
        float values[2][2][8];
        UNROLL for (uint half = 0; half < 2; half++) {
            UNROLL for (uint r = 0; r < 2; r++) {
                const uint token = MINIMUM(first + 8 * r + lane / 4, p.tokens - 1);
                load8(x + token * width + columns[half], values[half][r]);
                UNROLL for (uint j = 0; j < 8; j++) values[half][r][j] += biases[half][j];
            }
            add_update(z, rank, p.scales[which], factors[half], first, p.tokens, values[half]);
        }
        UNROLL for (uint r = 0; r < 2; r++) {
            const uint token = first + 8 * r + lane / 4;
            if (token >= p.tokens) continue;
            if (turns) {
                float c[8], s[8];
                load8_shared(cosines + token * p.half_dim + i, c);
                load8_shared(sines + token * p.half_dim + i, s);
                UNROLL for (uint j = 0; j < 8; j++) {
                    const float low = values[0][r][j], high = values[1][r][j];
                    values[0][r][j] = low * c[j] - high * s[j];
                    values[1][r][j] = high * c[j] + low * s[j];
                }
            }
            UNROLL for (uint half = 0; half < 2; half++) store8(x + token * width + columns[half], values[half][r]);
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
    const uint tile = (group.x * WARPS + warp) * TILE_COLUMNS;
    if (tile >= p.width) return;
    Factor of_gate, of_up;
    if (p.ranks[0] > 0) load_b(gate_b, p.ranks[0], tile, of_gate);
    if (p.ranks[1] > 0) load_b(up_b, p.ranks[1], tile, of_up);
    NO_UNROLL for (uint m = 0; m < WARP_TOKENS; m += TILE_TOKENS) {
        const uint first = group.y * WARP_TOKENS + m;
        if (first >= p.tokens) return;
        float g[2][8], u[2][8];
        UNROLL for (uint r = 0; r < 2; r++) {
            load8(gate + offset_of(first, r, p.tokens, p.width, tile), g[r]);
            load8(up + offset_of(first, r, p.tokens, p.width, tile), u[r]);
        }
        add_update(gate_z, p.ranks[0], p.scales[0], of_gate, first, p.tokens, g);
        add_update(up_z, p.ranks[1], p.scales[1], of_up, first, p.tokens, u);
        UNROLL for (uint r = 0; r < 2; r++) {
            UNROLL for (uint j = 0; j < 8; j++) g[r][j] = g[r][j] * fast_sigmoid(g[r][j]) * u[r][j];
            if (first + 8 * r + lane / 4 < p.tokens) store8(y + offset_of(first, r, p.tokens, p.width, tile), g[r]);
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
    const uint tile = (group.x * WARPS + warp) * TILE_COLUMNS;
    if (tile >= p.width) return;
    Factor of_dy, of_gate, of_up;
    if (p.rank > 0) load_a(a, p.rank, p.width, tile, of_dy);
    if (p.ranks[0] > 0) load_b(gate_b, p.ranks[0], tile, of_gate);
    if (p.ranks[1] > 0) load_b(up_b, p.ranks[1], tile, of_up);
    NO_UNROLL for (uint m = 0; m < WARP_TOKENS; m += TILE_TOKENS) {
        const uint first = group.y * WARP_TOKENS + m;
        if (first >= p.tokens) return;
        // all loads are started before the first value is needed
        uint4 packed[2][3];
        UNROLL for (uint r = 0; r < 2; r++) {
            const wide at = offset_of(first, r, p.tokens, p.width, tile);
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
            if (first + 8 * r + lane / 4 < p.tokens) {
                const wide at = offset_of(first, r, p.tokens, p.width, tile);
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

// A block has a tile of tokens.
KERNEL(finish_stream)
(IN(T, residual, 0), OUT(T, y, 1), IN(T, weight, 2), OUT(T, normed, 3), IN(T, z, 4), IN(T, b, 5), WORDS(StreamWords, 6)
 INDICES) {
    __shared__ float scratch[WARPS][TILE_TOKENS];
    const uint first = group.x * TILE_TOKENS;
    float squares[2] = {};
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        Factor factor;
        if (p.rank > 0) load_b(b, p.rank, tile, factor);
        float sums[2][8];
        wide at[2];
        UNROLL for (uint r = 0; r < 2; r++) {
            at[r] = wide(MINIMUM(first + 8 * r + lane / 4, p.tokens - 1)) * p.width + tile + 8 * (lane % 4);
            float other[8];
            load8(y + at[r], sums[r]);
            load8(residual + at[r], other);
            UNROLL for (uint j = 0; j < 8; j++) sums[r][j] += other[j];
        }
        add_update(z, p.rank, p.scale, factor, first, p.tokens, sums);
        UNROLL for (uint r = 0; r < 2; r++) {
            if (first + 8 * r + lane / 4 >= p.tokens) continue;
            store8(y + at[r], sums[r]);
            round8(sums[r]);
            UNROLL for (uint j = 0; j < 8; j++) squares[r] += sums[r][j] * sums[r][j];
        }
    }
    if (!p.has_norm) return;
    add_columns_of_block(squares, scratch);
    UNROLL for (uint r = 0; r < 2; r++) squares[r] = RSQRT(squares[r] / float(p.width) + p.eps);
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        float w[8];
        load8(weight + tile + 8 * (lane % 4), w);
        UNROLL for (uint r = 0; r < 2; r++) {
            const uint token = first + 8 * r + lane / 4;
            if (token >= p.tokens) continue;
            const wide at = wide(token) * p.width + tile + 8 * (lane % 4);
            float value[8];
            load8(y + at, value);
            UNROLL for (uint j = 0; j < 8; j++) value[j] *= squares[r] * w[j];
            store8(normed + at, value);
        }
    }
}

struct NormBackwardWords {
    uint tokens;
    uint width;
    float eps;
    uint ranks[3];
};

// A block has a tile of tokens.
KERNEL(finish_norm_backward)
(IN(T, x, 0), IN(T, weight, 1), OUT(T, dy, 2), IN(T, before, 3), OUT(T, normed, 4), IN(T, dz0, 5), IN(T, dz1, 6),
 IN(T, dz2, 7), IN(T, a0, 8), IN(T, a1, 9), IN(T, a2, 10), WORDS(NormBackwardWords, 11) INDICES) {
    __shared__ float scratch[WARPS][TILE_TOKENS];
    const T* dzs[3] = {dz0, dz1, dz2};
    const T* as[3] = {a0, a1, a2};
    const uint first = group.x * TILE_TOKENS;
    float squares[2] = {}, dots[2] = {};
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        // all loads are started before the first value is needed
        float sums[2][8], w[8];
        uint4 of_x[2];
        load8(weight + tile + 8 * (lane % 4), w);
        UNROLL for (uint r = 0; r < 2; r++) {
            const wide at = offset_of(first, r, p.tokens, p.width, tile);
            load8(dy + at, sums[r]);
            of_x[r] = load_packed(x + at);
        }
        UNROLL for (uint i = 0; i < 3; i++) {
            if (p.ranks[i] == 0) continue;
            Factor factor;
            load_a(as[i], p.ranks[i], p.width, tile, factor);
            add_update(dzs[i], p.ranks[i], 1.0f, factor, first, p.tokens, sums);
        }
        UNROLL for (uint r = 0; r < 2; r++) {
            if (first + 8 * r + lane / 4 >= p.tokens) continue;
            float value[8];
            unpack8(of_x[r], value);
            store8(dy + offset_of(first, r, p.tokens, p.width, tile), sums[r]);
            round8(sums[r]);
            UNROLL for (uint j = 0; j < 8; j++) {
                squares[r] += value[j] * value[j];
                dots[r] += sums[r][j] * w[j] * value[j];
            }
        }
    }
    add_columns_of_block(squares, scratch);
    add_columns_of_block(dots, scratch);
    UNROLL for (uint r = 0; r < 2; r++) {
        squares[r] = RSQRT(squares[r] / float(p.width) + p.eps);
        dots[r] *= squares[r] / float(p.width);
    }
    for (uint tile = warp * TILE_COLUMNS; tile < p.width; tile += WARPS * TILE_COLUMNS) {
        float w[8];
        load8(weight + tile + 8 * (lane % 4), w);
        uint4 packed[2][3];
        UNROLL for (uint r = 0; r < 2; r++) {
            const wide at = offset_of(first, r, p.tokens, p.width, tile);
            packed[r][0] = load_packed(x + at);
            packed[r][1] = load_packed(dy + at);
            packed[r][2] = load_packed(before + at);
        }
        UNROLL for (uint r = 0; r < 2; r++) {
            if (first + 8 * r + lane / 4 >= p.tokens) continue;
            const wide at = offset_of(first, r, p.tokens, p.width, tile);
            float value[8], d[8], through[8];
            unpack8(packed[r][0], value);
            unpack8(packed[r][1], d);
            unpack8(packed[r][2], through);
            UNROLL for (uint j = 0; j < 8; j++) {
                const float n = value[j] * squares[r];
                value[j] = n * w[j];
                through[j] += (d[j] * w[j] - n * dots[r]) * squares[r];
            }
            store8(normed + at, value);
            store8(dy + at, through);
        }
    }
}
