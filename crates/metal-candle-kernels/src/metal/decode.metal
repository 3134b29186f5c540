// A decoder block for few tokens, each of another sequence: five kernels. Every weight is read once.
//
// There are `rows` tokens, taken BATCH (a constant) at a time; groups that share weights lie side by side. The state is on the
// device, `state[row]` is the id of a token, `state[rows + row]` its position and `state[2 * rows + row]` its slot of the
// cache, so that a step can be repeated without the CPU.
//
// On new CUDA devices a kernel begins while the one before it runs: what is before WAIT_FOR_INPUT reads weights, the state, and
// keys and values of earlier steps only, and writes nothing.
#define MAX_RANK 64

// Two rows of HIDDEN weights: a warp. Where they fit into registers they are asked for before anything else, so that they are on
// their way while the vectors are normed.
#define STEPS ((HIDDEN + 255) / 256)
#define HOLDS_ROWS (HIDDEN <= 1024)
struct TwoRows {
#if HOLDS_ROWS
    Eight first[STEPS];
    Eight second[STEPS];
#endif
    uint unused;
};

FUNCTION void ask_for_rows(GLOBAL const T* w0, GLOBAL const T* w1, uint my_lane, PRIVATE TwoRows& rows) {
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

// The products of the rows with each vector, summed. `x` holds BATCH vectors of HIDDEN floats.
FUNCTION void dots_of_rows(
    GLOBAL const T* w0, GLOBAL const T* w1, PRIVATE const TwoRows& rows, SHARED_ARG const float* x, uint my_lane,
    PRIVATE float* sums0, PRIVATE float* sums1) {
    for (uint b = 0; b < BATCH; b++) sums0[b] = sums1[b] = 0.0f;
    UNROLL for (uint step = 0; step < STEPS; step++) {
        const uint i = 8 * my_lane + 256 * step;
        if (i < HIDDEN) {
            float u[8], v[8];
#if HOLDS_ROWS
            unpack_eight(rows.first[step], u);
            unpack_eight(rows.second[step], v);
#else
            load8(w0 + i, u);
            load8(w1 + i, v);
#endif
            UNROLL for (uint b = 0; b < BATCH; b++) {
                float value[8];
                load8_shared(x + b * HIDDEN + i, value);
                UNROLL for (uint j = 0; j < 8; j++) {
                    sums0[b] += u[j] * value[j];
                    sums1[b] += v[j] * value[j];
                }
            }
        }
    }
    for (uint b = 0; b < BATCH; b++) {
        sums0[b] = warp_sum(sums0[b]);
        sums1[b] = warp_sum(sums1[b]);
    }
}

// The first weights of a lane's part of two rows, asked for early: AHEAD (a constant) times eight.
struct TwoParts {
    Eight first[AHEAD];
    Eight second[AHEAD];
};

FUNCTION void ask_for_parts(
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

// The products of a part of two rows of weights, from `from` up to `end`, with each of `live` vectors in device memory.
FUNCTION void dots_of_two(
    GLOBAL const T* w0, GLOBAL const T* w1, PRIVATE const TwoParts& parts, GLOBAL const T* x, uint live, uint width,
    uint from, uint end, uint my_lane, PRIVATE float* sums0, PRIVATE float* sums1) {
    for (uint b = 0; b < BATCH; b++) sums0[b] = sums1[b] = 0.0f;
    float u[8], v[8];
    UNROLL for (uint step = 0; step < AHEAD; step++) {
        const uint i = from + 8 * my_lane + 256 * step;
        if (i < end) {
            unpack_eight(parts.first[step], u);
            unpack_eight(parts.second[step], v);
            add_products(u, v, x + i, live, width, sums0, sums1);
        }
    }
    UNROLL4 for (uint i = from + 8 * my_lane + 256 * AHEAD; i < end; i += 256) {
        load8(w0 + i, u);
        load8(w1 + i, v);
        add_products(u, v, x + i, live, width, sums0, sums1);
    }
    for (uint b = 0; b < BATCH; b++) {
        sums0[b] = warp_sum(sums0[b]);
        sums1[b] = warp_sum(sums1[b]);
    }
}

// The normed vectors, `live` of them, as floats. A thread keeps its share of a vector until its norm is known.
template <uint THREADS>
FUNCTION void norm_into(
    GLOBAL const T* x, uint live, GLOBAL const T* weight, float eps, SHARED_ARG float* y, SHARED_ARG float* scratch,
    uint my_thread, uint my_lane, uint my_warp) {
    for (uint b = 0; b < BATCH; b++) {
        float values[(HIDDEN + THREADS - 1) / THREADS];
        float sum = 0.0f;
        UNROLL for (uint step = 0; step < (HIDDEN + THREADS - 1) / THREADS; step++) {
            const uint i = step * THREADS + my_thread;
            const float value = b < live && i < HIDDEN ? float(x[b * HIDDEN + i]) : 0.0f;
            values[step] = i < HIDDEN ? value * float(weight[i]) : 0.0f;
            sum += value * value;
        }
        const float scale = RSQRT(group_sum(sum, scratch, my_lane, my_warp, THREADS) / float(HIDDEN) + eps);
        UNROLL for (uint step = 0; step < (HIDDEN + THREADS - 1) / THREADS; step++) {
            const uint i = step * THREADS + my_thread;
            if (i < HIDDEN) y[b * HIDDEN + i] = values[step] * scale;
        }
    }
    BARRIER;
}

// z = scale * A x of a low-rank term, for vectors in shared memory: BATCH rows of MAX_RANK. A may lie at any element.
FUNCTION void low_rank_into(
    GLOBAL const T* a, uint rank, float scale, SHARED_ARG const float* x, uint width, SHARED_ARG float* z, uint my_lane,
    uint my_warp, uint num_threads) {
    for (uint r = my_warp; r < rank; r += num_threads / 32) {
        for (uint b = 0; b < BATCH; b++) {
            float sum = 0.0f;
            for (uint i = my_lane; i < width; i += 32) sum += float(a[r * width + i]) * x[b * width + i];
            sum = warp_sum(sum);
            if (my_lane == 0) z[b * MAX_RANK + r] = sum * scale;
        }
    }
}

FUNCTION void low_rank_of_device_into(
    GLOBAL const T* a, uint rank, float scale, GLOBAL const T* x, uint live, uint width, SHARED_ARG float* z, uint my_lane,
    uint my_warp, uint num_threads) {
    for (uint r = my_warp; r < rank; r += num_threads / 32) {
        for (uint b = 0; b < live; b++) {
            float sum = 0.0f;
            for (uint i = my_lane; i < width; i += 32) sum += float(a[r * width + i]) * float(x[b * width + i]);
            sum = warp_sum(sum);
            if (my_lane == 0) z[b * MAX_RANK + r] = sum * scale;
        }
    }
}

// Row `row` of B times z, added to the sums.
FUNCTION void add_low_rank(
    GLOBAL const T* b_matrix, uint rank, uint row, SHARED_ARG const float* z, PRIVATE float* sums, uint my_lane) {
    for (uint b = 0; b < BATCH; b++) {
        float sum = 0.0f;
        for (uint r = my_lane; r < rank; r += 32) sum += float(b_matrix[row * rank + r]) * z[b * MAX_RANK + r];
        sums[b] += warp_sum(sum);
    }
}

struct EmbedWords {
    uint width;
};

// x[b] = the embedding of token b
KERNEL(decode_embed)(IN(T, embedding, 0), IN(uint, state, 1), OUT(T, x, 2), WORDS(EmbedWords, 3) PLACE) {
    WAIT_FOR_INPUT;
    const wide from = wide(state[group.x]) * p.width;
    for (uint i = me; i < p.width; i += threads) x[group.x * p.width + i] = embedding[from + i];
}

struct ProjectionWords {
    uint rows;
    float eps;
    uint heads;
    uint kv_heads;
    uint half_dim;
    uint max_seq_len;
    uint has_bias;
    uint q_rank;
    uint k_rank;
    uint v_rank;
    float q_scale;
    float k_scale;
    float v_scale;
};

// Norm, projections to q, k and v, rotation of q and k; k and v go to the cache. A warp takes the two elements of a head that
// are rotated against each other; the groups of a head lie side by side.
KERNEL(decode_projections)
(IN(T, x, 0), IN(T, norm, 1), IN(T, wq, 2), IN(T, bq, 3), IN(T, wk, 4), IN(T, bk, 5), IN(T, wv, 6), IN(T, bv, 7),
 IN(T, aq, 8), IN(T, lq, 9), IN(T, ak, 10), IN(T, lk, 11), IN(T, av, 12), IN(T, lv, 13), IN(float, cosines, 14),
 IN(float, sines, 15), IN(uint, state, 16), OUT(T, q, 17), OUT(T, keys, 18), OUT(T, values, 19),
 WORDS(ProjectionWords, 20) PLACE) {
    SHARED float normed[BATCH * HIDDEN];
    SHARED float z[BATCH * MAX_RANK];
    SHARED float scratch[32];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    const uint pairs = threads / 32;
    const uint groups_of_head = p.half_dim / pairs;
    const uint block = group.x / chunks;
    uint head = block / groups_of_head;
    const uint i = block % groups_of_head * pairs + warp;
    GLOBAL const T* w = wq;
    GLOBAL const T* bias = bq;
    GLOBAL const T* a = aq;
    GLOBAL const T* l = lq;
    uint rank = p.q_rank;
    float scale = p.q_scale;
    uint kind = 0;
    if (head >= p.heads + p.kv_heads) {
        kind = 2;
        head -= p.heads + p.kv_heads;
        w = wv;
        bias = bv;
        a = av;
        l = lv;
        rank = p.v_rank;
        scale = p.v_scale;
    } else if (head >= p.heads) {
        kind = 1;
        head -= p.heads;
        w = wk;
        bias = bk;
        a = ak;
        l = lk;
        rank = p.k_rank;
        scale = p.k_scale;
    }
    const uint row0 = head * 2 * p.half_dim + i;
    const uint row1 = row0 + p.half_dim;
    GLOBAL const T* w0 = w + wide(row0) * HIDDEN;
    GLOBAL const T* w1 = w + wide(row1) * HIDDEN;
    TwoRows rows;
    ask_for_rows(w0, w1, lane, rows);
    // every lane reads what its group needs at the end, long before
    uint positions[BATCH];
    float cosine[BATCH], sine[BATCH];
    for (uint b = 0; b < BATCH; b++) {
        positions[b] = state[p.rows + first_row + MINIMUM(b, live - 1)];
        cosine[b] = cosines[positions[b] * p.half_dim + i];
        sine[b] = sines[positions[b] * p.half_dim + i];
    }
    WAIT_FOR_INPUT;
    norm_into<PROJECTION_THREADS>(x + first_row * HIDDEN, live, norm, p.eps, normed, scratch, me, lane, warp);
    if (rank > 0) {
        low_rank_into(a, rank, scale, normed, HIDDEN, z, lane, warp, threads);
        BARRIER;
    }
    float sums0[BATCH], sums1[BATCH];
    dots_of_rows(w0, w1, rows, normed, lane, sums0, sums1);
    if (rank > 0) {
        add_low_rank(l, rank, row0, z, sums0, lane);
        add_low_rank(l, rank, row1, z, sums1, lane);
    }
    if (lane != 0) return;
    for (uint b = 0; b < live; b++) {
        const uint row = first_row + b;
        float first = sums0[b];
        float second = sums1[b];
        if (p.has_bias) {
            first += float(bias[row0]);
            second += float(bias[row1]);
        }
        const uint position = positions[b];
        if (kind < 2) {
            const float turned = first * cosine[b] - second * sine[b];
            second = second * cosine[b] + first * sine[b];
            first = turned;
        }
        if (kind == 0) {
            q[row * p.heads * 2 * p.half_dim + row0] = T(first);
            q[row * p.heads * 2 * p.half_dim + row1] = T(second);
        } else {
            const wide at = ((wide(state[2 * p.rows + row]) * p.kv_heads + head) * p.max_seq_len + position) * 2 * p.half_dim;
            GLOBAL T* cache = kind == 1 ? keys : values;
            cache[at + i] = T(first);
            cache[at + i + p.half_dim] = T(second);
        }
    }
}

struct RotateWords {
    uint rows;
    uint heads;
    uint kv_heads;
    uint half_dim;
    uint max_seq_len;
    uint has_bias;
};

// What follows the products for q, k and v where they are products of matrices: biases, rotation, and k and v to the cache.
KERNEL(decode_rotate)
(IN(T, k, 0), IN(T, v, 1), IN(T, bq, 2), IN(T, bk, 3), IN(T, bv, 4), IN(float, cosines, 5), IN(float, sines, 6),
 IN(uint, state, 7), OUT(T, q, 8), OUT(T, keys, 9), OUT(T, values, 10), WORDS(RotateWords, 11) PLACE) {
    WAIT_FOR_INPUT;
    uint at = group.x * threads + me;
    const uint i = at % p.half_dim;
    at /= p.half_dim;
    uint head = at % (p.heads + 2 * p.kv_heads);
    const uint row = at / (p.heads + 2 * p.kv_heads);
    if (row >= p.rows) return;
    GLOBAL const T* from = q;
    GLOBAL const T* bias = bq;
    uint kind = 0;
    if (head >= p.heads + p.kv_heads) {
        kind = 2;
        from = v;
        bias = bv;
        head -= p.heads + p.kv_heads;
    } else if (head >= p.heads) {
        kind = 1;
        from = k;
        bias = bk;
        head -= p.heads;
    }
    const uint column = head * 2 * p.half_dim + i;
    const uint start = row * (kind == 0 ? p.heads : p.kv_heads) * 2 * p.half_dim + column;
    float first = float(from[start]);
    float second = float(from[start + p.half_dim]);
    if (p.has_bias) {
        first += float(bias[column]);
        second += float(bias[column + p.half_dim]);
    }
    const uint position = state[p.rows + row];
    if (kind < 2) {
        const float cosine = cosines[position * p.half_dim + i];
        const float sine = sines[position * p.half_dim + i];
        const float turned = first * cosine - second * sine;
        second = second * cosine + first * sine;
        first = turned;
    }
    if (kind == 0) {
        q[start] = T(first);
        q[start + p.half_dim] = T(second);
    } else {
        const wide to = ((wide(state[2 * p.rows + row]) * p.kv_heads + head) * p.max_seq_len + position) * 2 * p.half_dim + i;
        GLOBAL T* cache = kind == 1 ? keys : values;
        cache[to] = T(first);
        cache[to + p.half_dim] = T(second);
    }
}

struct DecodeAttentionWords {
    uint rows;
    uint heads;
    uint kv_heads;
    uint max_seq_len;
    float scale;
};

#ifdef HEAD_DIM
#define ELEMENTS ((HEAD_DIM + 31) / 32)

// Values that are asked for with their keys.
#if HEAD_DIM <= 64
#define HELD 32
#else
#define HELD 1
#endif

// A lane's key of the 32 from `begin` on; those behind the end have weight 0.
FUNCTION void ask_for_keys(GLOBAL const T* keys, uint begin, uint num_keys, uint my_lane, PRIVATE Eight* asked) {
    GLOBAL const T* row = keys + wide(MINIMUM(begin + my_lane, num_keys - 1)) * HEAD_DIM;
    UNROLL for (uint i = 0; i < HEAD_DIM / 8; i++) asked[i] = load_eight(row + 8 * i);
}

// A lane's elements of each of the 32 values.
FUNCTION void ask_for_values(
    GLOBAL const T* values, uint begin, uint num_keys, uint my_lane, PRIVATE T (*held)[ELEMENTS]) {
    UNROLL for (uint j = 0; j < HELD; j++) {
        GLOBAL const T* row = values + wide(MINIMUM(begin + j, num_keys - 1)) * HEAD_DIM;
        UNROLL for (uint e = 0; e < ELEMENTS; e++) held[j][e] = row[MINIMUM(e * 32 + my_lane, uint(HEAD_DIM) - 1)];
    }
}

// Attention of one query over its slot of the cache: a group for each head and token. The warps take blocks of 32 keys by
// turns and put their parts together at the end.
KERNEL(decode_attention)
(IN(T, q, 0), IN(T, keys, 1), IN(T, values, 2), IN(uint, state, 3), OUT(T, out, 4), WORDS(DecodeAttentionWords, 5) PLACE) {
    SHARED float query[HEAD_DIM];
    SHARED float maxima[32];
    SHARED float totals[32];
    SHARED float parts[DECODE_WARPS * HEAD_DIM];
    const uint head = group.x;
    const uint b = group.y;
    const uint num_keys = state[p.rows + b] + 1;
    const uint kv_head = head / (p.heads / p.kv_heads);
    const wide start = (wide(state[2 * p.rows + b]) * p.kv_heads + kv_head) * p.max_seq_len * HEAD_DIM;
    // the last key and value are of this step, the others are asked for before the query is there
    Eight asked[HEAD_DIM / 8];
    T held[HELD][ELEMENTS];
    if (32 * warp + 32 < num_keys) {
        ask_for_keys(keys + start, 32 * warp, num_keys, lane, asked);
        ask_for_values(values + start, 32 * warp, num_keys, lane, held);
    }
    WAIT_FOR_INPUT;
    for (uint i = me; i < HEAD_DIM; i += threads) query[i] = float(q[(b * p.heads + head) * HEAD_DIM + i]) * p.scale;
    BARRIER;
    float largest = -INFINITY;
    float sum = 0.0f;
    float result[ELEMENTS];
    for (uint e = 0; e < ELEMENTS; e++) result[e] = 0.0f;
    for (uint begin = 32 * warp; begin < num_keys; begin += 32 * DECODE_WARPS) {
        const uint key = begin + lane;
        if (begin != 32 * warp || begin + 32 >= num_keys) {
            ask_for_keys(keys + start, begin, num_keys, lane, asked);
            ask_for_values(values + start, begin, num_keys, lane, held);
        }
        float s = 0.0f;
        UNROLL for (uint i = 0; i < HEAD_DIM / 8; i++) {
            float v[8];
            unpack_eight(asked[i], v);
            UNROLL for (uint j = 0; j < 8; j++) s += v[j] * query[8 * i + j];
        }
        if (key >= num_keys) s = -INFINITY;
        const float maximum = MAXIMUM(largest, warp_max(s));
        const float weight = key < num_keys ? EXP(s - maximum) : 0.0f;
        const float shrink = EXP(largest - maximum);
        largest = maximum;
        sum = sum * shrink + warp_sum(weight);
        for (uint e = 0; e < ELEMENTS; e++) result[e] *= shrink;
        UNROLL for (uint j = 0; j < 32; j++) {
            const float w = warp_shuffle(weight, j);
            UNROLL for (uint e = 0; e < ELEMENTS; e++) {
#if HEAD_DIM <= 64
                result[e] += w * float(held[j][e]);
#else
                const uint i = MINIMUM(e * 32 + lane, uint(HEAD_DIM) - 1);
                result[e] += w * float(values[start + wide(MINIMUM(begin + j, num_keys - 1)) * HEAD_DIM + i]);
#endif
            }
        }
    }
    if (lane == 0) {
        maxima[warp] = largest;
        totals[warp] = sum;
    }
    for (uint e = 0; e < ELEMENTS; e++) {
        const uint i = e * 32 + lane;
        if (i < HEAD_DIM) parts[warp * HEAD_DIM + i] = result[e];
    }
    BARRIER;
    float maximum = -INFINITY;
    for (uint w = 0; w < DECODE_WARPS; w++) maximum = MAXIMUM(maximum, maxima[w]);
    float total = 0.0f;
    for (uint w = 0; w < DECODE_WARPS; w++) total += totals[w] * EXP(maxima[w] - maximum);
    for (uint i = me; i < HEAD_DIM; i += threads) {
        float value = 0.0f;
        for (uint w = 0; w < DECODE_WARPS; w++) value += parts[w * HEAD_DIM + i] * EXP(maxima[w] - maximum);
        out[(b * p.heads + head) * HEAD_DIM + i] = T(value / total);
    }
}
#endif

struct LinearWords {
    uint rows;
    uint in_features;
    uint out_features;
    uint rank;
    float scale;
};

// y += W x + scale B A x. Four warps share two rows, each a quarter of their width.
#define QUARTERS 4
KERNEL(decode_linear)
(IN(T, x, 0), IN(T, w, 1), IN(T, a, 2), IN(T, l, 3), OUT(T, y, 4), WORDS(LinearWords, 5) PLACE) {
    SHARED float z[BATCH * MAX_RANK];
    SHARED float parts[LINEAR_THREADS / 32 * 2 * BATCH];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    GLOBAL const T* vectors = x + first_row * p.in_features;
    const uint pairs = LINEAR_THREADS / 32 / QUARTERS;
    const uint first = 2 * pairs * (group.x / chunks);
    const uint row0 = MINIMUM(first + 2 * (warp / QUARTERS), p.out_features - 1);
    const uint row1 = MINIMUM(row0 + 1, p.out_features - 1);
    // parts of the width are multiples of 256
    const uint share = (p.in_features + 256 * QUARTERS - 1) / (256 * QUARTERS) * 256;
    const uint from = MINIMUM(warp % QUARTERS * share, p.in_features);
    const uint end = MINIMUM(from + share, p.in_features);
    GLOBAL const T* w0 = w + wide(row0) * p.in_features;
    GLOBAL const T* w1 = w + wide(row1) * p.in_features;
    TwoParts asked;
    ask_for_parts(w0, w1, from, end, lane, asked);
    WAIT_FOR_INPUT;
    float sums0[BATCH], sums1[BATCH];
    dots_of_two(w0, w1, asked, vectors, live, p.in_features, from, end, lane, sums0, sums1);
    if (p.rank > 0) {
        low_rank_of_device_into(a, p.rank, p.scale, vectors, live, p.in_features, z, lane, warp, threads);
        BARRIER;
        if (warp % QUARTERS == 0) {
            add_low_rank(l, p.rank, row0, z, sums0, lane);
            add_low_rank(l, p.rank, row1, z, sums1, lane);
        }
    }
    if (lane == 0) {
        for (uint b = 0; b < BATCH; b++) {
            parts[(2 * b) * (LINEAR_THREADS / 32) + warp] = sums0[b];
            parts[(2 * b + 1) * (LINEAR_THREADS / 32) + warp] = sums1[b];
        }
    }
    BARRIER;
    // a thread for each row of the group and each vector
    const uint b = me / (2 * pairs);
    const uint row = first + me % (2 * pairs);
    if (b < live && row < p.out_features) {
        const uint pair = me % (2 * pairs) / 2;
        float sum = 0.0f;
        for (uint i = 0; i < QUARTERS; i++) {
            sum += parts[(2 * b + me % 2) * (LINEAR_THREADS / 32) + pair * QUARTERS + i];
        }
        const uint at = (first_row + b) * p.out_features + row;
        y[at] = T(float(y[at]) + sum);
    }
}

struct GatedWords {
    uint rows;
    float eps;
    uint intermediate;
    uint gate_rank;
    uint up_rank;
    float gate_scale;
    float up_scale;
};

// Norm, gate and up projection and activation; a warp takes a row of each.
KERNEL(decode_gated)
(IN(T, x, 0), IN(T, norm, 1), IN(T, w_gate, 2), IN(T, w_up, 3), IN(T, a_gate, 4), IN(T, l_gate, 5), IN(T, a_up, 6),
 IN(T, l_up, 7), OUT(T, y, 8), WORDS(GatedWords, 9) PLACE) {
    SHARED float normed[BATCH * HIDDEN];
    SHARED float z_gate[BATCH * MAX_RANK];
    SHARED float z_up[BATCH * MAX_RANK];
    SHARED float scratch[32];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    const uint row = group.x / chunks * (threads / 32) + warp;
    const bool is_row = row < p.intermediate;
    const wide at = wide(MINIMUM(row, p.intermediate - 1)) * HIDDEN;
    TwoRows rows;
    ask_for_rows(w_gate + at, w_up + at, lane, rows);
    WAIT_FOR_INPUT;
    norm_into<GATED_THREADS>(x + first_row * HIDDEN, live, norm, p.eps, normed, scratch, me, lane, warp);
    if (p.gate_rank + p.up_rank > 0) {
        low_rank_into(a_gate, p.gate_rank, p.gate_scale, normed, HIDDEN, z_gate, lane, warp, threads);
        low_rank_into(a_up, p.up_rank, p.up_scale, normed, HIDDEN, z_up, lane, warp, threads);
        BARRIER;
    }
    if (!is_row) return;
    float gate[BATCH], up[BATCH];
    dots_of_rows(w_gate + at, w_up + at, rows, normed, lane, gate, up);
    if (p.gate_rank > 0) add_low_rank(l_gate, p.gate_rank, row, z_gate, gate, lane);
    if (p.up_rank > 0) add_low_rank(l_up, p.up_rank, row, z_up, up, lane);
    if (lane == 0) {
        for (uint b = 0; b < live; b++) {
            y[(first_row + b) * p.intermediate + row] = T(gate[b] / (1.0f + EXP(-gate[b])) * up[b]);
        }
    }
}

struct HeadWords {
    uint rows;
    float eps;
    uint vocab;
    uint rank;
    float scale;
};

// Norm and head: the logits in f32. Each group also leaves, for each token, its largest logit, that one's id and the sum of
// exponentials of the distances from it: `parts[row][group] = (largest, id, sum)`. A warp takes HEAD_ROWS rows, HEAD_ROWS even.
KERNEL(decode_head)
(IN(T, x, 0), IN(T, norm, 1), IN(T, w, 2), IN(T, a, 3), IN(T, l, 4), OUT(float, logits, 5), OUT(float, parts, 6),
 WORDS(HeadWords, 7) PLACE) {
    SHARED float normed[BATCH * HIDDEN];
    SHARED float z[BATCH * MAX_RANK];
    SHARED float scratch[32];
    SHARED float found[BATCH * 3 * 32];
    const uint chunks = (p.rows + BATCH - 1) / BATCH;
    const uint first_row = group.x % chunks * BATCH;
    const uint live = MINIMUM(uint(BATCH), p.rows - first_row);
    const uint first = (group.x / chunks * (threads / 32) + warp) * HEAD_ROWS;
    TwoRows rows;
    if (first < p.vocab) {
        ask_for_rows(w + wide(first) * HIDDEN, w + wide(MINIMUM(first + 1, p.vocab - 1)) * HIDDEN, lane, rows);
    }
    WAIT_FOR_INPUT;
    norm_into<HEAD_THREADS>(x + first_row * HIDDEN, live, norm, p.eps, normed, scratch, me, lane, warp);
    if (p.rank > 0) {
        low_rank_into(a, p.rank, p.scale, normed, HIDDEN, z, lane, warp, threads);
        BARRIER;
    }
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
            ask_for_rows(w + wide(row0 + 2) * HIDDEN, w + wide(next) * HIDDEN, lane, rows);
        }
        dots_of_rows(w + wide(row0) * HIDDEN, w + wide(row1) * HIDDEN, now, normed, lane, sums0, sums1);
        if (p.rank > 0) {
            add_low_rank(l, p.rank, row0, z, sums0, lane);
            add_low_rank(l, p.rank, row1, z, sums1, lane);
        }
        for (uint b = 0; b < live; b++) {
            for (uint j = 0; j < 2; j++) {
                const uint row = j == 0 ? row0 : row1;
                if (j == 1 && row1 == row0) continue;
                const float logit = j == 0 ? sums0[b] : sums1[b];
                if (lane == 0) logits[wide(first_row + b) * p.vocab + row] = logit;
                if (logit > largest[b]) {
                    sums[b] = sums[b] * EXP(largest[b] - logit) + 1.0f;
                    largest[b] = logit;
                    best[b] = row;
                } else {
                    // a NaN gets here and stays
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
            // nothing of a warp without a row, but all of a NaN
            if (of_warp != 0.0f) sum += of_warp * EXP(value - maximum);
        }
        GLOBAL float* part = parts + (wide(first_row + b) * (groups.x / chunks) + group.x / chunks) * 3;
        part[0] = maximum;
        part[1] = id;
        part[2] = sum;
    }
}
