// Attention in a step of one token for each of several sequences. The products for q, k and v are there; biases, norms and
// rotation are applied here, the new key and value go to the cache, and each query attends to its slot of it.
//
// A group takes HEADS query heads that share a key/value head, KEY_WARPS warps each, and a part of the keys: the warps of a head
// take blocks of 32 keys by turns. With several parts each group posts its result, and the last one puts them together; it
// leaves the words empty for the next layer. As in `decode.metal`, a group begins before its input is there.
#ifdef HEAD_DIM
#define WARPS (HEADS * KEY_WARPS)
#define ELEMENTS ((HEAD_DIM + 31) / 32)
#define PAIRS ((HEAD_DIM / 2 + 31) / 32)

// Fewer keys than this many blocks a warp are not divided.
#define LEAST_BLOCKS 2

// Keys that are asked for early, and values that are asked for with their keys.
#define HOLDS_KEYS (HEAD_DIM <= 128)
#define HOLDS_VALUES (HEAD_DIM <= 64)

struct DecodeAttentionWords {
    uint rows;
    uint heads;
    uint kv_heads;
    uint max_seq_len;
    float scale;
    // Most parts of the keys.
    uint parts;
    // Tokens that a query sees, itself included; 0 for all.
    uint window;
    // 0 for none.
    float soft_cap;
    // Rotated pairs of a head.
    uint pairs;
    uint is_adjacent;
    uint has_bias;
    // 1 for norms of each head of q and k, 2 for norms of all heads together.
    uint norm_kind;
    float eps;
    float offset;
    // The factor of the queries is 1 + beta * log(1 + position / period).
    float beta;
    uint period;
    uint empty_at;
    uint empty_count;
};

#if HOLDS_KEYS
// A lane's key of the 32 from `begin` on; keys from `last` on are taken from elsewhere.
FUNCTION void ask_for_keys(GLOBAL const T* keys, uint begin, uint last, uint my_lane, PRIVATE Eight* asked) {
    GLOBAL const T* row = keys + wide(MINIMUM(begin + my_lane, last)) * HEAD_DIM;
    UNROLL for (uint i = 0; i < HEAD_DIM / 8; i++) asked[i] = load_eight(row + 8 * i);
}
#endif

#if HOLDS_VALUES
// A lane's elements of each of the 32 values.
FUNCTION void ask_for_values(GLOBAL const T* values, uint begin, uint last, uint my_lane, PRIVATE T (*held)[ELEMENTS]) {
    UNROLL for (uint j = 0; j < 32; j++) {
        GLOBAL const T* row = values + wide(MINIMUM(begin + j, last)) * HEAD_DIM;
        UNROLL for (uint e = 0; e < ELEMENTS; e++) held[j][e] = row[MINIMUM(e * 32 + my_lane, uint(HEAD_DIM) - 1)];
    }
}
#endif

KERNEL(decode_attention)
(IN(T, q, 0), IN(T, k, 1), IN(T, v, 2), IN(T, bq, 3), IN(T, bk, 4), IN(T, bv, 5), IN(T, nq, 6), IN(T, nk, 7),
 IN(float, cosines, 8), IN(float, sines, 9), IN(uint, state, 10), OUT(T, keys, 11), OUT(T, values, 12), OUT(T, out, 13),
 OUT(ATOMIC_UINT, results, 14), OUT(ATOMIC_UINT, counters, 15), OUT(ATOMIC_UINT, posted, 16),
 WORDS(DecodeAttentionWords, 17) PLACE) {
    SHARED float queries[HEADS * HEAD_DIM];
    SHARED float new_key[HEAD_DIM];
    SHARED float new_value[HEAD_DIM];
    SHARED float maxima[WARPS];
    SHARED float totals[WARPS];
    SHARED float sums[WARPS * HEAD_DIM];
    SHARED uint is_last_group[1];
    SHARED float scratch[WARPS];
    const uint first_head = group.x * HEADS;
    const uint b = group.y;
    const uint kv_head = first_head / (p.heads / p.kv_heads);
    const uint last = state[p.rows + b];
    const uint num_keys = last + 1;
    const uint first_key = p.window > 0 && num_keys > p.window ? num_keys - p.window : 0;
    // the keys of this group
    const uint total = num_keys - first_key;
    const uint least = 32 * KEY_WARPS * LEAST_BLOCKS;
    const uint wanted = MINIMUM(p.parts, (total + least - 1) / least);
    const uint span = (total + 32 * wanted - 1) / (32 * wanted) * 32;
    const uint num_parts = (total + span - 1) / span;
    if (group.z >= num_parts) return;
    const uint begin = first_key + group.z * span;
    const uint end = MINIMUM(begin + span, num_keys);
    const bool has_new = end == num_keys;
    const uint slot = state[2 * p.rows + b];
    const wide start = (wide(slot) * p.kv_heads + kv_head) * p.max_seq_len * HEAD_DIM;
    const uint my_head = warp % HEADS;
    const uint first_block = begin + 32 * (warp / HEADS);
    // the last key and value are of this step, the others are asked for before the query is there
    const bool is_early = first_block < end && first_block + 32 <= last;
#if HOLDS_KEYS
    Eight asked[HEAD_DIM / 8];
    if (is_early) ask_for_keys(keys + start, first_block, last, lane, asked);
#endif
#if HOLDS_VALUES
    T held[32][ELEMENTS];
    if (is_early) ask_for_values(values + start, first_block, last, lane, held);
#endif
    WAIT_FOR_INPUT;
    if (group.x + group.y + group.z == 0) {
        for (uint i = me; i < p.empty_count; i += threads) ATOMIC_STORE(posted, p.empty_at + i, EMPTY);
    }
    float root_of_all[2] = {1.0f, 1.0f};
    if (p.norm_kind == 2) {
        for (uint kind = 0; kind < 2; kind++) {
            const uint width = (kind == 0 ? p.heads : p.kv_heads) * HEAD_DIM;
            GLOBAL const T* from = (kind == 0 ? q : k) + b * width;
            GLOBAL const T* bias = kind == 0 ? bq : bk;
            float squares = 0.0f;
            for (uint i = me; i < width; i += threads) {
                const float x = float(from[i]) + (p.has_bias ? float(bias[i]) : 0.0f);
                squares += x * x;
            }
            root_of_all[kind] = RSQRT(group_sum(squares, scratch, lane, warp, threads) / float(width) + p.eps);
        }
    }
    // a vector for each warp: the queries of the group and, where they are among its keys, the new key and value
    for (uint vector = warp; vector < HEADS + (has_new ? 2 : 0); vector += WARPS) {
        const bool is_query = vector < HEADS;
        const bool is_value = vector > HEADS;
        const uint head = is_query ? first_head + vector : kv_head;
        GLOBAL const T* from = is_query ? q : is_value ? v : k;
        from += (b * (is_query ? p.heads : p.kv_heads) + head) * HEAD_DIM;
        GLOBAL const T* bias = is_query ? bq : is_value ? bv : bk;
        const uint pairs = is_value ? 0 : p.pairs;
        const bool is_adjacent = p.is_adjacent > 0;
        float first[PAIRS], second[PAIRS];
        float squares = 0.0f;
        UNROLL for (uint n = 0; n < PAIRS; n++) {
            const uint i = lane + 32 * n;
            first[n] = second[n] = 0.0f;
            if (i < HEAD_DIM / 2) {
                // what is not rotated is taken by neighbours
                const uint at = i < pairs && !is_adjacent ? i : 2 * i;
                const uint other = i < pairs && !is_adjacent ? i + pairs : 2 * i + 1;
                first[n] = float(from[at]);
                second[n] = float(from[other]);
                if (p.has_bias) {
                    first[n] += float(bias[head * HEAD_DIM + at]);
                    second[n] += float(bias[head * HEAD_DIM + other]);
                }
                squares += first[n] * first[n] + second[n] * second[n];
            }
        }
        const bool is_normed = p.norm_kind > 0 && !is_value;
        float root = is_query ? root_of_all[0] : root_of_all[1];
        if (p.norm_kind == 1) root = RSQRT(warp_sum(squares) / float(HEAD_DIM) + p.eps);
        GLOBAL const T* norm = is_query ? nq : nk;
        if (p.norm_kind == 2) norm += head * HEAD_DIM;
        float factor = p.scale;
        if (p.period > 0) factor *= 1.0f + p.beta * LOG(1.0f + float(last / p.period));
        UNROLL for (uint n = 0; n < PAIRS; n++) {
            const uint i = lane + 32 * n;
            if (i < HEAD_DIM / 2) {
                const uint at = i < pairs && !is_adjacent ? i : 2 * i;
                const uint other = i < pairs && !is_adjacent ? i + pairs : 2 * i + 1;
                float x = first[n];
                float y = second[n];
                if (is_normed) {
                    x *= root * (p.offset + float(norm[at]));
                    y *= root * (p.offset + float(norm[other]));
                }
                if (i < pairs) {
                    const float cosine = cosines[last * pairs + i];
                    const float sine = sines[last * pairs + i];
                    const float turned = x * cosine - y * sine;
                    y = y * cosine + x * sine;
                    x = turned;
                }
                // as rounded as the cache
                const T x_kept = T(x);
                const T y_kept = T(y);
                if (is_query) {
                    queries[vector * HEAD_DIM + at] = float(x_kept) * factor;
                    queries[vector * HEAD_DIM + other] = float(y_kept) * factor;
                } else {
                    SHARED_ARG float* to = is_value ? new_value : new_key;
                    to[at] = float(x_kept);
                    to[other] = float(y_kept);
                    // one of the groups that share the key writes it
                    if (first_head % (p.heads / p.kv_heads) == 0) {
                        GLOBAL T* cache = (is_value ? values : keys) + start + wide(last) * HEAD_DIM;
                        cache[at] = x_kept;
                        cache[other] = y_kept;
                    }
                }
            }
        }
    }
    BARRIER;
    SHARED_ARG const float* query = queries + my_head * HEAD_DIM;
    float largest = -INFINITY;
    float sum = 0.0f;
    float result[ELEMENTS];
    UNROLL for (uint e = 0; e < ELEMENTS; e++) result[e] = 0.0f;
    for (uint block = first_block; block < end; block += 32 * KEY_WARPS) {
        const uint key = block + lane;
        const bool is_asked = is_early && block == first_block;
        float s = 0.0f;
#if HOLDS_KEYS
        if (!is_asked) ask_for_keys(keys + start, block, last, lane, asked);
#endif
#if HOLDS_VALUES
        if (!is_asked) ask_for_values(values + start, block, last, lane, held);
#endif
        UNROLL for (uint i = 0; i < HEAD_DIM / 8; i++) {
            float x[8];
#if HOLDS_KEYS
            unpack_eight(asked[i], x);
#else
            load8(keys + start + wide(MINIMUM(key, last)) * HEAD_DIM + 8 * i, x);
#endif
            UNROLL for (uint j = 0; j < 8; j++) s += x[j] * query[8 * i + j];
        }
        const bool is_new_block = block + 32 > last;
        if (key >= last) {
            s = 0.0f;
            for (uint i = 0; i < HEAD_DIM; i++) s += new_key[i] * query[i];
        }
        if (p.soft_cap > 0.0f) s = p.soft_cap * hyperbolic_tangent(s / p.soft_cap);
        if (key >= num_keys) s = -INFINITY;
        const float maximum = MAXIMUM(largest, warp_max(s));
        const float weight = key < num_keys ? EXP(s - maximum) : 0.0f;
        const float shrink = EXP(largest - maximum);
        largest = maximum;
        sum = sum * shrink + warp_sum(weight);
        UNROLL for (uint e = 0; e < ELEMENTS; e++) result[e] *= shrink;
        UNROLL for (uint j = 0; j < 32; j++) {
            const float w = warp_shuffle(weight, j);
            UNROLL for (uint e = 0; e < ELEMENTS; e++) {
                const uint i = MINIMUM(e * 32 + lane, uint(HEAD_DIM) - 1);
#if HOLDS_VALUES
                float value = float(held[j][e]);
#else
                float value = float(values[start + wide(MINIMUM(block + j, last)) * HEAD_DIM + i]);
#endif
                if (is_new_block && block + j >= last) value = new_value[i];
                result[e] += w * value;
            }
        }
    }
    if (lane == 0) {
        maxima[warp] = largest;
        totals[warp] = sum;
    }
    UNROLL for (uint e = 0; e < ELEMENTS; e++) {
        const uint i = e * 32 + lane;
        if (i < HEAD_DIM) sums[warp * HEAD_DIM + i] = result[e];
    }
    BARRIER;
    // the warps of a head put together; of several parts of its keys, `results` gets the largest score, the sum of weights and
    // the weighted values
    for (uint n = me; n < HEADS * HEAD_DIM; n += threads) {
        const uint head = n / HEAD_DIM;
        const uint i = n % HEAD_DIM;
        float maximum = -INFINITY;
        for (uint w = head; w < WARPS; w += HEADS) maximum = MAXIMUM(maximum, maxima[w]);
        float weights = 0.0f;
        float value = 0.0f;
        for (uint w = head; w < WARPS; w += HEADS) {
            const float shrink = EXP(maxima[w] - maximum);
            weights += totals[w] * shrink;
            value += sums[w * HEAD_DIM + i] * shrink;
        }
        const uint row = b * p.heads + first_head + head;
        if (num_parts == 1) {
            out[row * HEAD_DIM + i] = T(value / weights);
        } else {
            const uint at = (row * p.parts + group.z) * (HEAD_DIM + 2);
            if (i == 0) {
                post(results, at, maximum);
                post(results, at + 1, weights);
            }
            post(results, at + 2 + i, value);
        }
    }
    if (num_parts == 1) return;
    BARRIER;
    if (me == 0) {
        const uint counter = b * groups.x + group.x;
        const bool is_last = ATOMIC_ADD(counters, counter, 1) + 1 == num_parts;
        is_last_group[0] = is_last ? 1 : 0;
        if (is_last) ATOMIC_STORE(counters, counter, 0);
    }
    BARRIER;
    if (is_last_group[0] == 0) return;
    // all others have posted: what is not there yet will come
    for (uint n = me; n < HEADS * HEAD_DIM; n += threads) {
        const uint row = b * p.heads + first_head + n / HEAD_DIM;
        const uint i = n % HEAD_DIM;
        const uint from = row * p.parts * (HEAD_DIM + 2);
        uint found[MOST_PARTS][3];
        UNROLL for (uint part = 0; part < MOST_PARTS; part++) {
            const uint at = from + MINIMUM(part, num_parts - 1) * (HEAD_DIM + 2);
            found[part][0] = ATOMIC_LOAD(results, at);
            found[part][1] = ATOMIC_LOAD(results, at + 1);
            found[part][2] = ATOMIC_LOAD(results, at + 2 + i);
        }
        float maximum = -INFINITY;
        UNROLL for (uint part = 0; part < MOST_PARTS; part++) {
            const uint at = from + MINIMUM(part, num_parts - 1) * (HEAD_DIM + 2);
            while (found[part][0] == EMPTY) found[part][0] = ATOMIC_LOAD(results, at);
            while (found[part][1] == EMPTY) found[part][1] = ATOMIC_LOAD(results, at + 1);
            while (found[part][2] == EMPTY) found[part][2] = ATOMIC_LOAD(results, at + 2 + i);
            maximum = MAXIMUM(maximum, bits_to_float(found[part][0]));
        }
        float weights = 0.0f;
        float value = 0.0f;
        UNROLL for (uint part = 0; part < MOST_PARTS; part++) {
            if (part < num_parts) {
                const float shrink = EXP(bits_to_float(found[part][0]) - maximum);
                weights += bits_to_float(found[part][1]) * shrink;
                value += bits_to_float(found[part][2]) * shrink;
            }
        }
        out[row * HEAD_DIM + i] = T(value / weights);
    }
    BARRIER;
    // all threads have read them
    for (uint n = me; n < HEADS * num_parts * (HEAD_DIM + 2); n += threads) {
        const uint head = n / (num_parts * (HEAD_DIM + 2));
        const uint rest = n % (num_parts * (HEAD_DIM + 2));
        ATOMIC_STORE(results, (b * p.heads + first_head + head) * p.parts * (HEAD_DIM + 2) + rest, EMPTY);
    }
}
#endif
