// RMSNorm: y = x / sqrt(mean(x^2) + eps) * w, a warp a row.
struct NormWords {
    uint rows;
    uint width;
    float eps;
    uint is_aligned; // rows begin at a multiple of eight elements and have such a length
};

KERNEL(rms_norm)(IN(T, x, 0), IN(T, weight, 1), OUT(T, y, 2), WORDS(NormWords, 3) PLACE) {
    const uint row = group.x * (threads / 32) + warp;
    if (row >= p.rows) return;
    GLOBAL const T* from = x + wide(row) * p.width;
    GLOBAL T* to = y + wide(row) * p.width;
    const uint even = p.is_aligned ? p.width : 0;
    float sum = 0.0f;
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8];
        load8(from + i, v);
        UNROLL for (uint j = 0; j < 8; j++) sum += v[j] * v[j];
    }
    for (uint i = even + lane; i < p.width; i += 32) sum += float(from[i]) * float(from[i]);
    const float scale = RSQRT(warp_sum(sum) / float(p.width) + p.eps);
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8], w[8];
        load8(from + i, v);
        load8(weight + i, w);
        UNROLL for (uint j = 0; j < 8; j++) v[j] = v[j] * scale * w[j];
        store4(to + i, v);
        store4(to + i + 4, v + 4);
    }
    for (uint i = even + lane; i < p.width; i += 32) to[i] = T(float(from[i]) * scale * float(weight[i]));
}

// The gradient with respect to x is added to dx; the scale of each row is left in `scales`.
KERNEL(rms_norm_backward)
(IN(T, x, 0), IN(T, weight, 1), IN(T, dy, 2), OUT(T, dx, 3), OUT(float, scales, 4), WORDS(NormWords, 5) PLACE) {
    const uint row = group.x * (threads / 32) + warp;
    if (row >= p.rows) return;
    const wide start = wide(row) * p.width;
    const uint even = p.is_aligned ? p.width : 0;
    float sum = 0.0f;
    float dot = 0.0f;
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8], w[8], d[8];
        load8(x + start + i, v);
        load8(weight + i, w);
        load8(dy + start + i, d);
        UNROLL for (uint j = 0; j < 8; j++) {
            sum += v[j] * v[j];
            dot += d[j] * w[j] * v[j];
        }
    }
    for (uint i = even + lane; i < p.width; i += 32) {
        const float value = float(x[start + i]);
        sum += value * value;
        dot += float(dy[start + i]) * float(weight[i]) * value;
    }
    const float scale = RSQRT(warp_sum(sum) / float(p.width) + p.eps);
    const float mean = warp_sum(dot) * scale / float(p.width);
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8], w[8], d[8], before[8];
        load8(x + start + i, v);
        load8(weight + i, w);
        load8(dy + start + i, d);
        load8(dx + start + i, before);
        UNROLL for (uint j = 0; j < 8; j++) before[j] += (d[j] * w[j] - v[j] * scale * mean) * scale;
        store4(dx + start + i, before);
        store4(dx + start + i + 4, before + 4);
    }
    for (uint i = even + lane; i < p.width; i += 32) {
        const float through = (float(dy[start + i]) * float(weight[i]) - float(x[start + i]) * scale * mean) * scale;
        dx[start + i] = T(float(dx[start + i]) + through);
    }
    if (lane == 0) scales[row] = scale;
}

struct ColumnWords {
    uint rows;
    uint width;
};

// The gradient with respect to the weight, f32: the sum over rows of dy * x * scale. A group takes 32 columns.
KERNEL(rms_norm_weight_gradient)
(IN(T, x, 0), IN(T, dy, 1), IN(float, scales, 2), OUT(float, dw, 3), WORDS(ColumnWords, 4) PLACE) {
    SHARED float sums[1024];
    const uint column = group.x * 32 + lane;
    float sum = 0.0f;
    if (column < p.width) {
        for (uint row = warp; row < p.rows; row += threads / 32) {
            const wide at = wide(row) * p.width + column;
            sum += float(dy[at]) * float(x[at]) * scales[row];
        }
    }
    sums[me] = sum;
    BARRIER;
    if (warp == 0 && column < p.width) {
        for (uint i = 1; i < threads / 32; i++) sum += sums[i * 32 + lane];
        dw[column] = sum;
    }
}

// The sums of the columns of x, f32.
KERNEL(column_sums)(IN(T, x, 0), OUT(float, sums_out, 1), WORDS(ColumnWords, 2) PLACE) {
    SHARED float sums[1024];
    const uint column = group.x * 32 + lane;
    float sum = 0.0f;
    if (column < p.width) {
        for (uint row = warp; row < p.rows; row += threads / 32) sum += float(x[wide(row) * p.width + column]);
    }
    sums[me] = sum;
    BARRIER;
    if (warp == 0 && column < p.width) {
        for (uint i = 1; i < threads / 32; i++) sum += sums[i * 32 + lane];
        sums_out[column] = sum;
    }
}
