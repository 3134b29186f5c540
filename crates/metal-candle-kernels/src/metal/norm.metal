// RMSNorm, and LayerNorm if IS_LAYER. A row consists of one or several runs that are normalized separately, one warp per run:
// (x - shift) * scale * weight + bias. The scale is 1 / sqrt(mean of squares + eps); the shift is 0, or the mean if IS_LAYER.
// Without HAS_WEIGHT the weight is 1; without HAS_BIAS the bias is 0.
#ifndef IS_LAYER
#define IS_LAYER 0
#define HAS_WEIGHT 1
#define HAS_BIAS 0
#endif

struct NormWords {
    uint runs;
    uint width;
    float eps;
    uint is_aligned; // runs start at a multiple of eight elements, and their length is one
    float offset;    // added to each weight
    uint parts;      // number of runs in a row; each has its own weights
};

// The mean of a run if IS_LAYER, else 0.
FUNCTION float shift_of(GLOBAL const T* x, uint width, uint my_lane) {
    if (!IS_LAYER) return 0.0f;
    float sum = 0.0f;
    for (uint i = my_lane; i < width; i += 32) sum += float(x[i]);
    return warp_sum(sum) / float(width);
}

KERNEL(norm_forward)
(IN(T, x, 0), IN(T, weight, 1), IN(T, bias, 2), OUT(T, y, 3), WORDS(NormWords, 4) INDICES) {
    const uint run = group.x * (threads / 32) + warp;
    if (run >= p.runs) return;
    GLOBAL const T* from = x + wide(run) * p.width;
    GLOBAL T* to = y + wide(run) * p.width;
    const uint at = run % p.parts * p.width;
    const uint even = p.is_aligned ? p.width : 0;
    const float shift = shift_of(from, p.width, lane);
    float sum = 0.0f;
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8];
        load8(from + i, v);
        UNROLL for (uint j = 0; j < 8; j++) sum += (v[j] - shift) * (v[j] - shift);
    }
    for (uint i = even + lane; i < p.width; i += 32) {
        const float v = float(from[i]) - shift;
        sum += v * v;
    }
    const float scale = RSQRT(warp_sum(sum) / float(p.width) + p.eps);
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8], w[8];
        load8(from + i, v);
        if (HAS_WEIGHT) load8(weight + at + i, w);
        UNROLL for (uint j = 0; j < 8; j++) v[j] = (v[j] - shift) * scale * (HAS_WEIGHT ? w[j] + p.offset : 1.0f);
        if (HAS_BIAS) {
            load8(bias + at + i, w);
            UNROLL for (uint j = 0; j < 8; j++) v[j] += w[j];
        }
        store4(to + i, v);
        store4(to + i + 4, v + 4);
    }
    for (uint i = even + lane; i < p.width; i += 32) {
        const float v = (float(from[i]) - shift) * scale * (HAS_WEIGHT ? float(weight[at + i]) + p.offset : 1.0f);
        to[i] = T(HAS_BIAS ? v + float(bias[at + i]) : v);
    }
}

// Adds the gradient with respect to x to dx. Writes the scale of each run to `scales`, followed by the shifts if IS_LAYER.
KERNEL(norm_backward)
(IN(T, x, 0), IN(T, weight, 1), IN(T, dy, 2), OUT(T, dx, 3), OUT(float, scales, 4), WORDS(NormWords, 5) INDICES) {
    const uint run = group.x * (threads / 32) + warp;
    if (run >= p.runs) return;
    const wide start = wide(run) * p.width;
    const uint at = run % p.parts * p.width;
    const uint even = p.is_aligned ? p.width : 0;
    const float shift = shift_of(x + start, p.width, lane);
    float sum = 0.0f;
    float dot = 0.0f;
    float total = 0.0f;
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8], w[8], d[8];
        load8(x + start + i, v);
        if (HAS_WEIGHT) load8(weight + at + i, w);
        load8(dy + start + i, d);
        UNROLL for (uint j = 0; j < 8; j++) {
            const float value = v[j] - shift;
            const float weighted = HAS_WEIGHT ? d[j] * (w[j] + p.offset) : d[j];
            sum += value * value;
            dot += weighted * value;
            if (IS_LAYER) total += weighted;
        }
    }
    for (uint i = even + lane; i < p.width; i += 32) {
        const float value = float(x[start + i]) - shift;
        const float weighted = float(dy[start + i]) * (HAS_WEIGHT ? float(weight[at + i]) + p.offset : 1.0f);
        sum += value * value;
        dot += weighted * value;
        if (IS_LAYER) total += weighted;
    }
    const float scale = RSQRT(warp_sum(sum) / float(p.width) + p.eps);
    const float mean = warp_sum(dot) * scale / float(p.width);
    const float level = IS_LAYER ? warp_sum(total) / float(p.width) : 0.0f;
    UNROLL4 for (uint i = 8 * lane; i < even; i += 256) {
        float v[8], w[8], d[8], before[8];
        load8(x + start + i, v);
        if (HAS_WEIGHT) load8(weight + at + i, w);
        load8(dy + start + i, d);
        load8(dx + start + i, before);
        UNROLL for (uint j = 0; j < 8; j++) {
            const float weighted = HAS_WEIGHT ? d[j] * (w[j] + p.offset) : d[j];
            before[j] += (weighted - (v[j] - shift) * scale * mean - level) * scale;
        }
        store4(dx + start + i, before);
        store4(dx + start + i + 4, before + 4);
    }
    for (uint i = even + lane; i < p.width; i += 32) {
        const float weighted = float(dy[start + i]) * (HAS_WEIGHT ? float(weight[at + i]) + p.offset : 1.0f);
        const float through = (weighted - (float(x[start + i]) - shift) * scale * mean - level) * scale;
        dx[start + i] = T(float(dx[start + i]) + through);
    }
    if (lane == 0) {
        scales[run] = scale;
        if (IS_LAYER) scales[p.runs + run] = shift;
    }
}

struct WeightWords {
    uint rows;
    uint columns; // number of weights
    uint width;   // length of a run
    uint parts;   // number of runs in a row
};

// The gradient with respect to the weight, f32: the sum over rows of dy * (x - shift) * scale. One group computes 32 columns.
KERNEL(norm_weight_gradient)
(IN(T, x, 0), IN(T, dy, 1), IN(float, scales, 2), OUT(float, dw, 3), WORDS(WeightWords, 4) INDICES) {
    SHARED float sums[1024];
    const uint column = group.x * 32 + lane;
    float sum = 0.0f;
    if (column < p.columns) {
        const uint part = column / p.width;
        for (uint row = warp; row < p.rows; row += threads / 32) {
            const wide at = wide(row) * p.columns + column;
            const uint run = row * p.parts + part;
            const float shift = IS_LAYER ? scales[p.rows * p.parts + run] : 0.0f;
            sum += float(dy[at]) * (float(x[at]) - shift) * scales[run];
        }
    }
    sums[me] = sum;
    BARRIER;
    if (warp == 0 && column < p.columns) {
        for (uint i = 1; i < threads / 32; i++) sum += sums[i * 32 + lane];
        dw[column] = sum;
    }
}

struct ColumnWords {
    uint rows;
    uint width;
};

// The sum of each column of x, f32.
KERNEL(column_sums)(IN(T, x, 0), OUT(float, sums_out, 1), WORDS(ColumnWords, 2) INDICES) {
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
