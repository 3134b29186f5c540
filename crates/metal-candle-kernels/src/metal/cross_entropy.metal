// Cross-entropy of rows of logits with label smoothing; the gradient takes the place of the logits.
struct CrossEntropyWords {
    uint vocab;
    float smoothing;
    float scale;
    uint wants_gradient;
};

KERNEL(cross_entropy)
(OUT(T, logits, 0), IN(uint, targets, 1), IN(float, weights, 2), OUT(float, losses, 3), WORDS(CrossEntropyWords, 4) PLACE) {
    SHARED float scratch[32];
    GLOBAL T* row = logits + wide(group.x) * p.vocab;
    const uint target = targets[group.x];
    float largest = -INFINITY;
    float sum = 0.0f;
    float total = 0.0f;
    for (uint i = me; i < p.vocab; i += threads) {
        const float z = float(row[i]);
        total += z;
        if (z > largest) {
            sum = sum * EXP(largest - z) + 1.0f;
            largest = z;
        } else {
            // a NaN gets here and stays
            sum += EXP(z - largest);
        }
    }
    const float maximum = group_max(largest, scratch, lane, warp, threads);
    // a thread without an element has a sum of 0 below minus infinity
    sum = largest == -INFINITY && !(sum != sum) ? 0.0f : sum * EXP(largest - maximum);
    sum = group_sum(sum, scratch, lane, warp, threads);
    const float mean = group_sum(total, scratch, lane, warp, threads) / float(p.vocab);
    const float normalizer = maximum + LOG(sum);
    const float weight = weights[group.x];
    if (me == 0) {
        const float wanted = normalizer - float(row[target]);
        losses[group.x] = weight * ((1.0f - p.smoothing) * wanted + p.smoothing * (normalizer - mean));
    }
    if (p.wants_gradient == 0) return;
    BARRIER;
    const float factor = weight * p.scale;
    const float spread = p.smoothing / float(p.vocab);
    for (uint i = me; i < p.vocab; i += threads) {
        float gradient = EXP(float(row[i]) - maximum) / sum - spread;
        if (i == target) gradient -= 1.0f - p.smoothing;
        row[i] = T(gradient * factor);
    }
}
