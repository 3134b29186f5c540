// Attention with grouped key/value heads over a ragged batch.
//
// One lane computes the score of one key; for wide heads, PARTS lanes share a key. Each lane accumulates every 32nd element of
// the output. The softmax is online, with a running maximum along the keys. The host defines these constants:
//
// - HEAD_DIM: a multiple of 4, at most 256
// - MASK: 0 (causal), 1 (sliding window) or 2 (chunks). Tiles of keys that no query of the tile attends to are skipped.
// - HAS_CAP, HAS_SINKS: whether scores are soft-capped, and whether each head has an attention sink
#if HEAD_DIM <= 64
#define KEYS 32
#define ROWS 2
#define WARPS 8
#elif HEAD_DIM <= 128
#define KEYS 16
#define ROWS 1
#define WARPS 8
#else
#define KEYS 8
#define ROWS 1
#define WARPS 4
#endif
#define PARTS (32 / KEYS)
#define TILE (WARPS * ROWS)
#define SLICE (HEAD_DIM / PARTS)
#define WIDTH (HEAD_DIM + 1)
#define ELEMENTS ((HEAD_DIM + 31) / 32)

struct AttentionWords {
    uint heads;
    uint kv_heads;
    float scale;
    // in elements: from one key to the next, and from one key/value head to the next
    uint token_stride;
    uint head_stride;
    // number of keys in a window or a chunk
    uint mask_size;
    float cap;
};

// The first position that a query attends to.
FUNCTION uint first_key(uint position, uint mask_size) {
    if (MASK == 1) return position < mask_size ? 0 : position + 1 - mask_size;
    if (MASK == 2) return position - position % mask_size;
    return 0;
}

// Returns the soft-capped score and sets `slope` to its derivative.
FUNCTION float capped(float s, float cap, PRIVATE float* slope) {
    if (!HAS_CAP) return s;
    const float t = hyperbolic_tangent(s / cap);
    *slope = 1.0f - t * t;
    return cap * t;
}

FUNCTION float score(SHARED_ARG const float* a, SHARED_ARG const float* b, uint part) {
    float sum = 0.0f;
    for (uint i = part * SLICE; i < (part + 1) * SLICE; i++) sum += a[i] * b[i];
    for (uint mask = KEYS; mask < 32; mask *= 2) sum += warp_shuffle_xor(sum, mask);
    return sum;
}

FUNCTION void load_rows(
    GLOBAL const T* from, wide stride, uint count, uint capacity, SHARED_ARG float* to, uint width, uint my_thread,
    uint num_threads) {
    for (uint i = my_thread; i < capacity * HEAD_DIM; i += num_threads) {
        const uint row = i / HEAD_DIM;
        const uint column = i % HEAD_DIM;
        to[row * width + column] = row < count ? float(from[row * stride + column]) : 0.0f;
    }
}

// A tile is four words: its first query, its number of queries, the offset in elements of its sequence's first key, and the
// number of keys that its first query attends to. Each further query attends to one more.
KERNEL(attention)
(IN(T, q, 0), IN(T, k, 1), IN(T, v, 2), IN(uint, tiles, 3), IN(float, sinks, 4), OUT(T, out, 5), OUT(float, log_sums, 6),
 WORDS(AttentionWords, 7) INDICES) {
    SHARED float queries[TILE * HEAD_DIM];
    SHARED float keys[KEYS * WIDTH];
    SHARED float values[KEYS * WIDTH];
    GLOBAL const uint* tile = tiles + 4 * group.x;
    const uint head = group.y;
    const wide start = wide(tile[2]) + wide(head / (p.heads / p.kv_heads)) * p.head_stride;
    const wide query_stride = wide(p.heads) * HEAD_DIM;
    const wide first = tile[0] * query_stride + head * HEAD_DIM;
    load_rows(q + first, query_stride, tile[1], TILE, queries, HEAD_DIM, me, threads);
    float largest[ROWS], sums[ROWS], result[ROWS][ELEMENTS];
    for (uint r = 0; r < ROWS; r++) {
        largest[r] = -INFINITY;
        sums[r] = 0.0f;
        for (uint e = 0; e < ELEMENTS; e++) result[r][e] = 0.0f;
    }
    const uint key = lane % KEYS;
    const uint part = lane / KEYS;
    const uint num_keys = tile[3] + tile[1] - 1;
    for (uint begin = first_key(tile[3] - 1, p.mask_size); begin < num_keys; begin += KEYS) {
        const uint count = MINIMUM(uint(KEYS), num_keys - begin);
        BARRIER;
        load_rows(k + start + wide(begin) * p.token_stride, p.token_stride, count, KEYS, keys, WIDTH, me, threads);
        load_rows(v + start + wide(begin) * p.token_stride, p.token_stride, count, KEYS, values, WIDTH, me, threads);
        BARRIER;
        for (uint r = 0; r < ROWS; r++) {
            const uint row = warp * ROWS + r;
            float slope = 1.0f;
            const float s = capped(score(queries + row * HEAD_DIM, keys + key * WIDTH, part) * p.scale, p.cap, &slope);
            const bool is_late = begin + key >= first_key(tile[3] - 1 + row, p.mask_size);
            const bool is_seen = begin + key < tile[3] + row && key < count && (MASK == 0 || is_late);
            const float maximum = MAXIMUM(largest[r], warp_max(is_seen ? s : -INFINITY));
            if (maximum == -INFINITY) continue;
            const float weight = is_seen ? EXP(s - maximum) : 0.0f;
            const float shrink = EXP(largest[r] - maximum);
            largest[r] = maximum;
            sums[r] = sums[r] * shrink + warp_sum(part == 0 ? weight : 0.0f);
            for (uint e = 0; e < ELEMENTS; e++) result[r][e] *= shrink;
            for (uint j = 0; j < count; j++) {
                const float w = warp_shuffle(weight, j);
                for (uint e = 0; e < ELEMENTS; e++) {
                    const uint i = e * 32 + lane;
                    if (i < HEAD_DIM) result[r][e] += w * values[j * WIDTH + i];
                }
            }
        }
    }
    for (uint r = 0; r < ROWS; r++) {
        const uint row = warp * ROWS + r;
        if (row >= tile[1]) continue;
        if (HAS_SINKS) {
            const float maximum = MAXIMUM(largest[r], sinks[head]);
            const float shrink = EXP(largest[r] - maximum);
            largest[r] = maximum;
            sums[r] = sums[r] * shrink + EXP(sinks[head] - maximum);
            for (uint e = 0; e < ELEMENTS; e++) result[r][e] *= shrink;
        }
        for (uint e = 0; e < ELEMENTS; e++) {
            const uint i = e * 32 + lane;
            if (i < HEAD_DIM) out[first + row * query_stride + i] = T(result[r][e] / sums[r]);
        }
        if (KEEPS_SUMS && lane == 0) log_sums[wide(tile[0] + row) * p.heads + head] = largest[r] + LOG(sums[r]);
    }
}

struct DeltaWords {
    uint tokens;
    uint heads;
    uint rank;
};

// The dot product of out and d_out, for each token and head. If the output projection has a low-rank update (rank > 0), its
// gradient is added to d_out first. A warp computes one head of TERM_ROWS tokens.
KERNEL(attention_delta)
(IN(T, out, 0), OUT(T, d_out, 1), OUT(float, delta, 2), IN(T, dz, 3), IN(T, a, 4), WORDS(DeltaWords, 5) INDICES) {
    const uint at = group.x * (threads / 32) + warp;
    const uint head = at % p.heads;
    const uint first = at / p.heads * TERM_ROWS;
    if (first >= p.tokens) return;
    const uint rows = MINIMUM(uint(TERM_ROWS), p.tokens - first);
    const wide width = wide(p.heads) * HEAD_DIM;
    float dots[TERM_ROWS];
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) dots[r] = 0.0f;
    for (uint i = lane; i < HEAD_DIM; i += 32) {
        const uint column = head * HEAD_DIM + i;
        float sums[TERM_ROWS];
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) sums[r] = float(d_out[(first + MINIMUM(r, rows - 1)) * width + column]);
        add_low_rank(dz + first * p.rank, p.rank, 1.0f, a + column, width, rows, sums);
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) {
            if (r < rows) {
                const wide index = (first + r) * width + column;
                const T rounded = T(sums[r]);
                if (p.rank > 0) d_out[index] = rounded;
                dots[r] += float(rounded) * float(out[index]);
            }
        }
    }
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) {
        const float sum = warp_sum(dots[r]);
        if (lane == 0 && r < rows) delta[wide(first + r) * p.heads + head] = sum;
    }
}

// The gradient with respect to q. Tiles are as in `attention`, with the batch's own keys.
KERNEL(attention_backward_q)
(IN(T, q, 0), IN(T, k, 1), IN(T, v, 2), IN(T, d_out, 3), IN(float, log_sums, 4), IN(float, delta, 5), IN(uint, tiles, 6),
 OUT(T, dq, 7), WORDS(AttentionWords, 8) INDICES) {
    SHARED float queries[TILE * HEAD_DIM];
    SHARED float d_outs[TILE * HEAD_DIM];
    SHARED float keys[KEYS * WIDTH];
    SHARED float values[KEYS * WIDTH];
    GLOBAL const uint* tile = tiles + 4 * group.x;
    const uint head = group.y;
    const wide start = wide(tile[2]) + wide(head / (p.heads / p.kv_heads)) * p.head_stride;
    const wide query_stride = wide(p.heads) * HEAD_DIM;
    const wide first = tile[0] * query_stride + head * HEAD_DIM;
    load_rows(q + first, query_stride, tile[1], TILE, queries, HEAD_DIM, me, threads);
    load_rows(d_out + first, query_stride, tile[1], TILE, d_outs, HEAD_DIM, me, threads);
    float log_sum[ROWS], shift[ROWS], result[ROWS][ELEMENTS];
    for (uint r = 0; r < ROWS; r++) {
        const uint row = MINIMUM(warp * ROWS + r, tile[1] - 1);
        log_sum[r] = log_sums[wide(tile[0] + row) * p.heads + head];
        shift[r] = delta[wide(tile[0] + row) * p.heads + head];
        for (uint e = 0; e < ELEMENTS; e++) result[r][e] = 0.0f;
    }
    const uint key = lane % KEYS;
    const uint part = lane / KEYS;
    const uint num_keys = tile[3] + tile[1] - 1;
    for (uint begin = first_key(tile[3] - 1, p.mask_size); begin < num_keys; begin += KEYS) {
        const uint count = MINIMUM(uint(KEYS), num_keys - begin);
        BARRIER;
        load_rows(k + start + wide(begin) * p.token_stride, p.token_stride, count, KEYS, keys, WIDTH, me, threads);
        load_rows(v + start + wide(begin) * p.token_stride, p.token_stride, count, KEYS, values, WIDTH, me, threads);
        BARRIER;
        for (uint r = 0; r < ROWS; r++) {
            const uint row = warp * ROWS + r;
            float slope = 1.0f;
            const float s = capped(score(queries + row * HEAD_DIM, keys + key * WIDTH, part) * p.scale, p.cap, &slope);
            const float dp = score(d_outs + row * HEAD_DIM, values + key * WIDTH, part);
            const bool is_late = begin + key >= first_key(tile[3] - 1 + row, p.mask_size);
            const bool is_seen = begin + key < tile[3] + row && key < count && (MASK == 0 || is_late);
            float ds = is_seen ? EXP(s - log_sum[r]) * (dp - shift[r]) * p.scale : 0.0f;
            if (HAS_CAP) ds *= slope;
            for (uint j = 0; j < count; j++) {
                const float w = warp_shuffle(ds, j);
                for (uint e = 0; e < ELEMENTS; e++) {
                    const uint i = e * 32 + lane;
                    if (i < HEAD_DIM) result[r][e] += w * keys[j * WIDTH + i];
                }
            }
        }
    }
    for (uint r = 0; r < ROWS; r++) {
        const uint row = warp * ROWS + r;
        if (row >= tile[1]) continue;
        for (uint e = 0; e < ELEMENTS; e++) {
            const uint i = e * 32 + lane;
            if (i < HEAD_DIM) dq[first + row * query_stride + i] = T(result[r][e]);
        }
    }
}

// The gradients with respect to k and v, summed over the query heads that share a key/value head. A tile is four words: its
// first key, its number of keys, the start of the sequence, and the end of the queries that attend to one of the keys.
KERNEL(attention_backward_kv)
(IN(T, q, 0), IN(T, k, 1), IN(T, v, 2), IN(T, d_out, 3), IN(float, log_sums, 4), IN(float, delta, 5), IN(uint, tiles, 6),
 OUT(T, dk, 7), OUT(T, dv, 8), WORDS(AttentionWords, 9) INDICES) {
    SHARED float queries[KEYS * WIDTH];
    SHARED float d_outs[KEYS * WIDTH];
    SHARED float keys[TILE * HEAD_DIM];
    SHARED float values[TILE * HEAD_DIM];
    GLOBAL const uint* tile = tiles + 4 * group.x;
    const uint kv_head = group.y;
    const uint group_size = p.heads / p.kv_heads;
    const wide kv_stride = wide(p.kv_heads) * HEAD_DIM;
    const wide query_stride = wide(p.heads) * HEAD_DIM;
    const wide first = tile[0] * kv_stride + kv_head * HEAD_DIM;
    load_rows(k + first, kv_stride, tile[1], TILE, keys, HEAD_DIM, me, threads);
    load_rows(v + first, kv_stride, tile[1], TILE, values, HEAD_DIM, me, threads);
    float of_key[ROWS][ELEMENTS], of_value[ROWS][ELEMENTS];
    for (uint r = 0; r < ROWS; r++) {
        for (uint e = 0; e < ELEMENTS; e++) of_key[r][e] = of_value[r][e] = 0.0f;
    }
    const uint query = lane % KEYS;
    const uint part = lane / KEYS;
    for (uint head = kv_head * group_size; head < (kv_head + 1) * group_size; head++) {
        for (uint begin = tile[0]; begin < tile[3]; begin += KEYS) {
            const uint count = MINIMUM(uint(KEYS), tile[3] - begin);
            const wide from = begin * query_stride + head * HEAD_DIM;
            BARRIER;
            load_rows(q + from, query_stride, count, KEYS, queries, WIDTH, me, threads);
            load_rows(d_out + from, query_stride, count, KEYS, d_outs, WIDTH, me, threads);
            BARRIER;
            const wide at = wide(MINIMUM(begin + query, tile[3] - 1)) * p.heads + head;
            const float log_sum = log_sums[at];
            const float shift = delta[at];
            for (uint r = 0; r < ROWS; r++) {
                const uint row = warp * ROWS + r;
                float slope = 1.0f;
                const float s =
                    capped(score(keys + row * HEAD_DIM, queries + query * WIDTH, part) * p.scale, p.cap, &slope);
                const float dp = score(values + row * HEAD_DIM, d_outs + query * WIDTH, part);
                const bool is_late =
                    tile[0] + row - tile[2] >= first_key(begin + query - tile[2], p.mask_size);
                const bool is_seen = query < count && tile[0] + row <= begin + query && (MASK == 0 || is_late);
                const float weight = is_seen ? EXP(s - log_sum) : 0.0f;
                float ds = weight * (dp - shift) * p.scale;
                if (HAS_CAP) ds *= slope;
                for (uint j = 0; j < count; j++) {
                    const float w = warp_shuffle(weight, j);
                    const float d = warp_shuffle(ds, j);
                    for (uint e = 0; e < ELEMENTS; e++) {
                        const uint i = e * 32 + lane;
                        if (i < HEAD_DIM) {
                            of_value[r][e] += w * d_outs[j * WIDTH + i];
                            of_key[r][e] += d * queries[j * WIDTH + i];
                        }
                    }
                }
            }
        }
    }
    for (uint r = 0; r < ROWS; r++) {
        const uint row = warp * ROWS + r;
        if (row >= tile[1]) continue;
        for (uint e = 0; e < ELEMENTS; e++) {
            const uint i = e * 32 + lane;
            if (i >= HEAD_DIM) continue;
            dk[first + row * kv_stride + i] = T(of_key[r][e]);
            dv[first + row * kv_stride + i] = T(of_value[r][e]);
        }
    }
}

struct SinkWords {
    uint tokens;
    uint heads;
};

// The gradient with respect to the sinks. One group computes one head.
KERNEL(attention_sink_gradient)
(IN(float, sinks, 0), IN(float, log_sums, 1), IN(float, delta, 2), OUT(float, d_sinks, 3), WORDS(SinkWords, 4) INDICES) {
    SHARED float scratch[32];
    const uint head = group.x;
    float sum = 0.0f;
    for (uint token = me; token < p.tokens; token += threads) {
        const wide at = wide(token) * p.heads + head;
        sum -= EXP(sinks[head] - log_sums[at]) * delta[at];
    }
    sum = group_sum(sum, scratch, lane, warp, threads);
    if (me == 0) d_sinks[head] = sum;
}
