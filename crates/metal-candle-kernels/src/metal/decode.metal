// Decode kernels: a decoder block for one token of each of a few sequences, except attention (`decode_attention.metal`).
//
// A launch has `rows` tokens, in chunks of BATCH (a constant); groups that read the same weights have adjacent indices. The
// state is on the device, so steps can run without the CPU: `state[row]` is the token's id, `state[rows + row]` its position and
// `state[2 * rows + row]` its slot of the cache.
//
// On CUDA devices since Hopper, a kernel starts while the previous kernel runs. Code before WAIT_FOR_INPUT therefore reads only
// weights, the state, and keys and values of earlier steps, and writes nothing.
//
// A low-rank update adds B z, where z = scale A x. The first groups of a launch compute z once and post it in device memory:
// their warps multiply rows of A instead of rows of weights. The other groups read z after their own products. A warp that has
// waited too long computes z itself with the same order of summation, so results do not depend on the order in which groups run.
// Layers without an update use kernels without HAS_TERMS; these also empty the words that an earlier kernel posted.
#define MAX_RANK 64

// Two rows of HIDDEN weights, for one warp. If they fit into registers, they are loaded first, so that the loads overlap the norm.
#define STEPS ((HIDDEN + 255) / 256)
#define HOLDS_ROWS (HIDDEN <= 1024)
struct TwoRows {
#if HOLDS_ROWS
    Eight first[STEPS];
    Eight second[STEPS];
#endif
    uint unused;
};

FUNCTION void prefetch_rows(GLOBAL const T* w0, GLOBAL const T* w1, uint my_lane, PRIVATE TwoRows& rows) {
    rows.unused = 0;
#if HOLDS_ROWS
    UNROLL for (uint step = 0; step < STEPS; step++) {
        const uint i = 8 * my_lane + 256 * step;
        if (i < HIDDEN) {
            rows.first[step] = load_eight(w0 + i);
            rows.second[step] = load_eight(w1 + i);
        }
    }
#endif
}

// Prefetches two rows of weights: elements to registers, quantized blocks to the L2 cache.
FUNCTION void prefetch_weights(
    GLOBAL const uchar* w0, GLOBAL const uchar* w1, uint format0, uint format1, uint my_lane, PRIVATE TwoRows& rows) {
    if (IS_DENSE(format0) && IS_DENSE(format1)) {
        prefetch_rows((GLOBAL const T*)w0, (GLOBAL const T*)w1, my_lane, rows);
        return;
    }
#if HAS_BLOCKS
    prefetch_blocks(w0, uint(row_bytes(format0, HIDDEN)), my_lane);
    prefetch_blocks(w1, uint(row_bytes(format1, HIDDEN)), my_lane);
#endif
}

// Multiplies eight weights of two rows with each of the BATCH vectors of HIDDEN floats at `x`, and adds the products.
FUNCTION void add_dots(
    PRIVATE const float* u, PRIVATE const float* v, SHARED_ARG const float* x, PRIVATE float* sums0, PRIVATE float* sums1) {
    UNROLL for (uint b = 0; b < BATCH; b++) {
        float value[8];
        load8_shared(x + b * HIDDEN, value);
        UNROLL for (uint j = 0; j < 8; j++) {
            sums0[b] += u[j] * value[j];
            sums1[b] += v[j] * value[j];
        }
    }
}

// The dot products of two rows with each of the BATCH vectors of HIDDEN floats at `x`.
FUNCTION void dots_of_rows(
    GLOBAL const uchar* w0, GLOBAL const uchar* w1, uint format0, uint format1, PRIVATE const TwoRows& rows,
    SHARED_ARG const float* x, uint my_lane, PRIVATE float* sums0, PRIVATE float* sums1) {
    for (uint b = 0; b < BATCH; b++) sums0[b] = sums1[b] = 0.0f;
    float u[8], v[8];
    if (IS_DENSE(format0) && IS_DENSE(format1)) {
        UNROLL for (uint step = 0; step < STEPS; step++) {
            const uint i = 8 * my_lane + 256 * step;
            if (i < HIDDEN) {
#if HOLDS_ROWS
                unpack_eight(rows.first[step], u);
                unpack_eight(rows.second[step], v);
#else
                load8((GLOBAL const T*)w0 + i, u);
                load8((GLOBAL const T*)w1 + i, v);
#endif
                add_dots(u, v, x + i, sums0, sums1);
            }
        }
    } else {
        UNROLL4 for (uint i = 8 * my_lane; i < HIDDEN; i += 256) {
            load8_row(w0, format0, i, u);
            load8_row(w1, format1, i, v);
            add_dots(u, v, x + i, sums0, sums1);
        }
    }
    for (uint b = 0; b < BATCH; b++) {
        sums0[b] = warp_sum(sums0[b]);
        sums1[b] = warp_sum(sums1[b]);
    }
}

// The first weights of a lane's part of two rows, prefetched: AHEAD (a constant) times eight.
struct TwoParts {
    Eight first[AHEAD];
    Eight second[AHEAD];
};

FUNCTION void prefetch_parts(
    GLOBAL const T* w0, GLOBAL const T* w1, uint from, uint end, uint my_lane, PRIVATE TwoParts& parts) {
    UNROLL for (uint step = 0; step < AHEAD; step++) {
        const uint i = from + 8 * my_lane + 256 * step;
        if (i < end) {
            parts.first[step] = load_eight(w0 + i);
            parts.second[step] = load_eight(w1 + i);
        }
    }
}

FUNCTION void add_products(
    PRIVATE const float* u, PRIVATE const float* v, GLOBAL const T* x, uint live, uint width, PRIVATE float* sums0,
    PRIVATE float* sums1) {
    UNROLL for (uint b = 0; b < BATCH; b++) {
        float value[8];
        load8(x + MINIMUM(b, live - 1) * width, value);
        UNROLL for (uint j = 0; j < 8; j++) {
            sums0[b] += u[j] * value[j];
            sums1[b] += v[j] * value[j];
        }
    }
}

// The dot products of two rows, for columns `from..end`, with each of `live` vectors in device memory.
FUNCTION void dots_of_two(
    GLOBAL const uchar* w0, GLOBAL const uchar* w1, uint format, bool is_dense, PRIVATE const TwoParts& parts,
    GLOBAL const T* x, uint live, uint width, uint from, uint end, uint my_lane, PRIVATE float* sums0, PRIVATE float* sums1) {
    for (uint b = 0; b < BATCH; b++) sums0[b] = sums1[b] = 0.0f;
    float u[8], v[8];
    if (is_dense) {
        UNROLL for (uint step = 0; step < AHEAD; step++) {
            const uint i = from + 8 * my_lane + 256 * step;
            if (i < end) {
                unpack_eight(parts.first[step], u);
                unpack_eight(parts.second[step], v);
                add_products(u, v, x + i, live, width, sums0, sums1);
            }
        }
        UNROLL4 for (uint i = from + 8 * my_lane + 256 * AHEAD; i < end; i += 256) {
            load8((GLOBAL const T*)w0 + i, u);
            load8((GLOBAL const T*)w1 + i, v);
            add_products(u, v, x + i, live, width, sums0, sums1);
        }
    } else {
        UNROLL4 for (uint i = from + 8 * my_lane; i < end; i += 256) {
            load8_row(w0, format, i, u);
            load8_row(w1, format, i, v);
            add_products(u, v, x + i, live, width, sums0, sums1);
        }
    }
    for (uint b = 0; b < BATCH; b++) {
        sums0[b] = warp_sum(sums0[b]);
        sums1[b] = warp_sum(sums1[b]);
    }
}

// Writes `live` vectors to `y` as floats, normalized if `has_norm` is 1. A thread holds its elements of a vector in registers
// until the norm is known.
template <uint THREADS>
FUNCTION void norm_into(
    GLOBAL const T* x, uint live, GLOBAL const T* weight, uint has_norm, float offset, float eps, SHARED_ARG float* y,
    SHARED_ARG float* scratch, uint my_thread, uint my_lane, uint my_warp) {
    for (uint b = 0; b < BATCH; b++) {
        float values[(HIDDEN + THREADS - 1) / THREADS];
        float sum = 0.0f;
        UNROLL for (uint step = 0; step < (HIDDEN + THREADS - 1) / THREADS; step++) {
            const uint i = step * THREADS + my_thread;
            const float value = b < live && i < HIDDEN ? float(x[b * HIDDEN + i]) : 0.0f;
            values[step] = has_norm && i < HIDDEN ? value * (offset + float(weight[i])) : value;
            sum += value * value;
        }
        const float square = group_sum(sum, scratch, my_lane, my_warp, THREADS) / float(HIDDEN);
        const float scale = has_norm ? RSQRT(square + eps) : 1.0f;
        UNROLL for (uint step = 0; step < (HIDDEN + THREADS - 1) / THREADS; step++) {
            const uint i = step * THREADS + my_thread;
            if (i < HIDDEN) y[b * HIDDEN + i] = values[step] * scale;
        }
    }
    BARRIER;
}

// How often a word that has not been posted is read before the warp computes z itself.
#define MAX_POLLS 4096

// The number of elements of a row of B that a lane multiplies.
#define SHARES (MAX_RANK / 32)

FUNCTION void prefetch_b(GLOBAL const T* l, uint rank, uint row, uint my_lane, PRIVATE float* b) {
    UNROLL for (uint i = 0; i < SHARES; i++) {
        const uint r = my_lane + 32 * i;
        b[i] = r < rank ? float(l[row * rank + r]) : 0.0f;
    }
}

// Reads the lane's elements of a posted z. Returns whether all lanes got theirs; the result is the same for all lanes.
FUNCTION bool read_posted(GLOBAL ATOMIC_UINT* words, uint at, uint rank, uint my_lane, PRIVATE float* z) {
    uint bits[SHARES];
    UNROLL for (uint i = 0; i < SHARES; i++) {
        bits[i] = my_lane + 32 * i < rank ? ATOMIC_LOAD(words, at + my_lane + 32 * i) : 0u;
    }
    bool is_missing = false;
    UNROLL for (uint i = 0; i < SHARES; i++) {
        for (uint n = 0; n < MAX_POLLS && bits[i] == EMPTY; n++) bits[i] = ATOMIC_LOAD(words, at + my_lane + 32 * i);
        is_missing = is_missing || bits[i] == EMPTY;
        z[i] = bits_to_float(bits[i]);
    }
    return !warp_any(is_missing);
}

// The dot products of x, normalized if `has_norm` is 1, with two prefetched rows of A. One warp computes the norm itself, so it
// does not wait for other warps.
FUNCTION void times_two_of_a(
    GLOBAL const T* a0, GLOBAL const T* a1, PRIVATE const TwoRows& rows, GLOBAL const T* x, GLOBAL const T* weight, uint has_norm,
    float offset, float eps, uint my_lane, PRIVATE float* z0, PRIVATE float* z1) {
    float sum0 = 0.0f, sum1 = 0.0f, squares = 0.0f;
    UNROLL for (uint step = 0; step < STEPS; step++) {
        const uint i = 8 * my_lane + 256 * step;
        if (i < HIDDEN) {
            float u[8], v[8], value[8], w[8];
#if HOLDS_ROWS
            unpack_eight(rows.first[step], u);
            unpack_eight(rows.second[step], v);
#else
            load8(a0 + i, u);
            load8(a1 + i, v);
#endif
            load8(x + i, value);
            if (has_norm) load8(weight + i, w);
            UNROLL for (uint j = 0; j < 8; j++) {
                squares += value[j] * value[j];
                if (has_norm) value[j] *= offset + w[j];
                sum0 += u[j] * value[j];
                sum1 += v[j] * value[j];
            }
        }
    }
    const float scale = has_norm ? RSQRT(warp_sum(squares) / float(HIDDEN) + eps) : 1.0f;
    *z0 = warp_sum(sum0) * scale;
    *z1 = warp_sum(sum1) * scale;
}

// The lane's elements of z for the normalized vector x: read if they were posted, otherwise computed.
FUNCTION void read_low_rank(
    GLOBAL ATOMIC_UINT* words, uint at, GLOBAL const T* a, uint rank, float scale, GLOBAL const T* x, GLOBAL const T* weight,
    uint has_norm, float offset, float eps, uint my_lane, PRIVATE float* z) {
    if (read_posted(words, at, rank, my_lane, z)) return;
    NO_UNROLL for (uint r = 0; r < rank; r++) {
        float sum = 0.0f, squares = 0.0f;
        NO_UNROLL for (uint i = 8 * my_lane; i < HIDDEN; i += 256) {
            NO_UNROLL for (uint j = i; j < i + 8; j++) {
                float value = float(x[j]);
                squares += value * value;
                if (has_norm) value *= offset + float(weight[j]);
                sum += float(a[r * HIDDEN + j]) * value;
            }
        }
        const float root = has_norm ? RSQRT(warp_sum(squares) / float(HIDDEN) + eps) : 1.0f;
        sum = warp_sum(sum) * root;
        UNROLL for (uint i = 0; i < SHARES; i++) {
            if (r == my_lane + 32 * i) z[i] = sum * scale;
        }
    }
}

// One element of B z: the dot product of a row of B with z.
FUNCTION float times_b(PRIVATE const float* b, PRIVATE const float* z) {
    float sum = 0.0f;
    UNROLL for (uint i = 0; i < SHARES; i++) sum += b[i] * z[i];
    return warp_sum(sum);
}

// The last group empties the words that an earlier kernel posted.
FUNCTION void empty_words(
    GLOBAL ATOMIC_UINT* words, uint from, uint count, bool is_last, uint my_thread, uint num_threads) {
    if (!is_last) return;
    for (uint i = my_thread; i < count; i += num_threads) ATOMIC_STORE(words, from + i, EMPTY);
}

struct EmbedWords {
    uint width;
    uint format;
    float factor;
    uint empty_at;
    uint empty_count;
};

// x[b] = factor * the embedding of token b
KERNEL(decode_embed)
(IN(uchar, embedding, 0), IN(uint, state, 1), OUT(T, x, 2), OUT(ATOMIC_UINT, posted, 3), WORDS(EmbedWords, 4) INDICES) {
    WAIT_FOR_INPUT;
    empty_words(posted, p.empty_at, p.empty_count, group.x + 1 == groups.x, me, threads);
    GLOBAL const uchar* row = row_of(embedding, p.format, state[group.x], p.width);
    for (uint i = 8 * me; i < p.width; i += 8 * threads) {
        float values[8];
        load8_row(row, p.format, i, values);
        for (uint j = 0; j < 8; j++) values[j] *= p.factor;
        store4(x + group.x * p.width + i, values);
        store4(x + group.x * p.width + i + 4, values + 4);
    }
}

struct ProjectionWords {
    uint rows;
    uint has_norm;
    float offset;
    float eps;
    uint q_width;
    uint kv_width;
    uint q_rank;
    uint k_rank;
    uint v_rank;
    float q_scale;
    float k_scale;
    float v_scale;
    uint q_format;
    uint k_format;
    uint v_format;
    uint post_at;
    uint empty_at;
    uint empty_count;
};

// Norm and projections to q, k and v, without biases. One warp computes two rows.
KERNEL(decode_projections)
(IN(T, x, 0), IN(T, norm, 1), IN(uchar, wq, 2), IN(uchar, wk, 3), IN(uchar, wv, 4), IN(T, aq, 5), IN(T, lq, 6), IN(T, ak, 7),
 IN(T, lk, 8), IN(T, av, 9), IN(T, lv, 10), OUT(T, q, 11), OUT(T, k, 12), OUT(T, v, 13), OUT(ATOMIC_UINT, posted, 14),
 WORDS(ProjectionWords, 15) INDICES) {
    SHARED float normed[BATCH * HIDDEN];
    SHARED float scratch[32];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    const uint warps = PROJECTION_THREADS / 32;
    const uint pairs_of_a = (p.q_rank + 1) / 2 + (p.k_rank + 1) / 2 + (p.v_rank + 1) / 2;
    const uint groups_of_a = (pairs_of_a + warps - 1) / warps;
    const uint block = group.x / chunks;
    const bool is_of_a = HAS_TERMS && block < groups_of_a;
    uint pair = (is_of_a ? block : block - groups_of_a) * warps + warp;
    // rows of q come first, then k, then v
    const uint q_rows = is_of_a ? p.q_rank : p.q_width;
    const uint k_rows = is_of_a ? p.k_rank : p.kv_width;
    const uint v_rows = is_of_a ? p.v_rank : p.kv_width;
    uint kind = 0;
    uint count = q_rows;
    uint rank = p.q_rank;
    float scale = p.q_scale;
    uint format = p.q_format;
    GLOBAL const uchar* w = wq;
    GLOBAL const T* a = aq;
    GLOBAL const T* l = lq;
    GLOBAL T* y = q;
    if (pair >= (q_rows + 1) / 2 + (k_rows + 1) / 2) {
        pair -= (q_rows + 1) / 2 + (k_rows + 1) / 2;
        kind = 2;
        count = v_rows;
        rank = p.v_rank;
        scale = p.v_scale;
        format = p.v_format;
        w = wv;
        a = av;
        l = lv;
        y = v;
    } else if (pair >= (q_rows + 1) / 2) {
        pair -= (q_rows + 1) / 2;
        kind = 1;
        count = k_rows;
        rank = p.k_rank;
        scale = p.k_scale;
        format = p.k_format;
        w = wk;
        a = ak;
        l = lk;
        y = k;
    }
    const uint row0 = 2 * pair;
    const uint row1 = row0 + 1 < count ? row0 + 1 : row0;
    const bool is_valid = row0 < count;
    GLOBAL const T* a0 = a + row0 * HIDDEN;
    GLOBAL const T* a1 = a + row1 * HIDDEN;
    GLOBAL const uchar* w0 = row_of(w, format, row0, HIDDEN);
    GLOBAL const uchar* w1 = row_of(w, format, row1, HIDDEN);
    TwoRows rows;
    float b0[SHARES], b1[SHARES];
    if (is_valid) {
        if (is_of_a) {
            prefetch_rows(a0, a1, lane, rows);
        } else {
            prefetch_weights(w0, w1, format, format, lane, rows);
        }
        if (HAS_TERMS && !is_of_a) {
            prefetch_b(l, rank, row0, lane, b0);
            prefetch_b(l, rank, row1, lane, b1);
        }
    }
    WAIT_FOR_INPUT;
    empty_words(posted, p.empty_at, p.empty_count, group.x + 1 == groups.x, me, threads);
    if (is_of_a) {
        for (uint b = 0; is_valid && b < live; b++) {
            float z0, z1;
            times_two_of_a(a0, a1, rows, x + (first_row + b) * HIDDEN, norm, p.has_norm, p.offset, p.eps, lane, &z0, &z1);
            const uint at = p.post_at + ((first_row + b) * 3 + kind) * MAX_RANK;
            if (lane == 0) {
                post(posted, at + row0, z0 * scale);
                if (row1 > row0) post(posted, at + row1, z1 * scale);
            }
        }
        return;
    }
    norm_into<PROJECTION_THREADS>(x + first_row * HIDDEN, live, norm, p.has_norm, p.offset, p.eps, normed, scratch, me, lane, warp);
    if (!is_valid) return;
    float sums0[BATCH], sums1[BATCH];
    dots_of_rows(w0, w1, format, format, rows, normed, lane, sums0, sums1);
    for (uint b = 0; b < live; b++) {
        const uint at = p.post_at + ((first_row + b) * 3 + kind) * MAX_RANK;
        if (HAS_TERMS && rank > 0) {
            float z[SHARES];
            read_low_rank(posted, at, a, rank, scale, x + (first_row + b) * HIDDEN, norm, p.has_norm, p.offset, p.eps, lane, z);
            sums0[b] += times_b(b0, z);
            sums1[b] += times_b(b1, z);
        }
        if (lane == 0) {
            y[(first_row + b) * count + row0] = T(sums0[b]);
            if (row1 > row0) y[(first_row + b) * count + row1] = T(sums1[b]);
        }
    }
}

struct LinearWords {
    uint rows;
    uint in_features;
    uint out_features;
    uint rank;
    float scale;
    // y = factor * sum, plus the existing y if `is_added` is 1
    float factor;
    uint is_added;
    uint format;
    uint post_at;
    uint empty_at;
    uint empty_count;
};

#define QUARTERS 4

// Computes z of a low-rank update for a vector in device memory, with the same order of summation as the groups of A.
FUNCTION void low_rank_of_device(
    GLOBAL const T* a, uint rank, float scale, GLOBAL const T* x, uint width, uint share, uint my_lane, PRIVATE float* z) {
    NO_UNROLL for (uint r = 0; r < rank; r++) {
        float total = 0.0f;
        NO_UNROLL for (uint quarter = 0; quarter < QUARTERS; quarter++) {
            const uint from = MINIMUM(quarter * share, width);
            const uint end = MINIMUM(from + share, width);
            float sum = 0.0f;
            NO_UNROLL for (uint i = from + 8 * my_lane; i < end; i += 256) {
                NO_UNROLL for (uint j = 0; j < 8; j++) sum += float(a[r * width + i + j]) * float(x[i + j]);
            }
            total += warp_sum(sum);
        }
        UNROLL for (uint i = 0; i < SHARES; i++) {
            if (r == my_lane + 32 * i) z[i] = total * scale;
        }
    }
}

// y = factor * (W x + scale B A x), or y += if `is_added` is 1. Four warps share two rows: each computes a quarter of the width.
KERNEL(decode_linear)
(IN(T, x, 0), IN(uchar, w, 1), IN(T, a, 2), IN(T, l, 3), OUT(T, y, 4), OUT(ATOMIC_UINT, posted, 5),
 WORDS(LinearWords, 6) INDICES) {
    SHARED float parts[LINEAR_THREADS / 32 * 2 * BATCH];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    GLOBAL const T* vectors = x + first_row * p.in_features;
    const uint pairs = LINEAR_THREADS / 32 / QUARTERS;
    const uint groups_of_a = (p.rank + 2 * pairs - 1) / (2 * pairs);
    const uint block = group.x / chunks;
    const bool is_of_a = HAS_TERMS && block < groups_of_a;
    const uint count = is_of_a ? p.rank : p.out_features;
    const uint first = 2 * pairs * (is_of_a ? block : block - groups_of_a);
    const uint row0 = MINIMUM(first + 2 * (warp / QUARTERS), count - 1);
    const uint row1 = MINIMUM(row0 + 1, count - 1);
    // a quarter of the width, rounded up to a multiple of 256
    const uint share = (p.in_features + 256 * QUARTERS - 1) / (256 * QUARTERS) * 256;
    const uint from = MINIMUM(warp % QUARTERS * share, p.in_features);
    const uint end = MINIMUM(from + share, p.in_features);
    const bool is_dense = is_of_a || IS_DENSE(p.format);
    const wide stride = is_of_a ? wide(p.in_features) * sizeof(T) : row_bytes(p.format, p.in_features);
    GLOBAL const uchar* matrix = is_of_a ? (GLOBAL const uchar*)a : w;
    GLOBAL const uchar* w0 = matrix + row0 * stride;
    GLOBAL const uchar* w1 = matrix + row1 * stride;
    // the first of the four warps adds the low-rank update
    const bool has_update = HAS_TERMS && !is_of_a && p.rank > 0 && warp % QUARTERS == 0;
    TwoParts parts_ahead;
    if (is_dense) prefetch_parts((GLOBAL const T*)w0, (GLOBAL const T*)w1, from, end, lane, parts_ahead);
#if HAS_BLOCKS
    if (!is_dense && from < end) {
        const uint skipped = uint(row_bytes(p.format, from));
        prefetch_blocks(w0 + skipped, uint(row_bytes(p.format, end - from)), lane);
        prefetch_blocks(w1 + skipped, uint(row_bytes(p.format, end - from)), lane);
    }
#endif
    float b0[SHARES], b1[SHARES];
    if (has_update) {
        prefetch_b(l, p.rank, row0, lane, b0);
        prefetch_b(l, p.rank, row1, lane, b1);
    }
    WAIT_FOR_INPUT;
    empty_words(posted, p.empty_at, p.empty_count, group.x + 1 == groups.x, me, threads);
    float sums0[BATCH], sums1[BATCH];
    dots_of_two(w0, w1, p.format, is_dense, parts_ahead, vectors, live, p.in_features, from, end, lane, sums0, sums1);
    if (has_update) {
        for (uint b = 0; b < live; b++) {
            float z[SHARES];
            if (!read_posted(posted, p.post_at + (first_row + b) * MAX_RANK, p.rank, lane, z)) {
                low_rank_of_device(a, p.rank, p.scale, vectors + b * p.in_features, p.in_features, share, lane, z);
            }
            sums0[b] += times_b(b0, z);
            sums1[b] += times_b(b1, z);
        }
    }
    if (lane == 0) {
        for (uint b = 0; b < BATCH; b++) {
            parts[(2 * b) * (LINEAR_THREADS / 32) + warp] = sums0[b];
            parts[(2 * b + 1) * (LINEAR_THREADS / 32) + warp] = sums1[b];
        }
    }
    BARRIER;
    // one thread for each row of the group and each vector
    const uint b = me / (2 * pairs);
    const uint row = first + me % (2 * pairs);
    if (b < live && row < count) {
        const uint pair = me % (2 * pairs) / 2;
        float sum = 0.0f;
        for (uint i = 0; i < QUARTERS; i++) {
            sum += parts[(2 * b + me % 2) * (LINEAR_THREADS / 32) + pair * QUARTERS + i];
        }
        if (is_of_a) {
            post(posted, p.post_at + (first_row + b) * MAX_RANK + row, sum * p.scale);
        } else {
            const uint at = (first_row + b) * p.out_features + row;
            y[at] = T((p.is_added ? float(y[at]) : 0.0f) + p.factor * sum);
        }
    }
}

struct AddWords {
    uint width;
    float offset;
    float eps;
    float factor;
};

// x += factor * norm(branch). One group computes one vector.
KERNEL(decode_add)(IN(T, branch, 0), IN(T, norm, 1), OUT(T, x, 2), WORDS(AddWords, 3) INDICES) {
    SHARED float scratch[32];
    WAIT_FOR_INPUT;
    GLOBAL const T* from = branch + group.x * p.width;
    GLOBAL T* to = x + group.x * p.width;
    float sum = 0.0f;
    for (uint i = me; i < p.width; i += threads) sum += float(from[i]) * float(from[i]);
    const float root = RSQRT(group_sum(sum, scratch, lane, warp, threads) / float(p.width) + p.eps);
    for (uint i = me; i < p.width; i += threads) {
        to[i] = T(float(to[i]) + p.factor * root * float(from[i]) * (p.offset + float(norm[i])));
    }
}

struct GatedWords {
    uint rows;
    uint has_norm;
    float offset;
    float eps;
    uint intermediate;
    uint gate_rank;
    uint up_rank;
    float gate_scale;
    float up_scale;
    uint gate_format;
    uint up_format;
    uint post_at;
    uint empty_at;
    uint empty_count;
};

// Norm, gate and up projections, and activation. One warp computes one row of both projections.
KERNEL(decode_gated)
(IN(T, x, 0), IN(T, norm, 1), IN(uchar, w_gate, 2), IN(uchar, w_up, 3), IN(T, a_gate, 4), IN(T, l_gate, 5), IN(T, a_up, 6),
 IN(T, l_up, 7), OUT(T, y, 8), OUT(ATOMIC_UINT, posted, 9), WORDS(GatedWords, 10) INDICES) {
    SHARED float normed[BATCH * HIDDEN];
    SHARED float scratch[32];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    const uint warps = GATED_THREADS / 32;
    const uint pairs_of_gate = (p.gate_rank + 1) / 2;
    const uint groups_of_a = (pairs_of_gate + (p.up_rank + 1) / 2 + warps - 1) / warps;
    const uint block = group.x / chunks;
    const bool is_of_a = HAS_TERMS && block < groups_of_a;
    uint row = (is_of_a ? block : block - groups_of_a) * warps + warp;
    GLOBAL const uchar* w0 = row_of(w_gate, p.gate_format, row, HIDDEN);
    GLOBAL const uchar* w1 = row_of(w_up, p.up_format, row, HIDDEN);
    GLOBAL const T* a0 = a_gate;
    GLOBAL const T* a1 = a_gate;
    bool is_valid = row < p.intermediate;
    // in a group of A, a warp takes two rows of one of the two A
    const bool is_up = is_of_a && row >= pairs_of_gate;
    uint row1 = 0;
    if (is_of_a) {
        const uint rank = is_up ? p.up_rank : p.gate_rank;
        row = 2 * (is_up ? row - pairs_of_gate : row);
        row1 = row + 1 < rank ? row + 1 : row;
        is_valid = row < rank;
        a0 = (is_up ? a_up : a_gate) + row * HIDDEN;
        a1 = (is_up ? a_up : a_gate) + row1 * HIDDEN;
    }
    TwoRows rows;
    float b_gate[SHARES], b_up[SHARES];
    if (is_valid) {
        if (is_of_a) {
            prefetch_rows(a0, a1, lane, rows);
        } else {
            prefetch_weights(w0, w1, p.gate_format, p.up_format, lane, rows);
        }
        if (HAS_TERMS && !is_of_a) {
            prefetch_b(l_gate, p.gate_rank, row, lane, b_gate);
            prefetch_b(l_up, p.up_rank, row, lane, b_up);
        }
    }
    WAIT_FOR_INPUT;
    empty_words(posted, p.empty_at, p.empty_count, group.x + 1 == groups.x, me, threads);
    if (is_of_a) {
        for (uint b = 0; is_valid && b < live; b++) {
            float z0, z1;
            times_two_of_a(a0, a1, rows, x + (first_row + b) * HIDDEN, norm, p.has_norm, p.offset, p.eps, lane, &z0, &z1);
            const uint at = p.post_at + ((first_row + b) * 2 + (is_up ? 1 : 0)) * MAX_RANK;
            const float scale = is_up ? p.up_scale : p.gate_scale;
            if (lane == 0) {
                post(posted, at + row, z0 * scale);
                if (row1 > row) post(posted, at + row1, z1 * scale);
            }
        }
        return;
    }
    norm_into<GATED_THREADS>(x + first_row * HIDDEN, live, norm, p.has_norm, p.offset, p.eps, normed, scratch, me, lane, warp);
    float gate[BATCH], up[BATCH];
    if (is_valid) dots_of_rows(w0, w1, p.gate_format, p.up_format, rows, normed, lane, gate, up);
#if HAS_TERMS
    // one warp reads each z for all warps of the group
    SHARED float z[2 * BATCH * MAX_RANK];
    for (uint i = warp; i < 2 * live; i += warps) {
        const bool is_of_up = i >= live;
        const uint rank = is_of_up ? p.up_rank : p.gate_rank;
        const uint row_of_z = first_row + (is_of_up ? i - live : i);
        const uint at = p.post_at + (row_of_z * 2 + (is_of_up ? 1 : 0)) * MAX_RANK;
        float own[SHARES];
        read_low_rank(
            posted, at, is_of_up ? a_up : a_gate, rank, is_of_up ? p.up_scale : p.gate_scale, x + row_of_z * HIDDEN, norm,
            p.has_norm, p.offset, p.eps, lane, own);
        UNROLL for (uint n = 0; n < SHARES; n++) z[i * MAX_RANK + lane + 32 * n] = own[n];
    }
    BARRIER;
#endif
    if (!is_valid) return;
    for (uint b = 0; b < live; b++) {
#if HAS_TERMS
        float own[SHARES];
        UNROLL for (uint n = 0; n < SHARES; n++) own[n] = z[b * MAX_RANK + lane + 32 * n];
        if (p.gate_rank > 0) gate[b] += times_b(b_gate, own);
        UNROLL for (uint n = 0; n < SHARES; n++) own[n] = z[(live + b) * MAX_RANK + lane + 32 * n];
        if (p.up_rank > 0) up[b] += times_b(b_up, own);
#endif
        if (lane == 0) {
            float value, slope;
            activation_at(gate[b], 0.0f, 0.0f, &value, &slope);
            y[(first_row + b) * p.intermediate + row] = T(value * up[b]);
        }
    }
}
struct HeadWords {
    uint rows;
    uint has_norm;
    float offset;
    float eps;
    // logits are multiplied by `factor`, then capped at `soft_cap` if it is not 0
    float factor;
    float soft_cap;
    uint vocab;
    uint rank;
    float scale;
    uint format;
    uint post_at;
    uint empty_at;
    uint empty_count;
};

// Norm and LM head; logits are f32. For each token, each group also writes its largest logit, the id of that logit, and the sum
// of exp(logit - largest): `parts[row][group] = (largest, id, sum)`. One warp computes HEAD_ROWS rows; HEAD_ROWS is even.
KERNEL(decode_head)
(IN(T, x, 0), IN(T, norm, 1), IN(uchar, w, 2), IN(T, a, 3), IN(T, l, 4), OUT(float, logits, 5), OUT(float, parts, 6),
 OUT(ATOMIC_UINT, posted, 7), WORDS(HeadWords, 8) INDICES) {
    SHARED float normed[BATCH * HIDDEN];
    SHARED float scratch[32];
    SHARED float found[BATCH * 3 * 32];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    const uint warps = HEAD_THREADS / 32;
    const uint groups_of_a = ((p.rank + 1) / 2 + warps - 1) / warps;
    const uint block = group.x / chunks;
    const bool is_of_a = HAS_TERMS && block < groups_of_a;
    // a warp computes HEAD_ROWS rows of the head, or two rows of A
    const uint count = is_of_a ? p.rank : p.vocab;
    const uint first = is_of_a ? 2 * (block * warps + warp) : ((block - groups_of_a) * warps + warp) * HEAD_ROWS;
    TwoRows rows;
    if (first < count) {
        const uint next = MINIMUM(first + 1, count - 1);
        if (is_of_a) {
            prefetch_rows(a + first * HIDDEN, a + next * HIDDEN, lane, rows);
        } else {
            prefetch_weights(
                row_of(w, p.format, first, HIDDEN), row_of(w, p.format, next, HIDDEN), p.format, p.format, lane, rows);
        }
    }
    WAIT_FOR_INPUT;
    empty_words(posted, p.empty_at, p.empty_count, group.x + 1 == groups.x, me, threads);
    const uint post_at = p.post_at + first_row * MAX_RANK;
    if (is_of_a) {
        const uint next = MINIMUM(first + 1, count - 1);
        for (uint b = 0; first < count && b < live; b++) {
            float z0, z1;
            times_two_of_a(
                a + first * HIDDEN, a + next * HIDDEN, rows, x + (first_row + b) * HIDDEN, norm, p.has_norm, p.offset, p.eps, lane, &z0, &z1);
            if (lane == 0) {
                post(posted, post_at + b * MAX_RANK + first, z0 * p.scale);
                if (next > first) post(posted, post_at + b * MAX_RANK + next, z1 * p.scale);
            }
        }
        return;
    }
    norm_into<HEAD_THREADS>(x + first_row * HIDDEN, live, norm, p.has_norm, p.offset, p.eps, normed, scratch, me, lane, warp);
    float z[BATCH][SHARES];
    float largest[BATCH], sums[BATCH];
    uint best[BATCH];
    for (uint b = 0; b < BATCH; b++) {
        largest[b] = -INFINITY;
        sums[b] = 0.0f;
        best[b] = 0;
    }
    for (uint r = 0; r < HEAD_ROWS; r += 2) {
        const uint row0 = first + r;
        if (row0 >= p.vocab) break;
        const uint row1 = MINIMUM(row0 + 1, p.vocab - 1);
        float sums0[BATCH], sums1[BATCH];
        const TwoRows now = rows;
        if (r + 2 < HEAD_ROWS && row0 + 2 < p.vocab) {
            const uint next = MINIMUM(row0 + 3, p.vocab - 1);
            prefetch_weights(
                row_of(w, p.format, row0 + 2, HIDDEN), row_of(w, p.format, next, HIDDEN), p.format, p.format, lane, rows);
        }
        dots_of_rows(
            row_of(w, p.format, row0, HIDDEN), row_of(w, p.format, row1, HIDDEN), p.format, p.format, now, normed, lane, sums0,
            sums1);
        if (HAS_TERMS && p.rank > 0) {
            float b0[SHARES], b1[SHARES];
            prefetch_b(l, p.rank, row0, lane, b0);
            prefetch_b(l, p.rank, row1, lane, b1);
            for (uint b = 0; b < live; b++) {
                const uint at = post_at + b * MAX_RANK;
                if (r == 0) {
                    read_low_rank(
                        posted, at, a, p.rank, p.scale, x + (first_row + b) * HIDDEN, norm, p.has_norm, p.offset, p.eps, lane, z[b]);
                }
                sums0[b] += times_b(b0, z[b]);
                sums1[b] += times_b(b1, z[b]);
            }
        }
        for (uint b = 0; b < live; b++) {
            for (uint j = 0; j < 2; j++) {
                const uint row = j == 0 ? row0 : row1;
                if (j == 1 && row1 == row0) continue;
                float logit = p.factor * (j == 0 ? sums0[b] : sums1[b]);
                if (p.soft_cap > 0.0f) logit = p.soft_cap * hyperbolic_tangent(logit / p.soft_cap);
                if (lane == 0) logits[wide(first_row + b) * p.vocab + row] = logit;
                if (logit > largest[b]) {
                    sums[b] = sums[b] * EXP(largest[b] - logit) + 1.0f;
                    largest[b] = logit;
                    best[b] = row;
                } else {
                    // a NaN is added to the sum here
                    sums[b] += EXP(logit - largest[b]);
                }
            }
        }
    }
    if (lane == 0) {
        for (uint b = 0; b < BATCH; b++) {
            found[(b * 3 + 0) * 32 + warp] = largest[b];
            found[(b * 3 + 1) * 32 + warp] = bits_to_float(best[b]);
            found[(b * 3 + 2) * 32 + warp] = sums[b];
        }
    }
    BARRIER;
    if (me < live) {
        const uint b = me;
        float maximum = -INFINITY;
        float id = 0.0f;
        for (uint i = 0; i < threads / 32; i++) {
            const float value = found[b * 3 * 32 + i];
            if (value > maximum) {
                maximum = value;
                id = found[(b * 3 + 1) * 32 + i];
            }
        }
        float sum = 0.0f;
        for (uint i = 0; i < threads / 32; i++) {
            const float value = found[b * 3 * 32 + i];
            const float of_warp = found[(b * 3 + 2) * 32 + i];
            // skips warps without rows; a NaN sum is added
            if (of_warp != 0.0f) sum += of_warp * EXP(value - maximum);
        }
        const uint num_parts = groups.x / chunks - groups_of_a;
        GLOBAL float* part = parts + (wide(first_row + b) * num_parts + block - groups_of_a) * 3;
        part[0] = maximum;
        part[1] = id;
        part[2] = sum;
    }
}
