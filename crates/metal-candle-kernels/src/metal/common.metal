// Sum and maximum over the threads of a group; every thread gets the result. `scratch` has one float per warp.
FUNCTION float group_sum(float x, SHARED_ARG float* scratch, uint my_lane, uint my_warp, uint num_threads) {
    x = warp_sum(x);
    if (my_lane == 0) scratch[my_warp] = x;
    BARRIER;
    float sum = 0.0f;
    for (uint i = 0; i < num_threads / 32; i++) sum += scratch[i];
    BARRIER;
    return sum;
}

FUNCTION float group_max(float x, SHARED_ARG float* scratch, uint my_lane, uint my_warp, uint num_threads) {
    x = warp_max(x);
    if (my_lane == 0) scratch[my_warp] = x;
    BARRIER;
    float largest = scratch[0];
    for (uint i = 1; i < num_threads / 32; i++) largest = MAXIMUM(largest, scratch[i]);
    BARRIER;
    return largest;
}

FUNCTION float sigmoid(float x) { return 1.0f / (1.0f + EXP(-x)); }

FUNCTION float hyperbolic_tangent(float x) {
    const float square = x * x;
    // near 0 the quotient below loses precision
    if (square < 0.02f) return x * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.05396825f)));
    const float e = EXP(-2.0f * (x < 0.0f ? -x : x));
    const float t = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -t : t;
}

// A thread adds a low-rank update, y[t, j] += scale * sum of z[t, r] b[r, j] over r, to TERM_ROWS tokens of a column, so each
// element of b is read once for all of them.
#define TERM_ROWS 4

// Adds a low-rank update to one column of `rows` <= TERM_ROWS tokens. `z` is the first token's row; b(r) is b[r * stride].
FUNCTION void add_low_rank(
    GLOBAL const T* z, uint rank, float scale, GLOBAL const T* b, wide stride, uint rows, PRIVATE float* y) {
    float sums[TERM_ROWS];
    UNROLL
    for (uint i = 0; i < TERM_ROWS; i++) sums[i] = 0.0f;
    for (uint r = 0; r < rank; r++) {
        const float value = float(b[r * stride]);
        UNROLL
        for (uint i = 0; i < TERM_ROWS; i++) sums[i] += value * float(z[MINIMUM(i, rows - 1) * rank + r]);
    }
    UNROLL
    for (uint i = 0; i < TERM_ROWS; i++) y[i] += scale * sums[i];
}

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

// erfc(z) for z >= 0; see `activation.rs`.
FUNCTION float complementary_error(float z) {
    const float t = 1.0f / (1.0f + 0.5f * z);
    float q = 0.14493021f;
    q = q * t - 0.6808272f;
    q = q * t + 1.1567338f;
    q = q * t - 0.6962519f;
    q = q * t - 0.08028043f;
    q = q * t + 0.0012675867f;
    q = q * t + 0.0346028f;
    q = q * t + 0.3866404f;
    q = q * t + 0.9986328f;
    q = q * t - 1.265448f;
    return t * EXP(q - z * z);
}

// The activation with index ACTIVATION in the enum `Activation`, and its derivative.
FUNCTION void activation_at(float x, float limit, float alpha, PRIVATE float* value, PRIVATE float* slope) {
#if ACTIVATION == 0
    const float s = sigmoid(x);
    *value = x * s;
    *slope = s * (1.0f + x * (1.0f - s));
#elif ACTIVATION == 1
    const float square = x * x;
    const float s = sigmoid(1.5957691f * x * (1.0f + 0.044715f * square));
    *value = x * s;
    // for large |x| the product would be 0 * infinity
    const bool is_bent = s > 1e-30f && s < 1.0f;
    *slope = s + (is_bent ? x * s * (1.0f - s) * 1.5957691f * (1.0f + 0.134145f * square) : 0.0f);
#elif ACTIVATION == 2
    const float tail = 0.5f * complementary_error((x < 0.0f ? -x : x) * 0.70710678f);
    const float share = x < 0.0f ? tail : 1.0f - tail;
    *value = x * share;
    *slope = share + x * 0.3989423f * EXP(-0.5f * x * x);
#elif ACTIVATION == 3
    *value = x < 0.0f ? 0.0f : x;
    *slope = x > 0.0f ? 1.0f : 0.0f;
#elif ACTIVATION == 4
    const float positive = x < 0.0f ? 0.0f : x;
    *value = positive * positive;
    *slope = 2.0f * positive;
#elif ACTIVATION == 5
    const float g = x > limit ? limit : x;
    const float s = sigmoid(alpha * g);
    *value = g * s;
    *slope = x > limit ? 0.0f : s * (1.0f + alpha * g * (1.0f - s));
#else
    const float s = sigmoid(x);
    *value = s;
    *slope = s * (1.0f - s);
#endif
}

// The factor of the activated gate, and its derivative.
FUNCTION float up_of(float up, float limit) {
    if (ACTIVATION != 5) return up;
    return (up > limit ? limit : up < -limit ? -limit : up) + 1.0f;
}
FUNCTION float up_slope(float up, float limit) { return ACTIVATION == 5 && (up > limit || up < -limit) ? 0.0f : 1.0f; }

// Groups of one launch exchange numbers in device memory. A word is EMPTY until a group posts its number.
#define EMPTY 0xffffffffu

FUNCTION void post(GLOBAL ATOMIC_UINT* words, uint at, float x) {
    const uint bits = float_to_bits(x);
    // a NaN with the bits of EMPTY is replaced with another NaN
    ATOMIC_STORE(words, at, bits == EMPTY ? 0x7fc00000u : bits);
}
