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
