// RMSNorm: y = x / sqrt(mean(x^2) + eps) * w, one group a row.
struct NormWords {
    uint width;
    float eps;
};

// 1 / sqrt(mean(x^2) + eps) of a row
FUNCTION float row_scale(
    GLOBAL const T* x, uint width, float eps, SHARED_ARG float* scratch, uint my_thread, uint my_lane, uint my_warp,
    uint num_threads) {
    float sum = 0.0f;
    for (uint i = my_thread; i < width; i += num_threads) {
        const float value = float(x[i]);
        sum += value * value;
    }
    return RSQRT(group_sum(sum, scratch, my_lane, my_warp, num_threads) / float(width) + eps);
}

KERNEL(rms_norm)(IN(T, x, 0), IN(T, weight, 1), OUT(T, y, 2), WORDS(NormWords, 3) PLACE) {
    SHARED float scratch[32];
    const wide start = wide(group.x) * p.width;
    const float scale = row_scale(x + start, p.width, p.eps, scratch, me, lane, warp, threads);
    for (uint i = me; i < p.width; i += threads) y[start + i] = T(float(x[start + i]) * scale * float(weight[i]));
}

// The gradient with respect to x is added to dx; the scale of each row is left in `scales`.
KERNEL(rms_norm_backward)
(IN(T, x, 0), IN(T, weight, 1), IN(T, dy, 2), OUT(T, dx, 3), OUT(float, scales, 4), WORDS(NormWords, 5) PLACE) {
    SHARED float scratch[32];
    const wide start = wide(group.x) * p.width;
    const float scale = row_scale(x + start, p.width, p.eps, scratch, me, lane, warp, threads);
    float dot = 0.0f;
    for (uint i = me; i < p.width; i += threads) {
        dot += float(dy[start + i]) * float(weight[i]) * float(x[start + i]) * scale;
    }
    const float mean = group_sum(dot, scratch, lane, warp, threads) / float(p.width);
    for (uint i = me; i < p.width; i += threads) {
        const float through = (float(dy[start + i]) * float(weight[i]) - float(x[start + i]) * scale * mean) * scale;
        dx[start + i] = T(float(dx[start + i]) + through);
    }
    if (me == 0) scales[group.x] = scale;
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
