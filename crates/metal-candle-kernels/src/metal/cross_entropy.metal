// Cross-entropy of rows of logits with label smoothing. The gradient overwrites the logits.
struct CrossEntropyWords {
    uint vocab;
    float smoothing;
    float scale;
    uint needs_gradient;
    uint is_aligned; // rows start at a multiple of eight elements, and their length is one
    float form_scale;
    float cap; // 0: no soft cap
};

// The logit of a product of the output head, and its derivative. Without HAS_FORM the product is the logit.
FUNCTION float logit_of(float product, float scale, float cap) {
    if (!HAS_FORM) return product;
    return cap > 0.0f ? cap * hyperbolic_tangent(product * scale / cap) : product * scale;
}
FUNCTION float slope_of(float logit, float scale, float cap) {
    if (!HAS_FORM) return 1.0f;
    return cap > 0.0f ? scale * (1.0f - logit / cap) * (1.0f + logit / cap) : scale;
}

// Updates the running maximum, the sum of exp(logit - maximum), and the sum of logits.
FUNCTION void add_logits(
    PRIVATE const float* z, uint count, PRIVATE float* largest, PRIVATE float* sum, PRIVATE float* total) {
    float maximum = *largest;
    for (uint i = 0; i < count; i++) {
        maximum = MAXIMUM(maximum, z[i]);
        *total += z[i];
    }
    if (maximum > *largest) {
        *sum *= EXP(*largest - maximum);
        *largest = maximum;
    }
    // a NaN is added to the sum here
    for (uint i = 0; i < count; i++) *sum += EXP(z[i] - *largest);
}

KERNEL(cross_entropy)
(OUT(T, logits, 0), IN(uint, targets, 1), IN(float, weights, 2), OUT(float, losses, 3), WORDS(CrossEntropyWords, 4) INDICES) {
    SHARED float scratch[32];
    GLOBAL T* row = logits + wide(group.x) * p.vocab;
    const uint target = targets[group.x];
    float largest = -INFINITY;
    float sum = 0.0f;
    float total = 0.0f;
    const uint even = p.is_aligned ? p.vocab : 0;
    UNROLL4 for (uint i = 8 * me; i < even; i += 8 * threads) {
        float z[8];
        load8(row + i, z);
        UNROLL for (uint j = 0; j < 8; j++) z[j] = logit_of(z[j], p.form_scale, p.cap);
        add_logits(z, 8, &largest, &sum, &total);
    }
    for (uint i = even + me; i < p.vocab; i += threads) {
        const float z = logit_of(float(row[i]), p.form_scale, p.cap);
        add_logits(&z, 1, &largest, &sum, &total);
    }
    const float maximum = group_max(largest, scratch, lane, warp, threads);
    // a thread without elements has the sum 0 and the maximum -infinity; a NaN sum stays NaN
    sum = largest == -INFINITY && !(sum != sum) ? 0.0f : sum * EXP(largest - maximum);
    sum = group_sum(sum, scratch, lane, warp, threads);
    const float mean = group_sum(total, scratch, lane, warp, threads) / float(p.vocab);
    const float normalizer = maximum + LOG(sum);
    const float weight = weights[group.x];
    if (me == 0) {
        const float target_loss = normalizer - logit_of(float(row[target]), p.form_scale, p.cap);
        losses[group.x] = weight * ((1.0f - p.smoothing) * target_loss + p.smoothing * (normalizer - mean));
    }
    if (p.needs_gradient == 0) return;
    BARRIER;
    const float factor = weight * p.scale;
    const float spread = p.smoothing / float(p.vocab);
    const float share = factor / sum;
    UNROLL4 for (uint i = 8 * me; i < even; i += 8 * threads) {
        float z[8];
        load8(row + i, z);
        UNROLL for (uint j = 0; j < 8; j++) {
            const float logit = logit_of(z[j], p.form_scale, p.cap);
            z[j] = EXP(logit - maximum) * share - spread * factor;
            if (i + j == target) z[j] -= (1.0f - p.smoothing) * factor;
            if (HAS_FORM) z[j] *= slope_of(logit, p.form_scale, p.cap);
        }
        store4(row + i, z);
        store4(row + i + 4, z + 4);
    }
    for (uint i = even + me; i < p.vocab; i += threads) {
        const float logit = logit_of(float(row[i]), p.form_scale, p.cap);
        float gradient = EXP(logit - maximum) * share - spread * factor;
        if (i == target) gradient -= (1.0f - p.smoothing) * factor;
        if (HAS_FORM) gradient *= slope_of(logit, p.form_scale, p.cap);
        row[i] = T(gradient);
    }
}
