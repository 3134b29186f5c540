// Matrix products with simdgroup matrices, several per launch. Metal only: CUDA uses cuBLAS.
//
// A group of 128 threads computes a tile of 64 x COLUMNS of the result; each of its four simdgroups computes a quarter. Tiles of
// both operands, DEPTH deep, are copied to threadgroup memory one after the other. With ALIGNED 1, every row starts at a multiple
// of four elements, and its length is one.
#define TILE 64
#define DEPTH 16
#define PAD 8
#define FRAGMENTS (COLUMNS / 16)
// Declares threadgroup memory that is aligned to four elements.
#define TILE_OF(name, count)           \
    threadgroup T4 name##4 [(count) / 4]; \
    threadgroup T* name = (threadgroup T*)name##4

// The (row, column) of a lane's first element in an 8 x 8 matrix; its second element is in the next column.
FUNCTION ushort2 fragment_position(uint lane) {
    const uint quad = lane / 4;
    return ushort2((quad & 4) + lane / 2 % 4, (quad & 2) * 2 + lane % 2 * 2);
}

// The sums of a simdgroup: 32 x COLUMNS / 2 elements.
struct Sums {
    simdgroup_matrix<float, 8, 8> of[4][FRAGMENTS];
};

FUNCTION void clear(thread Sums& sums) {
    for (uint i = 0; i < 4; i++) {
        for (uint j = 0; j < FRAGMENTS; j++) sums.of[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
}

// Copies `count` adjacent elements, a multiple of four. Elements at or after `limit` become 0.
FUNCTION void copy_part(const device T* from, uint limit, threadgroup T* to, uint count) {
    if (limit >= count) {
        if (ALIGNED) {
            for (uint i = 0; i < count; i += 4) *(threadgroup T4*)(to + i) = *(const device T4*)(from + i);
        } else {
            for (uint i = 0; i < count; i++) to[i] = from[i];
        }
    } else {
        for (uint i = 0; i < count; i++) to[i] = i < limit ? from[i] : T(0);
    }
}

// Copies a tile whose rows are along the depth: [TILE or COLUMNS][DEPTH]. `row` points to the first element of this thread's row
// in the tile and has `left` elements; it is null if the row does not exist.
FUNCTION void copy_along(const device T* row, uint left, threadgroup T* tile, uint me, uint rows) {
    const uint of_row = 128 / rows;
    const uint count = DEPTH / of_row;
    const uint start = me % of_row * count;
    threadgroup T* to = tile + me / of_row * (DEPTH + PAD) + start;
    if (row) {
        copy_part(row + start, left > start ? left - start : 0, to, count);
    } else {
        for (uint i = 0; i < count; i++) to[i] = T(0);
    }
}

// Copies a tile whose rows are across the depth: [DEPTH][width]. `first` is its first element; `depth` rows of `left` elements
// exist.
FUNCTION void copy_across(
    const device T* first, wide stride, uint depth, uint left, threadgroup T* tile, uint me, uint width) {
    const uint of_row = 128 / DEPTH;
    const uint count = width / of_row;
    const uint row = me / of_row;
    const uint start = me % of_row * count;
    threadgroup T* to = tile + row * (width + PAD) + start;
    if (count < 4) {
        for (uint i = 0; i < count; i++) {
            to[i] = row < depth && start + i < left ? first[row * stride + start + i] : T(0);
        }
    } else if (row < depth) {
        copy_part(first + row * stride + start, left > start ? left - start : 0, to, count);
    } else {
        for (uint i = 0; i < count; i++) to[i] = T(0);
    }
}

// Loads weights `i` to `i + 7` of a row of any format; `i` is a multiple of eight. Weights at or after `end` become 0.
FUNCTION void copy_weights(const device uchar* row, uint format, uint i, uint end, threadgroup T* to) {
    float values[8];
    if (i < end) load8_row(row, format, i, values);
    for (uint j = 0; j < 8; j++) to[j] = i < end ? T(values[j]) : T(0);
}

// Adds the product of two tiles to this simdgroup's sums. The rows of each tile are along the depth or across it.
FUNCTION void multiply(
    const threadgroup T* x, bool x_is_along, const threadgroup T* w, bool w_is_along, uint warp, thread Sums& sums) {
    const uint row = warp / 2 * 32;
    const uint column = warp % 2 * (COLUMNS / 2);
    for (uint k = 0; k < DEPTH; k += 8) {
        simdgroup_matrix<T, 8, 8> a[4], b[FRAGMENTS];
        for (uint i = 0; i < 4; i++) {
            if (x_is_along) {
                simdgroup_load(a[i], x + (row + 8 * i) * (DEPTH + PAD) + k, DEPTH + PAD);
            } else {
                simdgroup_load(a[i], x + k * (TILE + PAD) + row + 8 * i, TILE + PAD, ulong2(0, 0), true);
            }
        }
        for (uint j = 0; j < FRAGMENTS; j++) {
            if (w_is_along) {
                simdgroup_load(b[j], w + (column + 8 * j) * (DEPTH + PAD) + k, DEPTH + PAD, ulong2(0, 0), true);
            } else {
                simdgroup_load(b[j], w + k * (COLUMNS + PAD) + column + 8 * j, COLUMNS + PAD);
            }
        }
        for (uint i = 0; i < 4; i++) {
            for (uint j = 0; j < FRAGMENTS; j++) {
                simdgroup_multiply_accumulate(sums.of[i][j], a[i], b[j], sums.of[i][j]);
            }
        }
    }
}

#if KIND == 0

struct ForwardWords {
    uint tokens;
    uint k;
    uint ends[6];
    // formats of the first three matrices; the other three are never quantized
    uint formats[3];
};

// The index of the matrix that computes a column of the result.
FUNCTION uint matrix_of(uint column, constant ForwardWords& p) {
    uint i = 0;
    while (i < 5 && column >= p.ends[i]) i++;
    return i;
}

// y[i] = x w[i]^T for up to six matrices w[i]: [width, k]; ends[i] is the sum of the widths up to and including w[i]. A tile of
// the result may span several matrices.
KERNEL(products)
(IN(T, x, 0), IN(uchar, w0, 1), IN(uchar, w1, 2), IN(uchar, w2, 3), IN(T, w3, 4), IN(T, w4, 5), IN(T, w5, 6), OUT(T, y0, 7),
 OUT(T, y1, 8), OUT(T, y2, 9), OUT(T, y3, 10), OUT(T, y4, 11), OUT(T, y5, 12), WORDS(ForwardWords, 13) INDICES) {
    TILE_OF(x_tile, TILE * (DEPTH + PAD));
    TILE_OF(w_tile, COLUMNS * (DEPTH + PAD));
    const device uchar* weights[3] = {w0, w1, w2};
    const device T* others[3] = {w3, w4, w5};
    device T* ys[6] = {y0, y1, y2, y3, y4, y5};
    const uint first_row = group.y * TILE;
    const uint first_column = group.x * COLUMNS;
    const uint my_row = first_row + me / (128 / TILE);
    const uint my_column = first_column + me / (128 / COLUMNS);
    const device T* x_row = my_row < p.tokens ? x + wide(my_row) * p.k : nullptr;
    const device T* w_row = nullptr;
    const device uchar* blocks = nullptr;
    uint format = 0;
    if (my_column < p.ends[5]) {
        const uint which = matrix_of(my_column, p);
        const uint row = my_column - (which == 0 ? 0 : p.ends[which - 1]);
        if (which >= 3) {
            w_row = others[which - 3] + wide(row) * p.k;
        } else if (IS_DENSE(p.formats[which])) {
            w_row = (const device T*)weights[which] + wide(row) * p.k;
        } else {
            format = p.formats[which];
            blocks = row_of(weights[which], format, row, p.k);
        }
    }
    Sums sums;
    clear(sums);
    for (uint k = 0; k < p.k; k += DEPTH) {
        copy_along(x_row ? x_row + k : nullptr, p.k - k, x_tile, me, TILE);
        if (HAS_BLOCKS && blocks) {
            const uint start = me % (128 / COLUMNS) * 8;
            copy_weights(blocks, format, k + start, p.k, w_tile + me / (128 / COLUMNS) * (DEPTH + PAD) + start);
        } else {
            copy_along(w_row ? w_row + k : nullptr, p.k - k, w_tile, me, COLUMNS);
        }
        BARRIER;
        multiply(x_tile, true, w_tile, true, warp, sums);
        BARRIER;
    }
    const ushort2 at = fragment_position(lane);
    for (uint j = 0; j < FRAGMENTS; j++) {
        for (uint e = 0; e < 2; e++) {
            const uint column = first_column + warp % 2 * (COLUMNS / 2) + 8 * j + at.y + e;
            if (column >= p.ends[5]) continue;
            const uint which = matrix_of(column, p);
            const uint before = which == 0 ? 0 : p.ends[which - 1];
            device T* y = ys[which] + (column - before);
            for (uint i = 0; i < 4; i++) {
                const uint row = first_row + warp / 2 * 32 + 8 * i + at.x;
                if (row < p.tokens) y[wide(row) * (p.ends[which] - before)] = T(sums.of[i][j].thread_elements()[e]);
            }
        }
    }
}

#elif KIND == 1

struct BackwardWords {
    uint tokens;
    uint width;
    uint depths[3];
    uint ranks[3];
    float scales[3];
    // formats of the matrices w
    uint formats[3];
};

// dx = sum of dy[i] w[i] over up to three matrices w[i]: [depth, width], and dz[i] = scale dy[i] b[i] with b[i]: [depth, rank].
// Tiles of dx come first, followed by the tiles of each dz.
KERNEL(products_backward)
(IN(T, dy0, 0), IN(T, dy1, 1), IN(T, dy2, 2), IN(uchar, w0, 3), IN(uchar, w1, 4), IN(uchar, w2, 5), IN(T, b0, 6), IN(T, b1, 7),
 IN(T, b2, 8), OUT(T, dx, 9), OUT(T, dz0, 10), OUT(T, dz1, 11), OUT(T, dz2, 12), WORDS(BackwardWords, 13) INDICES) {
    TILE_OF(x_tile, TILE * (DEPTH + PAD));
    TILE_OF(w_tile, DEPTH * (COLUMNS + PAD));
    const device T* dys[3] = {dy0, dy1, dy2};
    const device uchar* ws[3] = {w0, w1, w2};
    const device T* b = nullptr;
    uint from = 0, to = 3;
    uint width = p.width;
    float scale = 1.0f;
    device T* result = dx;
    uint tile = group.x;
    uint tiles = (p.width + COLUMNS - 1) / COLUMNS;
    if (tile >= tiles) {
        const device T* bs[3] = {b0, b1, b2};
        device T* dzs[3] = {dz0, dz1, dz2};
        for (uint i = 0; i < 3; i++) {
            tile -= tiles;
            tiles = (p.ranks[i] + COLUMNS - 1) / COLUMNS;
            if (tile < tiles) {
                from = i;
                break;
            }
        }
        to = from + 1;
        b = bs[from];
        width = p.ranks[from];
        scale = p.scales[from];
        result = dzs[from];
    }
    const uint first_row = group.y * TILE;
    const uint first_column = tile * COLUMNS;
    const uint my_row = first_row + me / (128 / TILE);
    Sums sums;
    clear(sums);
    for (uint i = from; i < to; i++) {
        const uint depth = p.depths[i];
        const device T* x_row = my_row < p.tokens ? dys[i] + wide(my_row) * depth : nullptr;
        for (uint k = 0; k < depth; k += DEPTH) {
            copy_along(x_row ? x_row + k : nullptr, depth - k, x_tile, me, TILE);
            if (!b && !IS_DENSE(p.formats[i])) {
                // eight threads share a row of the tile; each loads eight elements
                const uint row = me / 8, start = me % 8 * 8;
                const device uchar* blocks = row_of(ws[i], p.formats[i], k + row, width);
                copy_weights(
                    blocks, p.formats[i], first_column + start, k + row < depth ? width : 0,
                    w_tile + row * (COLUMNS + PAD) + start);
            } else {
                const device T* w = (b ? b : (const device T*)ws[i]) + wide(k) * width + first_column;
                copy_across(w, width, depth - k, width - first_column, w_tile, me, COLUMNS);
            }
            BARRIER;
            multiply(x_tile, true, w_tile, false, warp, sums);
            BARRIER;
        }
    }
    const ushort2 at = fragment_position(lane);
    for (uint i = 0; i < 4; i++) {
        const uint row = first_row + warp / 2 * 32 + 8 * i + at.x;
        if (row >= p.tokens) continue;
        for (uint j = 0; j < FRAGMENTS; j++) {
            for (uint e = 0; e < 2; e++) {
                const uint column = first_column + warp % 2 * (COLUMNS / 2) + 8 * j + at.y + e;
                if (column < width) {
                    result[wide(row) * width + column] = T(scale * sums.of[i][j].thread_elements()[e]);
                }
            }
        }
    }
}

#else

// One gradient: of an A or of a B.
struct Gradient {
    uint tensor;       // index of the source [tokens, features]
    uint narrow;       // index of the source [tokens, rank]
    uint features;
    uint rank;
    uint is_transposed;  // 1: the result is [rank, features]; 0: [features, rank]
    float scale;
    uint start;        // offset of the result in `results`
    uint tiles;        // number of tiles up to and including this gradient
};

struct GradientWords {
    uint tokens;
    uint count;
    Gradient of[14];
};

// The gradients of all A and B of a block, f32: each is the product of two sources, summed over tokens.
KERNEL(term_gradients)
(IN(T, s0, 0), IN(T, s1, 1), IN(T, s2, 2), IN(T, s3, 3), IN(T, s4, 4), IN(T, s5, 5), IN(T, s6, 6), IN(T, s7, 7),
 IN(T, s8, 8), IN(T, s9, 9), IN(T, s10, 10), IN(T, s11, 11), IN(T, s12, 12), IN(T, s13, 13), IN(T, s14, 14),
 IN(T, s15, 15), IN(T, s16, 16), IN(T, s17, 17), IN(T, s18, 18), IN(T, s19, 19), IN(T, s20, 20), IN(T, s21, 21),
 IN(T, s22, 22), IN(T, s23, 23), IN(T, s24, 24), OUT(float, results, 25), WORDS(GradientWords, 26) INDICES) {
    TILE_OF(x_tile, DEPTH * (TILE + PAD));
    TILE_OF(w_tile, DEPTH * (COLUMNS + PAD));
    const device T* sources[25] = {s0,  s1,  s2,  s3,  s4,  s5,  s6,  s7,  s8,  s9,  s10, s11, s12,
                                   s13, s14, s15, s16, s17, s18, s19, s20, s21, s22, s23, s24};
    uint which = 0;
    while (which + 1 < p.count && group.x >= p.of[which].tiles) which++;
    const constant Gradient& gradient = p.of[which];
    const uint tile = group.x - (which == 0 ? 0 : p.of[which - 1].tiles);
    const uint first_row = tile * TILE;
    const uint first_column = group.y * COLUMNS;
    if (first_column >= gradient.rank) return;
    const device T* x = sources[gradient.tensor] + first_row;
    const device T* w = sources[gradient.narrow] + first_column;
    Sums sums;
    clear(sums);
    for (uint k = 0; k < p.tokens; k += DEPTH) {
        const uint depth = p.tokens - k;
        copy_across(
            x + wide(k) * gradient.features, gradient.features, depth, gradient.features - first_row, x_tile, me, TILE);
        copy_across(
            w + wide(k) * gradient.rank, gradient.rank, depth, gradient.rank - first_column, w_tile, me, COLUMNS);
        BARRIER;
        multiply(x_tile, false, w_tile, false, warp, sums);
        BARRIER;
    }
    const ushort2 at = fragment_position(lane);
    const wide row_stride = gradient.is_transposed ? 1 : gradient.rank;
    const wide column_stride = gradient.is_transposed ? gradient.features : 1;
    for (uint i = 0; i < 4; i++) {
        const uint row = first_row + warp / 2 * 32 + 8 * i + at.x;
        if (row >= gradient.features) continue;
        for (uint j = 0; j < FRAGMENTS; j++) {
            for (uint e = 0; e < 2; e++) {
                const uint column = first_column + warp % 2 * (COLUMNS / 2) + 8 * j + at.y + e;
                if (column < gradient.rank) {
                    results[gradient.start + row * row_stride + column * column_stride] =
                        gradient.scale * sums.of[i][j].thread_elements()[e];
                }
            }
        }
    }
}

#endif
