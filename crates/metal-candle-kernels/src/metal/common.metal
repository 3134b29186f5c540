// Sums over a group of threads; each thread gets the result. `scratch` has room for one number of each warp.
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
    // near 0 the quotient below would lose the digits of x
    if (square < 0.02f) return x * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.05396825f)));
    const float e = EXP(-2.0f * (x < 0.0f ? -x : x));
    const float t = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -t : t;
}

// Low-rank terms, y[t, j] += scale * sum of z[t, r] b[r, j] over r, are added by threads that take so many tokens of a column:
// what they read of b serves them all.
#define TERM_ROWS 4

// Adds a term to a column of `rows` tokens, at most TERM_ROWS; z is that of the first, b(r) is at b[r * stride].
FUNCTION void add_term(
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
