// Fused kernels for the steps between the products of a block. They also add low-rank updates; rank 0 means no update.

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

// After the products of q, k and v: adds biases and low-rank updates, and rotates q and k if `is_rotated` is 1.
KERNEL(finish_qkv)
(IN(float, cosines, 0), IN(float, sines, 1), OUT(T, q, 2), OUT(T, k, 3), OUT(T, v, 4), IN(T, q_bias, 5), IN(T, k_bias, 6),
 IN(T, v_bias, 7), IN(T, q_z, 8), IN(T, k_z, 9), IN(T, v_z, 10), IN(T, q_b, 11), IN(T, k_b, 12), IN(T, v_b, 13),
 WORDS(RotationWords, 14) INDICES) {
    uint at = group.x * threads + me;
    const uint i = at % p.half_dim;
    at /= p.half_dim;
    const uint heads = p.q_heads + 2 * p.kv_heads;
    uint head = at % heads;
    const uint first = at / heads * TERM_ROWS;
    if (first >= p.tokens) return;
    const uint rows = MINIMUM(uint(TERM_ROWS), p.tokens - first);
    GLOBAL T* x = q;
    GLOBAL const T* bias = q_bias;
    GLOBAL const T* z = q_z;
    GLOBAL const T* b = q_b;
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
    const uint column = head * 2 * p.half_dim + i;
    const uint other = column + p.half_dim;
    float low[TERM_ROWS], high[TERM_ROWS];
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) {
        const wide row = (first + MINIMUM(r, rows - 1)) * width;
        low[r] = float(x[row + column]) + (p.has_bias[which] ? float(bias[column]) : 0.0f);
        high[r] = float(x[row + other]) + (p.has_bias[which] ? float(bias[other]) : 0.0f);
    }
    add_low_rank(z + first * rank, rank, p.scales[which], b + wide(column) * rank, 1, rows, low);
    add_low_rank(z + first * rank, rank, p.scales[which], b + wide(other) * rank, 1, rows, high);
    for (uint r = 0; r < rows; r++) {
        const uint token = first + r;
        const bool turns = p.is_rotated && which < 2;
        const float c = turns ? cosines[token * p.half_dim + i] : 1.0f;
        const float s = turns ? sines[token * p.half_dim + i] : 0.0f;
        x[token * width + column] = T(low[r] * c - high[r] * s);
        x[token * width + other] = T(high[r] * c + low[r] * s);
    }
}

struct MlpWords {
    uint tokens;
    uint width;
    uint ranks[2];
    float scales[2];
};

// After the products of gate and up: adds their low-rank updates, then y = silu(gate) * up.
KERNEL(finish_mlp)
(OUT(T, gate, 0), OUT(T, up, 1), OUT(T, y, 2), IN(T, gate_z, 3), IN(T, up_z, 4), IN(T, gate_b, 5), IN(T, up_b, 6),
 WORDS(MlpWords, 7) INDICES) {
    const uint at = group.x * threads + me;
    const uint column = at % p.width;
    const uint first = at / p.width * TERM_ROWS;
    if (first >= p.tokens) return;
    const uint rows = MINIMUM(uint(TERM_ROWS), p.tokens - first);
    const wide start = wide(first) * p.width + column;
    float g[TERM_ROWS], u[TERM_ROWS];
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) {
        const wide index = start + wide(MINIMUM(r, rows - 1)) * p.width;
        g[r] = float(gate[index]);
        u[r] = float(up[index]);
    }
    add_low_rank(gate_z + first * p.ranks[0], p.ranks[0], p.scales[0], gate_b + wide(column) * p.ranks[0], 1, rows, g);
    add_low_rank(up_z + first * p.ranks[1], p.ranks[1], p.scales[1], up_b + wide(column) * p.ranks[1], 1, rows, u);
    for (uint r = 0; r < rows; r++) {
        const wide index = start + wide(r) * p.width;
        // rounded, as the backward pass reads them
        const T of_gate = T(g[r]);
        const T of_up = T(u[r]);
        if (p.ranks[0] > 0) gate[index] = of_gate;
        if (p.ranks[1] > 0) up[index] = of_up;
        y[index] = T(float(of_gate) * sigmoid(float(of_gate)) * float(of_up));
    }
}

struct MlpBackwardWords {
    uint tokens;
    uint width;
    uint rank;
};

// The gradients of gate and up. First the low-rank gradient of the down projection is added to dy, the gradient of the
// activation. The gradient of gate then overwrites dy, and y is the recomputed activation.
KERNEL(finish_mlp_backward)
(IN(T, gate, 0), IN(T, up, 1), OUT(T, dy, 2), OUT(T, d_up, 3), OUT(T, y, 4), IN(T, dz, 5), IN(T, a, 6),
 WORDS(MlpBackwardWords, 7) INDICES) {
    const uint at = group.x * threads + me;
    const uint column = at % p.width;
    const uint first = at / p.width * TERM_ROWS;
    if (first >= p.tokens) return;
    const uint rows = MINIMUM(uint(TERM_ROWS), p.tokens - first);
    const wide start = wide(first) * p.width + column;
    float d[TERM_ROWS];
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) d[r] = float(dy[start + wide(MINIMUM(r, rows - 1)) * p.width]);
    add_low_rank(dz + first * p.rank, p.rank, 1.0f, a + column, p.width, rows, d);
    for (uint r = 0; r < rows; r++) {
        const wide index = start + wide(r) * p.width;
        const float g = float(gate[index]);
        const float u = float(up[index]);
        const float s = sigmoid(g);
        y[index] = T(g * s * u);
        d_up[index] = T(d[r] * g * s);
        dy[index] = T(d[r] * u * s * (1.0f + g * (1.0f - s)));
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

// The residual stream after a projection: y = residual + y + low-rank update, and `normed` is its RMSNorm. One group computes
// TERM_ROWS tokens.
KERNEL(finish_stream)
(IN(T, residual, 0), OUT(T, y, 1), IN(T, weight, 2), OUT(T, normed, 3), IN(T, z, 4), IN(T, b, 5), WORDS(StreamWords, 6)
 INDICES) {
    SHARED float scratch[32];
    const uint first = group.x * TERM_ROWS;
    const uint rows = MINIMUM(uint(TERM_ROWS), p.tokens - first);
    float squares[TERM_ROWS];
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) squares[r] = 0.0f;
    for (uint column = me; column < p.width; column += threads) {
        const wide start = wide(first) * p.width + column;
        float sums[TERM_ROWS];
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) {
            const wide index = start + wide(MINIMUM(r, rows - 1)) * p.width;
            sums[r] = float(residual[index]) + float(y[index]);
        }
        add_low_rank(z + first * p.rank, p.rank, p.scale, b + wide(column) * p.rank, 1, rows, sums);
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) {
            if (r < rows) {
                const T rounded = T(sums[r]);
                y[start + wide(r) * p.width] = rounded;
                squares[r] += float(rounded) * float(rounded);
            }
        }
    }
    if (!p.has_norm) return;
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) {
        squares[r] = RSQRT(group_sum(squares[r], scratch, lane, warp, threads) / float(p.width) + p.eps);
    }
    for (uint column = me; column < p.width; column += threads) {
        const float w = float(weight[column]);
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) {
            const wide index = (wide(first) + r) * p.width + column;
            if (r < rows) normed[index] = T(float(y[index]) * squares[r] * w);
        }
    }
}

struct NormBackwardWords {
    uint tokens;
    uint width;
    float eps;
    uint ranks[3];
};

// Backward pass of an RMSNorm of x. First the low-rank gradients of the layers that read the norm are added to dy. Then dy is
// overwritten with `before` plus the gradient with respect to x; `normed` is the recomputed output of the norm.
KERNEL(finish_norm_backward)
(IN(T, x, 0), IN(T, weight, 1), OUT(T, dy, 2), IN(T, before, 3), OUT(T, normed, 4), IN(T, dz0, 5), IN(T, dz1, 6),
 IN(T, dz2, 7), IN(T, a0, 8), IN(T, a1, 9), IN(T, a2, 10), WORDS(NormBackwardWords, 11) INDICES) {
    SHARED float scratch[32];
    const uint first = group.x * TERM_ROWS;
    const uint rows = MINIMUM(uint(TERM_ROWS), p.tokens - first);
    float squares[TERM_ROWS], dots[TERM_ROWS];
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) squares[r] = dots[r] = 0.0f;
    for (uint column = me; column < p.width; column += threads) {
        const wide start = wide(first) * p.width + column;
        float sums[TERM_ROWS];
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) sums[r] = float(dy[start + wide(MINIMUM(r, rows - 1)) * p.width]);
        add_low_rank(dz0 + first * p.ranks[0], p.ranks[0], 1.0f, a0 + column, p.width, rows, sums);
        add_low_rank(dz1 + first * p.ranks[1], p.ranks[1], 1.0f, a1 + column, p.width, rows, sums);
        add_low_rank(dz2 + first * p.ranks[2], p.ranks[2], 1.0f, a2 + column, p.width, rows, sums);
        const float w = float(weight[column]);
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) {
            if (r < rows) {
                const wide index = start + wide(r) * p.width;
                const T rounded = T(sums[r]);
                const float value = float(x[index]);
                dy[index] = rounded;
                squares[r] += value * value;
                dots[r] += float(rounded) * w * value;
            }
        }
    }
    UNROLL
    for (uint r = 0; r < TERM_ROWS; r++) {
        squares[r] = RSQRT(group_sum(squares[r], scratch, lane, warp, threads) / float(p.width) + p.eps);
        dots[r] = group_sum(dots[r], scratch, lane, warp, threads) * squares[r] / float(p.width);
    }
    for (uint column = me; column < p.width; column += threads) {
        const float w = float(weight[column]);
        UNROLL
        for (uint r = 0; r < TERM_ROWS; r++) {
            if (r < rows) {
                const wide index = (wide(first) + r) * p.width + column;
                const float n = float(x[index]) * squares[r];
                const float through = (float(dy[index]) * w - n * dots[r]) * squares[r];
                normed[index] = T(n * w);
                dy[index] = T(float(before[index]) + through);
            }
        }
    }
}
