// Adam and AdamW steps on one flat f32 buffer that contains parameters and state, and norms of gradients.
struct AdamWords {
    uint count;
    uint num_sections;
    uint first_moments;
    uint second_moments;
    float learning_rate;
    float beta1;
    float beta2;
    float eps;
    float weight_decay;
    float root;
    float size;
    float grad_scale;
    uint is_decoupled;
};

// A section is five words: its start, its length, the start of its state, its learning-rate factor, and whether weight decay
// applies. Sections are sorted by start; elements outside of them do not change.
KERNEL(adam)(OUT(float, buffer, 0), IN(float, gradients, 1), IN(uint, sections, 2), WORDS(AdamWords, 3) INDICES) {
    const uint at = group.x * threads + me;
    if (at >= p.count) return;
    uint low = 0;
    uint high = p.num_sections - 1;
    while (low < high) {
        const uint middle = (low + high + 1) / 2;
        if (sections[5 * middle] <= at) low = middle;
        else high = middle - 1;
    }
    GLOBAL const uint* section = sections + 5 * low;
    if (at < section[0] || at - section[0] >= section[1]) return;
    const uint state = section[2] + at - section[0];
    const float rate = bits_to_float(section[3]);
    const float decay = section[4] ? p.weight_decay : 0.0f;
    float value = buffer[at];
    float g = gradients[at] * p.grad_scale;
    if (p.is_decoupled) value *= 1.0f - p.learning_rate * rate * decay;
    else g += value * decay;
    const float first = buffer[p.first_moments + state] * p.beta1 + g * (1.0f - p.beta1);
    const float second = buffer[p.second_moments + state] * p.beta2 + g * g * (1.0f - p.beta2);
    buffer[p.first_moments + state] = first;
    buffer[p.second_moments + state] = second;
    buffer[at] = value - p.size * rate * first / (SQRT(second) * p.root + p.eps);
}

struct SumWords {
    uint count;
};

// The sum of squares of x: each group writes one partial sum. `sum_of_parts`, with one group, adds them.
KERNEL(sum_of_squares)(IN(float, x, 0), OUT(float, sums, 1), WORDS(SumWords, 2) INDICES) {
    SHARED float scratch[32];
    float sum = 0.0f;
    for (wide i = wide(group.x) * threads + me; i < p.count; i += wide(groups.x) * threads) sum += x[i] * x[i];
    sum = group_sum(sum, scratch, lane, warp, threads);
    if (me == 0) sums[group.x] = sum;
}

KERNEL(sum_of_parts)(IN(float, x, 0), OUT(float, sums, 1), WORDS(SumWords, 2) INDICES) {
    SHARED float scratch[32];
    float sum = 0.0f;
    for (uint i = me; i < p.count; i += threads) sum += x[i];
    sum = group_sum(sum, scratch, lane, warp, threads);
    if (me == 0) sums[0] = sum;
}
