// Samples a token for each row of logits. One group samples one row.
//
// `state` is the state of decode.metal: [ids | positions | slots | two words of SplitMix64 for each row]. The sampled token
// becomes the next id and the position is incremented, so the next decode step needs no CPU. For each row, `result` contains the
// token, its log-probability before all filters, and the state of the random generator.
struct SamplingWords {
    uint vocab;
    uint rows;
    uint num_parts;
};

// Words in the settings of a row: temperature, top-p and min-p as floats, top-k (0: off), and whether to update the state.
#define SETTINGS 5

FUNCTION wide next_random(GLOBAL uint* words) {
    wide s = ((wide(words[1]) << 32) | words[0]) + 0x9e3779b97f4a7c15;
    words[0] = uint(s & 0xffffffff);
    words[1] = uint(s >> 32);
    s = (s ^ (s >> 30)) * 0xbf58476d1ce4e5b9;
    s = (s ^ (s >> 27)) * 0x94d049bb133111eb;
    return s ^ (s >> 31);
}

// Maps floats to integers of the same order.
FUNCTION uint ordered(float x) {
    const uint bits = float_to_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Filter {
    float maximum;
    float temperature;
    float min_p;
    uint threshold;      // ordered bits of the k-th largest logit
    uint last_equal; // the largest id that top-k retains among logits equal to `least`
    float pivot_weight;
    uint pivot; // only tokens that rank before this id are sampled; the size of the vocabulary: all tokens
};

// The weight of a token after temperature and top-k.
FUNCTION float weight_before_min_p(float logit, uint id, Filter f) {
    const uint bits = ordered(logit);
    if (bits < f.threshold || (bits == f.threshold && id > f.last_equal)) return 0.0f;
    return EXP((logit - f.maximum) / f.temperature);
}

FUNCTION float weight_of(float logit, uint id, Filter f) {
    const float weight = weight_before_min_p(logit, id, f);
    return weight < f.min_p ? 0.0f : weight;
}

FUNCTION bool ranks_before(float weight, uint id, Filter f, uint vocab) {
    return f.pivot == vocab || weight > f.pivot_weight || (weight == f.pivot_weight && id < f.pivot);
}

struct PartWords {
    uint vocab;
    uint width;
};

// Computes the parts of decode_head for logits from another kernel: for each `width` logits of a row, the largest logit, its id,
// and the sum of exp(logit - largest).
KERNEL(parts_of_logits)(IN(float, logits, 0), OUT(float, parts, 1), WORDS(PartWords, 2) INDICES) {
    WAIT_FOR_INPUT;
    SHARED float scratch[32];
    SHARED float found[32];
    SHARED uint ids[32];
    GLOBAL const float* x = logits + wide(group.y) * p.vocab;
    const uint from = group.x * p.width;
    const uint end = MINIMUM(from + p.width, p.vocab);
    float largest = -INFINITY;
    uint best = from;
    for (uint i = from + me; i < end; i += threads) {
        if (x[i] > largest) {
            largest = x[i];
            best = i;
        }
    }
    for (uint mask = 16; mask > 0; mask >>= 1) {
        const float other = warp_shuffle_xor(largest, mask);
        const uint id = warp_shuffle_xor_uint(best, mask);
        if (other > largest || (other == largest && id < best)) {
            largest = other;
            best = id;
        }
    }
    if (lane == 0) {
        found[warp] = largest;
        ids[warp] = best;
    }
    BARRIER;
    for (uint i = 0; i < threads / 32; i++) {
        if (found[i] > largest || (found[i] == largest && ids[i] < best)) {
            largest = found[i];
            best = ids[i];
        }
    }
    // a NaN makes the sum NaN
    float sum = 0.0f;
    for (uint i = from + me; i < end; i += threads) sum += EXP(x[i] - largest);
    sum = group_sum(sum, scratch, lane, warp, threads);
    if (me == 0) {
        GLOBAL float* part = parts + (wide(group.y) * groups.x + group.x) * 3;
        part[0] = largest;
        part[1] = bits_to_float(best);
        part[2] = sum;
    }
}

KERNEL(sample)
(IN(float, all_logits, 0), IN(float, all_parts, 1), IN(uint, all_settings, 2), OUT(uint, state, 3), OUT(uint, result, 4),
 WORDS(SamplingWords, 5) INDICES) {
    WAIT_FOR_INPUT;
    SHARED float scratch[32];
    SHARED float sums[32];
    SHARED uint ids[32];
    SHARED ATOMIC_UINT bins[256];
    SHARED float shared_target;
    SHARED uint chosen;
    const uint row = group.x;
    GLOBAL const float* logits = all_logits + wide(row) * p.vocab;
    GLOBAL const float* parts = all_parts + wide(row) * p.num_parts * 3;
    GLOBAL const uint* settings = all_settings + SETTINGS * row;
    GLOBAL uint* random = state + 3 * p.rows + 2 * row;
    const uint num_warps = threads / 32;

    // the largest logit, its smallest id, and the log of the sum of exponentials
    float largest = -INFINITY;
    uint best = 0xffffffffu;
    for (uint i = me; i < p.num_parts; i += threads) {
        const float value = parts[3 * i];
        const uint id = float_to_bits(parts[3 * i + 1]);
        if (value > largest || (value == largest && id < best)) {
            largest = value;
            best = id;
        }
    }
    const float maximum = group_max(largest, scratch, lane, warp, threads);
    if (largest != maximum) best = 0xffffffffu;
    for (uint mask = 16; mask > 0; mask /= 2) best = MINIMUM(best, warp_shuffle_xor_uint(best, mask));
    if (lane == 0) ids[warp] = best;
    BARRIER;
    for (uint i = 0; i < num_warps; i++) best = MINIMUM(best, ids[i]);
    float sum = 0.0f;
    for (uint i = me; i < p.num_parts; i += threads) {
        if (parts[3 * i + 2] != 0.0f) sum += parts[3 * i + 2] * EXP(parts[3 * i] - maximum);
    }
    const float log_sum = LOG(group_sum(sum, scratch, lane, warp, threads));

    const float temperature = bits_to_float(settings[0]);
    uint token = best;
    if (temperature > 0.0f && settings[3] != 1) {
        Filter f;
        f.maximum = maximum;
        f.temperature = temperature;
        f.min_p = bits_to_float(settings[2]);
        f.threshold = 0;
        f.last_equal = 0xffffffffu;
        f.pivot = p.vocab;
        f.pivot_weight = 0.0f;
        const uint top_k = settings[3];
        if (top_k > 0 && top_k < p.vocab) {
            // radix select: eight bits of the k-th largest logit at a time
            uint remaining = top_k;
            uint prefix = 0;
            for (int shift = 24; shift >= 0; shift -= 8) {
                for (uint i = me; i < 256; i += threads) ATOMIC_STORE(bins, i, 0);
                BARRIER;
                for (uint i = me; i < p.vocab; i += threads) {
                    const uint bits = ordered(logits[i]);
                    if (shift == 24 || (bits >> (shift + 8)) == (prefix >> (shift + 8))) {
                        ATOMIC_ADD(bins, (bits >> shift) & 255u, 1);
                    }
                }
                BARRIER;
                uint bin = 255;
                while (bin > 0 && ATOMIC_LOAD(bins, bin) < remaining) {
                    remaining -= ATOMIC_LOAD(bins, bin);
                    bin--;
                }
                prefix |= bin << shift;
                BARRIER;
            }
            f.threshold = prefix;
            // of the logits equal to it, retain the `remaining` lowest ids
            if (me == 0) chosen = 0xffffffffu;
            BARRIER;
            if (warp == 0) {
                uint seen = 0;
                for (uint begin = 0; begin < p.vocab && seen < remaining; begin += 32) {
                    const uint i = begin + lane;
                    const uint is_equal = i < p.vocab && ordered(logits[i]) == prefix ? 1 : 0;
                    const uint count = warp_sum_uint(is_equal);
                    if (count > 0) {
                        for (uint j = 0; j < 32 && seen < remaining; j++) {
                            if (warp_shuffle(float(is_equal), j) > 0.5f) {
                                seen++;
                                if (seen == remaining && lane == 0) chosen = begin + j;
                            }
                        }
                    }
                }
            }
            BARRIER;
            f.last_equal = chosen;
        }
        const float top_p = bits_to_float(settings[1]);
        const uint share = (p.vocab + num_warps - 1) / num_warps;
        const uint begin = warp * share;
        const uint end = MINIMUM(p.vocab, begin + share);
        float total = 0.0f;
        for (uint attempt = 0; attempt < 64; attempt++) {
            // sums the probability of each warp's tokens, then finds the warp and the token at the random number
            float part = 0.0f;
            float whole = 0.0f;
            for (uint i = begin + lane; i < end; i += 32) {
                const float before_min_p = weight_before_min_p(logits[i], i, f);
                whole += before_min_p;
                const float weight = before_min_p < f.min_p ? 0.0f : before_min_p;
                if (ranks_before(weight, i, f, p.vocab)) part += weight;
            }
            part = warp_sum(part);
            BARRIER;
            if (lane == 0) sums[warp] = part;
            BARRIER;
            float all = 0.0f;
            for (uint i = 0; i < num_warps; i++) all += sums[i];
            // top-p is relative to the sum before min-p
            if (attempt == 0) total = group_sum(whole, scratch, lane, warp, threads);
            if (me == 0) shared_target = float(next_random(random) >> 40) * (1.0f / 16777216.0f) * all;
            BARRIER;
            float target = shared_target;
            uint owner = 0;
            uint last = 0;
            float below = 0.0f;
            bool is_found = false;
            for (uint i = 0; i < num_warps; i++) {
                if (sums[i] > 0.0f) last = i;
                if (!is_found && below + sums[i] > target) {
                    owner = i;
                    is_found = true;
                }
                if (!is_found) below += sums[i];
            }
            if (!is_found) {
                // rounding: the number is past the last token, so take the last token with a weight
                owner = last;
                target = INFINITY;
            }
            if (warp == owner) {
                uint found = 0xffffffffu;
                uint latest = begin;
                for (uint from = begin; from < end && found == 0xffffffffu; from += 32) {
                    const uint i = from + lane;
                    float weight = i < end ? weight_of(logits[i], i, f) : 0.0f;
                    if (i < end && !ranks_before(weight, i, f, p.vocab)) weight = 0.0f;
                    const float of_block = warp_sum(weight);
                    if (of_block == 0.0f) continue;
                    for (uint j = 0; j < 32; j++) {
                        const float w = warp_shuffle(weight, j);
                        if (w > 0.0f && found == 0xffffffffu) {
                            latest = from + j;
                            below += w;
                            if (below > target) found = from + j;
                        }
                    }
                }
                if (lane == 0) chosen = found == 0xffffffffu ? latest : found;
            }
            BARRIER;
            token = chosen;
            if (top_p >= 1.0f) break;
            f.pivot = p.vocab;
            const float weight_of_token = weight_of(logits[token], token, f);
            f.pivot = token;
            f.pivot_weight = weight_of_token;
            float before = 0.0f;
            for (uint i = begin + lane; i < end; i += 32) {
                const float weight = weight_of(logits[i], i, f);
                if (ranks_before(weight, i, f, p.vocab)) before += weight;
            }
            before = group_sum(before, scratch, lane, warp, threads);
            if (before < top_p * total) break;
        }
    }
    if (me == 0) {
        result[4 * row] = token;
        result[4 * row + 2] = random[0];
        result[4 * row + 3] = random[1];
        result[4 * row + 1] = float_to_bits(logits[token < p.vocab ? token : 0] - maximum - log_sum);
        if (settings[4]) {
            state[row] = token < p.vocab ? token : 0;
            state[p.rows + row] += 1;
        }
    }
}
