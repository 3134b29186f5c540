// Products with the factors A and B of low-rank updates, and their gradients, on tensor cores. CUDA only, for f16 and bf16. Ranks
// and widths are multiples of 8, and every tensor starts at a multiple of 8 elements.
//
// The order of the summands of a product does not matter if it is the same for both factors. So a lane loads eight adjacent
// columns, which it needs for two tiles, at once.

#if KIND == 0

#define WARPS 8

#define TOKENS 32

// Adds the products of 32 columns of TOKENS rows, four of which belong to a lane, with NTILES * 8 rows.
FUNCTION void add_columns(const uint4* x, const uint4* w, float (*sums)[NTILES][4]) {
    UNROLL for (uint m = 0; m < 2; m++) {
        const uint4 upper = x[2 * m], lower = x[2 * m + 1];
        const uint left[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint right[4] = {upper.z, lower.z, upper.w, lower.w};
        UNROLL for (uint n = 0; n < NTILES; n++) {
            multiply_tiles(sums[m][n], left, make_uint2(w[n].x, w[n].y));
            multiply_tiles(sums[m][n], right, make_uint2(w[n].z, w[n].w));
        }
    }
}

// Loads columns i to i + 7 of the lane's rows among TOKENS rows.
FUNCTION void load_rows(const T* x, uint first, uint tokens, uint width, uint i, uint4* rows) {
    UNROLL for (uint m = 0; m < TOKENS / 8; m++) {
        const uint token = MINIMUM(first + 8 * m + lane / 4, tokens - 1);
        rows[m] = *reinterpret_cast<const uint4*>(x + wide(token) * width + i);
    }
}

// Adds the sums of all warps to those of the first one, and stores them in `parts`: TOKENS rows of NTILES * 8.
FUNCTION void add_warps(float (*sums)[NTILES][4], float (*parts)[TOKENS][8 * NTILES]) {
    UNROLL for (uint m = 0; m < 2; m++) {
        UNROLL for (uint n = 0; n < NTILES; n++) {
            UNROLL for (uint e = 0; e < 4; e++) {
                parts[warp][16 * m + 8 * (e / 2) + lane / 4][8 * n + 2 * (lane % 4) + e % 2] = sums[m][n][e];
            }
        }
    }
    BARRIER;
    float* all = &parts[0][0][0];
    const uint count = TOKENS * 8 * NTILES;
    for (uint i = me; i < count; i += 32 * WARPS) {
        UNROLL for (uint part = 1; part < WARPS; part++) all[i] += all[part * count + i];
    }
    BARRIER;
}

struct InputWords {
    uint tokens;
    uint width;
    uint ranks[3];
};

// z[i] = x a[i]^T for up to three factors a[i]: [rank, width] of layers that share x. The warps of a block share the columns.
KERNEL(products_with_a)
(IN(T, x, 0), IN(T, a0, 1), IN(T, a1, 2), IN(T, a2, 3), OUT(T, z0, 4), OUT(T, z1, 5), OUT(T, z2, 6), WORDS(InputWords, 7)
 INDICES) {
    __shared__ float parts[WARPS][TOKENS][8 * NTILES];
    const uint first = group.x * TOKENS;
    const uint first_column = group.y * 8 * NTILES;
    const uint ends[3] = {p.ranks[0], p.ranks[0] + p.ranks[1], p.ranks[0] + p.ranks[1] + p.ranks[2]};
    const T* rows[NTILES];
    UNROLL for (uint n = 0; n < NTILES; n++) {
        const uint column = MINIMUM(first_column + 8 * n + lane / 4, ends[2] - 1);
        rows[n] = column < ends[0] ? a0 + wide(column) * p.width
            : column < ends[1]     ? a1 + wide(column - ends[0]) * p.width
                                   : a2 + wide(column - ends[1]) * p.width;
    }
    float sums[2][NTILES][4] = {};
    _Pragma("unroll 2") for (uint from = 32 * warp; from < p.width; from += 32 * WARPS) {
        const uint i = from + 8 * (lane % 4);
        uint4 of_x[TOKENS / 8] = {}, of_a[NTILES] = {};
        if (i < p.width) {
            load_rows(x, first, p.tokens, p.width, i, of_x);
            UNROLL for (uint n = 0; n < NTILES; n++) of_a[n] = *reinterpret_cast<const uint4*>(rows[n] + i);
        }
        add_columns(of_x, of_a, sums);
    }
    add_warps(sums, parts);
    for (uint i = me; i < TOKENS * 8 * NTILES; i += 32 * WARPS) {
        const uint token = first + i / (8 * NTILES);
        const uint column = first_column + i % (8 * NTILES);
        if (token >= p.tokens || column >= ends[2]) continue;
        const T value = T(parts[0][i / (8 * NTILES)][i % (8 * NTILES)]);
        if (column < ends[0]) {
            z0[wide(token) * p.ranks[0] + column] = value;
        } else if (column < ends[1]) {
            z1[wide(token) * p.ranks[1] + column - ends[0]] = value;
        } else {
            z2[wide(token) * p.ranks[2] + column - ends[1]] = value;
        }
    }
}

struct OutputWords {
    uint tokens;
    uint depths[3];
    uint ranks[3];
    float scales[3];
};

// dz[i] = scale[i] dy[i] b[i] for up to three layers with factors b[i]: [depth, rank].
KERNEL(products_with_b)
(IN(T, dy0, 0), IN(T, dy1, 1), IN(T, dy2, 2), IN(T, b0, 3), IN(T, b1, 4), IN(T, b2, 5), OUT(T, dz0, 6), OUT(T, dz1, 7),
 OUT(T, dz2, 8), WORDS(OutputWords, 9) INDICES) {
    __shared__ float parts[WARPS][TOKENS][8 * NTILES];
    const uint which = group.y;
    const uint rank = p.ranks[which];
    const uint first_column = group.z * 8 * NTILES;
    if (first_column >= rank) return;
    const T* dy = which == 0 ? dy0 : which == 1 ? dy1 : dy2;
    const T* b = which == 0 ? b0 : which == 1 ? b1 : b2;
    T* dz = which == 0 ? dz0 : which == 1 ? dz1 : dz2;
    const uint depth = p.depths[which];
    const uint first = group.x * TOKENS;
    float sums[2][NTILES][4] = {};
    _Pragma("unroll 2") for (uint from = 32 * warp; from < depth; from += 32 * WARPS) {
        const uint i = from + 8 * (lane % 4);
        uint4 of_dy[TOKENS / 8] = {}, of_b[NTILES] = {};
        if (i < depth) {
            load_rows(dy, first, p.tokens, depth, i, of_dy);
            UNROLL for (uint n = 0; n < NTILES; n++) {
                const T* column = b + wide(i) * rank + MINIMUM(first_column + 8 * n + lane / 4, rank - 1);
                uint pairs[4];
                UNROLL for (uint j = 0; j < 4; j++) {
                    pairs[j] = column[2 * j * rank].bits | (uint(column[(2 * j + 1) * rank].bits) << 16);
                }
                of_b[n] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
        add_columns(of_dy, of_b, sums);
    }
    add_warps(sums, parts);
    for (uint i = me; i < TOKENS * 8 * NTILES; i += 32 * WARPS) {
        const uint token = first + i / (8 * NTILES);
        const uint column = first_column + i % (8 * NTILES);
        if (token >= p.tokens || column >= rank) continue;
        dz[wide(token) * rank + column] = T(p.scales[which] * parts[0][i / (8 * NTILES)][i % (8 * NTILES)]);
    }
}

#else

#define WARPS 4
// The features and tokens that a block multiplies at a time, and the stages of them in shared memory. Rows are padded so that
// those of a matrix of eight rows are in different banks.
#define TILE 64
#define DEPTH 64
#define TILE_PITCH (TILE + 8)
#define COLUMN_PITCH (COLUMNS + 8)
#define STAGE_ELEMENTS (DEPTH * (TILE_PITCH + COLUMN_PITCH))

// One gradient: of an A or of a B.
struct Gradient {
    uint tensor;         // index of the source [tokens, features]
    uint narrow;         // index of the source [tokens, rank]
    uint features;
    uint rank;
    uint is_transposed;  // 1: the result is [rank, features]; 0: [features, rank]
    float scale;
    uint start;          // offset of the result in `results`
    uint tiles;          // number of tiles up to and including this gradient
};

struct GradientWords {
    uint tokens;
    uint count;
    Gradient of[14];
};

// Starts copying 16 bytes to shared memory; zeros if they do not exist.
FUNCTION void copy_eight(const T* from, bool exists, T* to) {
    const uint address = uint(__cvta_generic_to_shared(to));
    const uint size = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
}

// Starts copying DEPTH rows of both sources.
FUNCTION void copy_stage(
    const T* x, const T* w, uint first_token, uint tokens, uint features, uint width, uint rank, uint columns, T* to) {
    UNROLL for (uint i = me; i < DEPTH * TILE / 8; i += 32 * WARPS) {
        const uint row = i / (TILE / 8), column = i % (TILE / 8) * 8;
        const bool exists = first_token + row < tokens && column < features;
        copy_eight(exists ? x + wide(first_token + row) * width + column : x, exists, to + row * TILE_PITCH + column);
    }
    T* of_w = to + DEPTH * TILE_PITCH;
    UNROLL for (uint i = me; i < DEPTH * COLUMNS / 8; i += 32 * WARPS) {
        const uint row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        const bool exists = first_token + row < tokens && column < columns;
        copy_eight(exists ? w + wide(first_token + row) * rank + column : w, exists, of_w + row * COLUMN_PITCH + column);
    }
}

// Loads four 8 x 8 matrices, transposed; a lane passes the address of one row.
FUNCTION void load_transposed(const T* row, uint* tiles) {
    const uint address = uint(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// The gradients of all A and B of a block, f32: each is the product of two sources, summed over tokens. A thread block computes
// TILE features of one gradient, a warp 16 of them.
KERNEL(term_gradients)
(IN(T, s0, 0), IN(T, s1, 1), IN(T, s2, 2), IN(T, s3, 3), IN(T, s4, 4), IN(T, s5, 5), IN(T, s6, 6), IN(T, s7, 7),
 IN(T, s8, 8), IN(T, s9, 9), IN(T, s10, 10), IN(T, s11, 11), IN(T, s12, 12), IN(T, s13, 13), IN(T, s14, 14),
 IN(T, s15, 15), IN(T, s16, 16), IN(T, s17, 17), IN(T, s18, 18), IN(T, s19, 19), IN(T, s20, 20), IN(T, s21, 21),
 IN(T, s22, 22), IN(T, s23, 23), IN(T, s24, 24), OUT(float, results, 25), WORDS(GradientWords, 26) INDICES) {
    extern __shared__ __align__(16) uchar memory[];
    T* stages = reinterpret_cast<T*>(memory);
    const T* sources[25] = {s0,  s1,  s2,  s3,  s4,  s5,  s6,  s7,  s8,  s9,  s10, s11, s12,
                            s13, s14, s15, s16, s17, s18, s19, s20, s21, s22, s23, s24};
    uint which = 0;
    while (which + 1 < p.count && group.x >= p.of[which].tiles) which++;
    const Gradient gradient = p.of[which];
    const uint tile = group.x - (which == 0 ? 0 : p.of[which - 1].tiles);
    const uint first_feature = tile * TILE;
    const uint first_column = group.y * COLUMNS;
    if (first_column >= gradient.rank) return;
    const T* x = sources[gradient.tensor] + first_feature;
    const T* w = sources[gradient.narrow] + first_column;
    const uint features = gradient.features - first_feature, columns = gradient.rank - first_column;
    const uint count = (p.tokens + DEPTH - 1) / DEPTH;
    UNROLL for (uint stage = 0; stage < STAGES - 1; stage++) {
        if (stage < count) {
            copy_stage(
                x, w, stage * DEPTH, p.tokens, features, gradient.features, gradient.rank, columns,
                stages + stage * STAGE_ELEMENTS);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    float sums[COLUMNS / 8][4] = {};
    const uint matrix = lane / 8, row = lane % 8;
    for (uint stage = 0; stage < count; stage++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        BARRIER;
        const uint next = stage + STAGES - 1;
        if (next < count) {
            copy_stage(
                x, w, next * DEPTH, p.tokens, features, gradient.features, gradient.rank, columns,
                stages + next % STAGES * STAGE_ELEMENTS);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        const T* of_x = stages + stage % STAGES * STAGE_ELEMENTS;
        const T* of_w = of_x + DEPTH * TILE_PITCH;
        UNROLL for (uint k = 0; k < DEPTH; k += 16) {
            uint a[4];
            load_transposed(of_x + (k + matrix / 2 * 8 + row) * TILE_PITCH + 16 * warp + matrix % 2 * 8, a);
            UNROLL for (uint n = 0; n < COLUMNS; n += 16) {
                uint b[4];
                load_transposed(of_w + (k + matrix % 2 * 8 + row) * COLUMN_PITCH + n + matrix / 2 * 8, b);
                multiply_tiles(sums[n / 8], a, make_uint2(b[0], b[1]));
                multiply_tiles(sums[n / 8 + 1], a, make_uint2(b[2], b[3]));
            }
        }
    }
    const wide feature_stride = gradient.is_transposed ? 1 : gradient.rank;
    const wide column_stride = gradient.is_transposed ? gradient.features : 1;
    UNROLL for (uint n = 0; n < COLUMNS / 8; n++) {
        UNROLL for (uint e = 0; e < 4; e++) {
            const uint feature = 16 * warp + lane / 4 + 8 * (e / 2), column = 8 * n + 2 * (lane % 4) + e % 2;
            if (feature < features && column < columns) {
                results[gradient.start + (first_feature + feature) * feature_stride + (first_column + column) * column_stride] =
                    gradient.scale * sums[n][e];
            }
        }
    }
}

#endif
