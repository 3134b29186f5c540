// Elementwise kernels. Kernels with `is_aligned` process four elements per thread.

// Loads up to four elements at `at`; elements past the end are 0.
FUNCTION void load_part(GLOBAL const T* x, uint at, uint count, uint is_aligned, PRIVATE float* y) {
    if (is_aligned && at + 4 <= count) {
        load4(x + at, y);
    } else {
        for (uint i = 0; i < 4; i++) y[i] = at + i < count ? float(x[at + i]) : 0.0f;
    }
}

FUNCTION void store_part(GLOBAL T* y, uint at, uint count, uint is_aligned, PRIVATE const float* x) {
    if (is_aligned && at + 4 <= count) {
        store4(y + at, x);
    } else {
        for (uint i = 0; i < 4; i++) {
            if (at + i < count) y[at + i] = T(x[i]);
        }
    }
}

struct ActivationWords {
    uint count;
    uint is_aligned;
    float limit;
    float alpha;
};

// y = f(gate) * up
KERNEL(gated)(IN(T, gate, 0), IN(T, up, 1), OUT(T, y, 2), WORDS(ActivationWords, 3) INDICES) {
    const uint at = 4 * (group.x * threads + me);
    if (at >= p.count) return;
    float g[4], u[4];
    load_part(gate, at, p.count, p.is_aligned, g);
    load_part(up, at, p.count, p.is_aligned, u);
    for (uint i = 0; i < 4; i++) {
        float value, slope;
        activation_at(g[i], p.limit, p.alpha, &value, &slope);
        g[i] = value * up_of(u[i], p.limit);
    }
    store_part(y, at, p.count, p.is_aligned, g);
}

// The gradients with respect to gate and up. The gradient of gate overwrites dy.
KERNEL(gated_backward)
(IN(T, gate, 0), IN(T, up, 1), OUT(T, dy, 2), OUT(T, d_up, 3), WORDS(ActivationWords, 4) INDICES) {
    const uint at = 4 * (group.x * threads + me);
    if (at >= p.count) return;
    float g[4], u[4], d[4];
    load_part(gate, at, p.count, p.is_aligned, g);
    load_part(up, at, p.count, p.is_aligned, u);
    load_part(dy, at, p.count, p.is_aligned, d);
    for (uint i = 0; i < 4; i++) {
#if ACTIVATION == 0
        const float s = sigmoid(g[i]);
        const float of_up = d[i] * g[i] * s;
        d[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
#else
        float value, slope;
        activation_at(g[i], p.limit, p.alpha, &value, &slope);
        const float of_up = d[i] * value * up_slope(u[i], p.limit);
        d[i] = d[i] * up_of(u[i], p.limit) * slope;
#endif
        u[i] = of_up;
    }
    store_part(dy, at, p.count, p.is_aligned, d);
    store_part(d_up, at, p.count, p.is_aligned, u);
}

// y = f(x)
KERNEL(activate)(IN(T, x, 0), OUT(T, y, 1), WORDS(ActivationWords, 2) INDICES) {
    const uint at = 4 * (group.x * threads + me);
    if (at >= p.count) return;
    float v[4];
    load_part(x, at, p.count, p.is_aligned, v);
    for (uint i = 0; i < 4; i++) {
        float value, slope;
        activation_at(v[i], p.limit, p.alpha, &value, &slope);
        v[i] = value;
    }
    store_part(y, at, p.count, p.is_aligned, v);
}

// The gradient with respect to x overwrites dy.
KERNEL(activate_backward)(IN(T, x, 0), OUT(T, dy, 1), WORDS(ActivationWords, 2) INDICES) {
    const uint at = 4 * (group.x * threads + me);
    if (at >= p.count) return;
    float v[4], d[4];
    load_part(x, at, p.count, p.is_aligned, v);
    load_part(dy, at, p.count, p.is_aligned, d);
    for (uint i = 0; i < 4; i++) {
        float value, slope;
        activation_at(v[i], p.limit, p.alpha, &value, &slope);
        d[i] *= slope;
    }
    store_part(dy, at, p.count, p.is_aligned, d);
}

struct ScaledWords {
    uint count;
    uint is_aligned;
    float scale;
};

// y += scale * x
KERNEL(add_scaled)(IN(T, x, 0), OUT(T, y, 1), WORDS(ScaledWords, 2) INDICES) {
    const uint at = 4 * (group.x * threads + me);
    if (at >= p.count) return;
    float a[4], b[4];
    load_part(x, at, p.count, p.is_aligned, a);
    load_part(y, at, p.count, p.is_aligned, b);
    for (uint i = 0; i < 4; i++) b[i] += p.scale * a[i];
    store_part(y, at, p.count, p.is_aligned, b);
}

struct RowWords {
    uint count;
    uint width;
};

// y += row, for each row
KERNEL(add_row)(IN(T, row, 0), OUT(T, y, 1), WORDS(RowWords, 2) INDICES) {
    const uint at = group.x * threads + me;
    if (at < p.count) y[at] = T(float(y[at]) + float(row[at % p.width]));
}

// y[:, j] *= factors[j]
KERNEL(scale_columns)(IN(float, factors, 0), OUT(T, y, 1), WORDS(RowWords, 2) INDICES) {
    const uint at = group.x * threads + me;
    if (at < p.count) y[at] = T(float(y[at]) * factors[at % p.width]);
}

// y[i, :] *= factors[i]
KERNEL(scale_rows)(IN(float, factors, 0), OUT(T, y, 1), WORDS(RowWords, 2) INDICES) {
    const uint at = group.x * threads + me;
    if (at < p.count) y[at] = T(float(y[at]) * factors[at / p.width]);
}

struct FormWords {
    uint count;
    uint is_aligned;
    float scale;
    float cap; // 0: no soft cap
};

// y = scale * y, then y = cap * tanh(y / cap)
KERNEL(form_logits)(OUT(T, y, 0), WORDS(FormWords, 1) INDICES) {
    const uint at = 4 * (group.x * threads + me);
    if (at >= p.count) return;
    float v[4];
    load_part(y, at, p.count, p.is_aligned, v);
    for (uint i = 0; i < 4; i++) {
        v[i] *= p.scale;
        if (p.cap > 0.0f) v[i] = p.cap * hyperbolic_tangent(v[i] / p.cap);
    }
    store_part(y, at, p.count, p.is_aligned, v);
}

struct RotationWords {
    uint count;
    uint q_heads;
    uint k_heads;
    uint head_dim;
    uint half_dim; // half the number of rotated elements in a head
    uint is_adjacent;
    float sign;
};

// Rotary embedding: rotates the first 2 * half_dim elements of each head of q and k in place. With sign -1 it rotates back. A
// pair is an element of the first half and one of the second, or two adjacent elements if `is_adjacent` is 1.
KERNEL(rotate)(IN(float, cosines, 0), IN(float, sines, 1), OUT(T, q, 2), OUT(T, k, 3), WORDS(RotationWords, 4) INDICES) {
    uint at = group.x * threads + me;
    if (at >= p.count) return;
    const uint i = at % p.half_dim;
    at /= p.half_dim;
    const uint head = at % (p.q_heads + p.k_heads);
    const uint token = at / (p.q_heads + p.k_heads);
    const float c = cosines[token * p.half_dim + i];
    const float s = sines[token * p.half_dim + i] * p.sign;
    GLOBAL T* x = head < p.q_heads ? q + (wide(token) * p.q_heads + head) * p.head_dim
                                   : k + (wide(token) * p.k_heads + head - p.q_heads) * p.head_dim;
    const uint first = p.is_adjacent ? 2 * i : i;
    const uint second = p.is_adjacent ? first + 1 : i + p.half_dim;
    const float a = float(x[first]);
    const float b = float(x[second]);
    x[first] = T(a * c - b * s);
    x[second] = T(b * c + a * s);
}

struct CacheWords {
    uint count;
    uint kv_heads;
    uint head_dim;
    uint max_seq_len;
};

// Copies new keys and values to the cache [slots, kv_heads, max_seq_len, head_dim]. `destinations` contains the slot and the
// position of each token.
KERNEL(append)
(IN(T, k, 0), IN(T, v, 1), IN(uint, destinations, 2), OUT(T, keys, 3), OUT(T, values, 4), WORDS(CacheWords, 5) INDICES) {
    const uint at = group.x * threads + me;
    if (at >= p.count) return;
    const uint i = at % p.head_dim;
    const uint head = at / p.head_dim % p.kv_heads;
    const uint token = at / p.head_dim / p.kv_heads;
    const wide row = (wide(destinations[2 * token]) * p.kv_heads + head) * p.max_seq_len + destinations[2 * token + 1];
    keys[row * p.head_dim + i] = k[at];
    values[row * p.head_dim + i] = v[at];
}

// Row i of y is row `sources[i]` of x, or zeros if `sources[i]` is 0xffffffff.
KERNEL(spread_rows)(IN(T, x, 0), IN(uint, sources, 1), OUT(T, y, 2), WORDS(RowWords, 3) INDICES) {
    const uint at = group.x * threads + me;
    if (at >= p.count) return;
    const uint source = sources[at / p.width];
    y[at] = source == 0xffffffffu ? T(0.0f) : x[wide(source) * p.width + at % p.width];
}

struct DropoutWords {
    uint count;
    float scale;
    uint threshold_low;
    uint threshold_high;
    uint seed_low;
    uint seed_high;
};

FUNCTION wide mix(wide value) {
    wide z = value + 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// A hash of the seed and the element's index decides whether the element is dropped, as on the CPU.
KERNEL(dropout)(IN(T, x, 0), OUT(T, y, 1), WORDS(DropoutWords, 2) INDICES) {
    const uint at = group.x * threads + me;
    if (at >= p.count) return;
    const wide seed = (wide(p.seed_high) << 32) | p.seed_low;
    const wide threshold = (wide(p.threshold_high) << 32) | p.threshold_low;
    const bool is_kept = (mix(seed ^ mix(wide(at))) >> 32) >= threshold;
    y[at] = T(is_kept ? float(x[at]) * p.scale : 0.0f);
}
