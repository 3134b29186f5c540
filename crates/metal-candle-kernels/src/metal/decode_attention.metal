// Attention of a decode step: one token for each of several sequences. The kernel adds biases to the projected q, k and v,
// applies norms and rotary embeddings, writes the new key and value to the cache, and computes the attention over the slot.
//
// One group computes HEADS query heads that share a key/value head, for one token and one part of its keys. Its KEY_WARPS warps
// (more than HEADS) take turns with blocks of keys: KEY_LANES lanes hold eight elements each of a key and its value, and use them
// for all heads. If the keys have several parts, each group posts its result. The last group merges the results and empties the
// words for the next layer. As in `decode.metal`, a group starts before its input is complete.
#ifdef HEAD_DIM
#define PAIRS ((HEAD_DIM / 2 + 31) / 32)

// The keys that a warp reads side by side, the keys of one lane, and the product: the keys that a warp holds at a time.
#define KEYS_BESIDE (32 / KEY_LANES)
#define KEYS_AT_ONCE 4
#define BLOCK (KEYS_AT_ONCE * KEYS_BESIDE)

// Less than every score, but finite.
#define LOWEST -1e30f

// Number of parts whose results are loaded together.
#define PARTS_AT_ONCE 4

struct DecodeAttentionWords {
    uint rows;
    uint heads;
    uint kv_heads;
    uint max_seq_len;
    float scale;
    // maximum number of parts, and minimum number of keys in a part
    uint parts;
    uint min_keys;
    // sliding window in tokens, including the query's own; 0: no window
    uint window;
    // 0: no soft cap
    float soft_cap;
    // number of rotated pairs in a head
    uint pairs;
    uint is_adjacent;
    uint has_bias;
    // 0: no norm of q and k; 1: each head has its norm; 2: one norm over all heads
    uint norm_kind;
    float eps;
    float offset;
    // queries are multiplied by 1 + beta * log(1 + position / period); period 0: they are not
    float beta;
    uint period;
    uint empty_at;
    uint empty_count;
};

// The state of the online softmax of a head: the maximum score, the sum of weights, and the lane's elements of the weighted sum
// of values.
struct Attended {
    float largest;
    float weights;
    float values[8];
};

// Loads the lane's elements of the keys and values of the block at `begin`. Keys at or after `end` are loaded but not used.
FUNCTION void prefetch_keys(
    GLOBAL const T* keys, GLOBAL const T* values, uint begin, uint end, uint my_key, uint at, PRIVATE Eight* k,
    PRIVATE Eight* v) {
    UNROLL for (uint n = 0; n < KEYS_AT_ONCE; n++) {
        const wide row = wide(MINIMUM(begin + n * KEYS_BESIDE + my_key, end - 1)) * HEAD_DIM + at;
        k[n] = load_eight(keys + row);
        v[n] = load_eight(values + row);
    }
}

// The sum over the lanes that share a key.
FUNCTION float key_sum(float x) {
    UNROLL for (uint mask = KEY_LANES / 2; mask > 0; mask /= 2) x += warp_shuffle_xor(x, mask);
    return x;
}

FUNCTION float capped(float score, float cap) { return cap > 0.0f ? cap * hyperbolic_tangent(score / cap) : score; }

// Raises the maximum to `largest` and rescales the sums.
FUNCTION void raise_maximum(PRIVATE Attended& attended, float largest) {
    const float shrink = EXP(attended.largest - largest);
    attended.largest = largest;
    attended.weights *= shrink;
    UNROLL for (uint j = 0; j < 8; j++) attended.values[j] *= shrink;
}

KERNEL(decode_attention)
(IN(T, q, 0), IN(T, k, 1), IN(T, v, 2), IN(T, bq, 3), IN(T, bk, 4), IN(T, bv, 5), IN(T, nq, 6), IN(T, nk, 7),
 IN(float, cosines, 8), IN(float, sines, 9), IN(uint, state, 10), OUT(T, keys, 11), OUT(T, values, 12), OUT(T, out, 13),
 OUT(ATOMIC_UINT, results, 14), OUT(ATOMIC_UINT, counters, 15), OUT(ATOMIC_UINT, posted, 16),
 WORDS(DecodeAttentionWords, 17) INDICES) {
    SHARED float queries[HEADS * HEAD_DIM];
    SHARED float new_key[HEAD_DIM];
    SHARED float new_value[HEAD_DIM];
    SHARED float maxima[KEY_WARPS * HEADS];
    SHARED float totals[KEY_WARPS * HEADS];
    SHARED float sums[KEY_WARPS * HEADS * HEAD_DIM];
    SHARED uint is_last_group[1];
    SHARED float scratch[KEY_WARPS];
    const uint first_head = group.x * HEADS;
    const uint b = group.y;
    const uint kv_head = first_head / (p.heads / p.kv_heads);
    const uint last = state[p.rows + b];
    const uint num_keys = last + 1;
    const uint first_key = p.window > 0 && num_keys > p.window ? num_keys - p.window : 0;
    // the keys of this group
    const uint total = num_keys - first_key;
    const uint max_used_parts = MINIMUM(p.parts, (total + p.min_keys - 1) / p.min_keys);
    const uint span = (total + max_used_parts - 1) / max_used_parts;
    const uint num_parts = (total + span - 1) / span;
    if (group.z >= num_parts) return;
    const uint begin = first_key + group.z * span;
    const uint end = MINIMUM(begin + span, num_keys);
    const bool has_new = end == num_keys;
    const uint slot = state[2 * p.rows + b];
    const wide start = (wide(slot) * p.kv_heads + kv_head) * p.max_seq_len * HEAD_DIM;
    // the last key and value are computed in this step; the others are loaded before the query is available
    const uint old_end = MINIMUM(end, last);
    const uint my_key = lane / KEY_LANES;
    const bool has_elements = 8 * (lane % KEY_LANES) < HEAD_DIM;
    const uint my_elements = has_elements ? 8 * (lane % KEY_LANES) : 0;
    const uint first_block = begin + BLOCK * warp;
    Eight k_ahead[KEYS_AT_ONCE], v_ahead[KEYS_AT_ONCE];
    if (first_block < old_end) {
        prefetch_keys(keys + start, values + start, first_block, old_end, my_key, my_elements, k_ahead, v_ahead);
    }
    // A warp prepares one query or, if this group has the last part, the new key. Bias, norm weights and rotation are loaded
    // before the projections are available.
    const bool is_query = warp < HEADS;
    const bool has_vector = is_query || (has_new && warp == HEADS);
    const uint vector_head = is_query ? first_head + warp : kv_head;
    // only one of the groups that share a key/value head writes the new key and value
    const bool writes = first_head % (p.heads / p.kv_heads) == 0;
    GLOBAL T* new_row_of_keys = keys + start + wide(last) * HEAD_DIM;
    GLOBAL T* new_row_of_values = values + start + wide(last) * HEAD_DIM;
    uint index_0[PAIRS], index_1[PAIRS];
    float bias_0[PAIRS], bias_1[PAIRS], weight_0[PAIRS], weight_1[PAIRS], cosine[PAIRS], sine[PAIRS];
    UNROLL for (uint n = 0; n < PAIRS; n++) {
        const uint i = lane + 32 * n;
        // elements that are not rotated are handled as adjacent pairs
        const bool is_split = i < p.pairs && p.is_adjacent == 0;
        index_0[n] = is_split ? i : 2 * i;
        index_1[n] = is_split ? i + p.pairs : 2 * i + 1;
        bias_0[n] = bias_1[n] = 0.0f;
        weight_0[n] = weight_1[n] = cosine[n] = 1.0f;
        sine[n] = 0.0f;
        if (!has_vector || i >= HEAD_DIM / 2) continue;
        if (i < p.pairs) {
            cosine[n] = cosines[last * p.pairs + i];
            sine[n] = sines[last * p.pairs + i];
        }
        if (p.has_bias) {
            GLOBAL const T* bias = (is_query ? bq : bk) + vector_head * HEAD_DIM;
            bias_0[n] = float(bias[index_0[n]]);
            bias_1[n] = float(bias[index_1[n]]);
        }
        if (p.norm_kind > 0) {
            GLOBAL const T* norm = (is_query ? nq : nk) + (p.norm_kind == 2 ? vector_head * HEAD_DIM : 0);
            weight_0[n] = p.offset + float(norm[index_0[n]]);
            weight_1[n] = p.offset + float(norm[index_1[n]]);
        }
    }
    float factor = p.scale;
    if (p.period > 0) factor *= 1.0f + p.beta * LOG(1.0f + float(last / p.period));
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
    if (has_vector) {
        const uint width = (is_query ? p.heads : p.kv_heads) * HEAD_DIM;
        GLOBAL const T* from = (is_query ? q : k) + b * width + vector_head * HEAD_DIM;
        float squares = 0.0f;
        float first[PAIRS], second[PAIRS];
        UNROLL for (uint n = 0; n < PAIRS; n++) {
            first[n] = bias_0[n];
            second[n] = bias_1[n];
            if (lane + 32 * n < HEAD_DIM / 2) {
                first[n] += float(from[index_0[n]]);
                second[n] += float(from[index_1[n]]);
            }
            squares += first[n] * first[n] + second[n] * second[n];
        }
        float root = is_query ? root_of_all[0] : root_of_all[1];
        if (p.norm_kind == 1) root = RSQRT(warp_sum(squares) / float(HEAD_DIM) + p.eps);
        if (p.norm_kind == 0) root = 1.0f;
        UNROLL for (uint n = 0; n < PAIRS; n++) {
            if (lane + 32 * n < HEAD_DIM / 2) {
                const float x = first[n] * root * weight_0[n];
                const float y = second[n] * root * weight_1[n];
                // rounded to the type of the cache
                const T rotated_x = T(x * cosine[n] - y * sine[n]);
                const T rotated_y = T(y * cosine[n] + x * sine[n]);
                const uint at = index_0[n];
                const uint other = index_1[n];
                if (is_query) {
                    queries[warp * HEAD_DIM + at] = float(rotated_x) * factor;
                    queries[warp * HEAD_DIM + other] = float(rotated_y) * factor;
                } else {
                    new_key[at] = float(rotated_x);
                    new_key[other] = float(rotated_y);
                    if (writes) {
                        new_row_of_keys[at] = rotated_x;
                        new_row_of_keys[other] = rotated_y;
                    }
                }
            }
        }
    }
    if (has_new) {
        for (uint i = me; i < HEAD_DIM; i += threads) {
            const uint at = kv_head * HEAD_DIM + i;
            const T value = T(float(v[b * p.kv_heads * HEAD_DIM + at]) + (p.has_bias ? float(bv[at]) : 0.0f));
            new_value[i] = float(value);
            if (writes) new_row_of_values[i] = value;
        }
    }
    BARRIER;
    Attended attended[HEADS];
    UNROLL for (uint head = 0; head < HEADS; head++) {
        attended[head].largest = LOWEST;
        attended[head].weights = 0.0f;
        UNROLL for (uint j = 0; j < 8; j++) attended[head].values[j] = 0.0f;
    }
    for (uint block = first_block; block < old_end; block += BLOCK * KEY_WARPS) {
        if (block != first_block) {
            prefetch_keys(keys + start, values + start, block, old_end, my_key, my_elements, k_ahead, v_ahead);
        }
        UNROLL for (uint head = 0; head < HEADS; head++) {
            float query[8], scores[KEYS_AT_ONCE];
            load8_shared(queries + head * HEAD_DIM + my_elements, query);
            float largest = attended[head].largest;
            UNROLL for (uint n = 0; n < KEYS_AT_ONCE; n++) {
                float x[8];
                unpack_eight(k_ahead[n], x);
                float sum = 0.0f;
                UNROLL for (uint j = 0; j < 8; j++) sum += x[j] * query[j];
                scores[n] = capped(key_sum(has_elements ? sum : 0.0f), p.soft_cap);
                if (block + n * KEYS_BESIDE + my_key < old_end) largest = MAXIMUM(largest, scores[n]);
            }
            raise_maximum(attended[head], largest);
            UNROLL for (uint n = 0; n < KEYS_AT_ONCE; n++) {
                const bool is_valid = block + n * KEYS_BESIDE + my_key < old_end;
                const float weight = is_valid ? EXP(scores[n] - largest) : 0.0f;
                attended[head].weights += weight;
                float x[8];
                unpack_eight(v_ahead[n], x);
                UNROLL for (uint j = 0; j < 8; j++) attended[head].values[j] += weight * x[j];
            }
        }
    }
    UNROLL for (uint head = 0; head < HEADS; head++) {
        // the last warp adds the new key; only the lanes of its first key do
        if (has_new && warp == KEY_WARPS - 1) {
            float sum = 0.0f;
            UNROLL for (uint j = 0; j < 8; j++) sum += new_key[my_elements + j] * queries[head * HEAD_DIM + my_elements + j];
            const float score = capped(key_sum(has_elements ? sum : 0.0f), p.soft_cap);
            if (my_key == 0) {
                raise_maximum(attended[head], MAXIMUM(attended[head].largest, score));
                const float weight = EXP(score - attended[head].largest);
                attended[head].weights += weight;
                UNROLL for (uint j = 0; j < 8; j++) attended[head].values[j] += weight * new_value[my_elements + j];
            }
        }
        UNROLL for (uint mask = KEY_LANES; mask < 32; mask *= 2) {
            const float other = warp_shuffle_xor(attended[head].largest, mask);
            raise_maximum(attended[head], MAXIMUM(attended[head].largest, other));
            attended[head].weights += warp_shuffle_xor(attended[head].weights, mask);
            UNROLL for (uint j = 0; j < 8; j++) {
                attended[head].values[j] += warp_shuffle_xor(attended[head].values[j], mask);
            }
        }
        const uint at = warp * HEADS + head;
        if (lane == 0) {
            maxima[at] = attended[head].largest;
            totals[at] = attended[head].weights;
        }
        if (my_key == 0 && has_elements) {
            UNROLL for (uint j = 0; j < 8; j++) sums[at * HEAD_DIM + my_elements + j] = attended[head].values[j];
        }
    }
    BARRIER;
    // Merges the warps of each head. With several parts, posts the maximum score, the sum of weights and the weighted sum of
    // values to `results`.
    for (uint n = me; n < HEADS * HEAD_DIM; n += threads) {
        const uint head = n / HEAD_DIM;
        const uint i = n % HEAD_DIM;
        float maximum = LOWEST;
        UNROLL for (uint w = head; w < KEY_WARPS * HEADS; w += HEADS) maximum = MAXIMUM(maximum, maxima[w]);
        float weights = 0.0f;
        float value = 0.0f;
        UNROLL for (uint w = head; w < KEY_WARPS * HEADS; w += HEADS) {
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
    // the other groups have counted themselves after posting, so every missing word will arrive
    for (uint n = me; n < HEADS * HEAD_DIM; n += threads) {
        const uint row = b * p.heads + first_head + n / HEAD_DIM;
        const uint i = n % HEAD_DIM;
        const uint from = row * p.parts * (HEAD_DIM + 2);
        float maximum = LOWEST;
        float weights = 0.0f;
        float value = 0.0f;
        for (uint part = 0; part < num_parts; part += PARTS_AT_ONCE) {
            uint found[PARTS_AT_ONCE][3];
            UNROLL for (uint n = 0; n < PARTS_AT_ONCE; n++) {
                const uint at = from + MINIMUM(part + n, num_parts - 1) * (HEAD_DIM + 2);
                found[n][0] = ATOMIC_LOAD(results, at);
                found[n][1] = ATOMIC_LOAD(results, at + 1);
                found[n][2] = ATOMIC_LOAD(results, at + 2 + i);
            }
            UNROLL for (uint n = 0; n < PARTS_AT_ONCE; n++) {
                const uint at = from + MINIMUM(part + n, num_parts - 1) * (HEAD_DIM + 2);
                while (found[n][0] == EMPTY) found[n][0] = ATOMIC_LOAD(results, at);
                while (found[n][1] == EMPTY) found[n][1] = ATOMIC_LOAD(results, at + 1);
                while (found[n][2] == EMPTY) found[n][2] = ATOMIC_LOAD(results, at + 2 + i);
                if (part + n < num_parts) {
                    const float largest_of_part = bits_to_float(found[n][0]);
                    const float together = MAXIMUM(maximum, largest_of_part);
                    const float shrink = EXP(maximum - together);
                    const float share = EXP(largest_of_part - together);
                    maximum = together;
                    weights = weights * shrink + bits_to_float(found[n][1]) * share;
                    value = value * shrink + bits_to_float(found[n][2]) * share;
                }
            }
        }
        out[row * HEAD_DIM + i] = T(value / weights);
    }
    BARRIER;
    // all threads have read the results
    for (uint n = me; n < HEADS * num_parts * (HEAD_DIM + 2); n += threads) {
        const uint head = n / (num_parts * (HEAD_DIM + 2));
        const uint rest = n % (num_parts * (HEAD_DIM + 2));
        ATOMIC_STORE(results, (b * p.heads + first_head + head) * p.parts * (HEAD_DIM + 2) + rest, EMPTY);
    }
}
#endif
