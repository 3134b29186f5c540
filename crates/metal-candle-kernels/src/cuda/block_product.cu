// Products of a few vectors with quantized weights on tensor cores. CUDA only, for f16 and bf16.
//
// y[t, r] = factor * (sum of x[t, i] w[r, i] over i) + beta * y[t, r], for up to three matrices w that share x.
//
// Quants are integers that T represents exactly. The tensor cores multiply quants and vectors; the scale and minimum of a group
// are applied to the group's sum in f32. A warp computes 16 rows of weights and every WARPS-th stage of STAGE columns. NTILES * 8
// is the number of vectors, rounded up. While a warp multiplies one stage, the bytes of its next stage are copied to shared
// memory: rows are far apart, and lanes that read them from device memory would each wait for a different cache line.
//
// In a tile of m16n8k16, a lane holds two pairs of a row of weights and the same two pairs of a vector. The order of columns does
// not change the product if it is the same for both, so a lane takes four adjacent columns.
//
// A row of a stage has STAGE_BYTES bytes and is copied in pieces of 16 aligned bytes. Its first byte can be up to 15 bytes after
// the start of a piece, so ROW_BYTES is larger. ROW_BYTES is an odd multiple of 16, so that rows are in different banks.
#define IS_ALIGNED (STAGE_BYTES % 16 == 0)
#define PIECES ((STAGE_BYTES + 30) / 16)
#define STAGE_ROWS 16
// With few vectors the loop is unrolled, so offsets in a block are constants. With many it would need too many registers.
#if NTILES <= 2
#define UNROLL_STAGE UNROLL
#else
#define UNROLL_STAGE _Pragma("unroll 2")
#endif
// The number of weights that share a scale, and the maximum number of such groups in a row of a stage.
#define GROUP (has_short_groups(FORMAT) ? 16 : 32)
#define MAX_GROUPS (STAGE / 16)

#if ELEMENT == 2
#define SUBTRACT "fma.rn.bf16x2 %0, %1, %2, %3;"
// the bits of 1.0; the high byte of a number whose low byte can be any value below 128 and adds exactly that value
#define ONE 0x3f80u
#define BASE 0x43u
#else
#define SUBTRACT "fma.rn.f16x2 %0, %1, %2, %3;"
#define ONE 0x3c00u
#define BASE 0x64u
#endif
#define PAIR_OF_ONES (ONE | (ONE << 16))
#define BASES (BASE * 0x01010101u)

// Subtracts two numbers from two others. The sign bits of `negative` are set.
FUNCTION uint subtract(uint a, uint negative) {
    uint y;
    asm(SUBTRACT : "=r"(y) : "r"(a), "r"(PAIR_OF_ONES), "r"(negative));
    return y;
}

// For bf16 formats with a minimum, the base is not subtracted from each weight; the minimum contains -128 * scale instead.
#define KEEPS_BASE (ELEMENT == 2 && has_minimum(FORMAT))

// Converts four bytes to type T and subtracts the zero of the format.
FUNCTION uint2 numbers(uint q, uint format) {
    if (KEEPS_BASE) return make_uint2(__byte_perm(q, BASES, 0x4140), __byte_perm(q, BASES, 0x4342));
    if (has_signed_bytes(format)) {
        // a signed byte is its lower seven bits, minus 128 if the sign bit is set
        const uint low = q & 0x7f7f7f7fu, sign = q & 0x80808080u;
        const uint negative = 0x80008000u;
        return make_uint2(
            subtract(__byte_perm(low, BASES, 0x4140), __byte_perm(sign, BASES, 0x4140) | negative),
            subtract(__byte_perm(low, BASES, 0x4342), __byte_perm(sign, BASES, 0x4342) | negative));
    }
    const uint zero = 0x8000u | (BASE << 8) | zero_of(format);
    const uint zeros = zero | (zero << 16);
    return make_uint2(subtract(__byte_perm(q, BASES, 0x4140), zeros), subtract(__byte_perm(q, BASES, 0x4342), zeros));
}

// Starts copying the rows of the stage that starts at byte `at` of each row.
FUNCTION void copy_stage(const uchar* w, uint num_bytes, uint first_row, uint rows, uint at, uint my_lane, uchar* to) {
    const uint start_of_shared = uint(__cvta_generic_to_shared(to));
    UNROLL for (uint i = my_lane; i < STAGE_ROWS * PIECES; i += 32) {
        const uint row = i / PIECES, piece = i % PIECES;
        if (IS_ALIGNED && piece >= STAGE_BYTES / 16) continue;
        const uchar* start = w + wide(MINIMUM(first_row + row, rows - 1)) * num_bytes + at;
        const uint shift = IS_ALIGNED ? 0 : uint(wide(start)) & 15u;
        const uint end = shift + STAGE_BYTES;
        if (16 * piece >= end) continue;
        const uint size = IS_ALIGNED ? 16 : MINIMUM(end - 16 * piece, 16u);
        const uint address = start_of_shared + row * ROW_BYTES + 16 * piece;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(start - shift + 16 * piece), "r"(size)
                     : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// The offset of a row in the shared memory of a stage.
FUNCTION uint row_in_stage(uint row, const uchar* w, uint num_bytes, uint first_row, uint rows, uint stage) {
    if (IS_ALIGNED) return row * ROW_BYTES;
    const uint before = uint(wide(w)) + MINIMUM(first_row + row, rows - 1) * num_bytes + stage * STAGE_BYTES;
    return row * ROW_BYTES + (before & 15u);
}

#if OUT_F32
typedef float Out;
#else
typedef T Out;
#endif

struct BlockProductWords {
    uint tokens;
    uint columns;
    // number of rows of each matrix; all have the same format
    uint rows[3];
    float factor;
    float beta;
};

KERNEL(block_product)
(IN(T, x, 0), IN(uchar, w0, 1), IN(uchar, w1, 2), IN(uchar, w2, 3), OUT(Out, y0, 4), OUT(Out, y1, 5), OUT(Out, y2, 6),
 WORDS(BlockProductWords, 7) INDICES) {
    extern __shared__ __align__(16) uchar stages[];
    const uchar* w = w0;
    Out* y = y0;
    const uint format = FORMAT;
    uint rows = p.rows[0], tile = group.x;
    uint tiles = (rows + STAGE_ROWS - 1) / STAGE_ROWS;
    if (tile >= tiles) {
        tile -= tiles;
        w = w1, y = y1, rows = p.rows[1];
        tiles = (rows + STAGE_ROWS - 1) / STAGE_ROWS;
        if (tile >= tiles) {
            tile -= tiles;
            w = w2, y = y2, rows = p.rows[2];
        }
    }
    const uint first_row = tile * STAGE_ROWS;
    const uint fragment_row = lane / 4, quad = lane % 4;
    const uint num_bytes = uint(row_bytes(format, p.columns));
    uchar* mine = stages + warp * (2 * STAGE_ROWS * ROW_BYTES + STAGE_ROWS * MAX_GROUPS * 8);
    // scale and minimum of each group in the stage
    float2* scales = reinterpret_cast<float2*>(mine + 2 * STAGE_ROWS * ROW_BYTES);
    const uint count = p.columns / STAGE;
    if (warp < count) copy_stage(w, num_bytes, first_row, rows, warp * STAGE_BYTES, lane, mine);
    WAIT_FOR_INPUT;
    float sums[NTILES][4] = {};
    const uint ones[4] = {PAIR_OF_ONES, PAIR_OF_ONES, PAIR_OF_ONES, PAIR_OF_ONES};
    for (uint stage = warp, turn = 0; stage < count; stage += WARPS, turn ^= 1) {
        uchar* own = mine + turn * (STAGE_ROWS * ROW_BYTES);
        if (stage + WARPS < count) {
            uchar* next = mine + (turn ^ 1) * (STAGE_ROWS * ROW_BYTES);
            copy_stage(w, num_bytes, first_row, rows, (stage + WARPS) * STAGE_BYTES, lane, next);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncwarp();
        const uchar* row_at[2];
        UNROLL for (uint i = 0; i < 2; i++) row_at[i] = own + row_in_stage(8 * i + fragment_row, w, num_bytes, first_row, rows, stage);
        UNROLL for (uint i = lane; i < STAGE_ROWS * (STAGE / GROUP); i += 32) {
            const uint row = i % STAGE_ROWS;
            float2 both;
            scales_of(own + row_in_stage(row, w, num_bytes, first_row, rows, stage), format, i / STAGE_ROWS * GROUP, &both.x, &both.y);
            if (KEEPS_BASE) both.y -= 128.0f * both.x;
            scales[i] = both;
        }
        __syncwarp();
        const T* vectors = x + stage * STAGE + 4 * quad;
        UNROLL_STAGE for (uint i = 0; i < STAGE; i += 32) {
            // a barrier for the compiler: loads of later columns would need more registers
            if (i % 64 == 0) asm volatile("" ::: "memory");
            float products[NTILES][4] = {};
            float totals[NTILES][4] = {};
            UNROLL for (uint j = 0; j < 2; j++) {
                const uint2 upper = numbers(four_quants(row_at[0], format, i + 16 * j + 4 * quad), format);
                const uint2 lower = numbers(four_quants(row_at[1], format, i + 16 * j + 4 * quad), format);
                const uint a[4] = {upper.x, lower.x, upper.y, lower.y};
                UNROLL for (uint n = 0; n < NTILES; n++) {
                    const uint token = 8 * n + fragment_row;
                    uint2 b = make_uint2(0, 0);
                    if (token < p.tokens) b = *reinterpret_cast<const uint2*>(vectors + wide(token) * p.columns + i + 16 * j);
                    multiply_tiles(products[n], a, b);
                    if (has_minimum(format)) multiply_tiles(totals[n], ones, b);
                }
                if ((16 * j + 16) % GROUP != 0) continue;
                const float2* group_at = scales + (i + 16 * j) / GROUP * STAGE_ROWS + fragment_row;
                const float2 both[2] = {group_at[0], group_at[8]};
                UNROLL for (uint n = 0; n < NTILES; n++) {
                    UNROLL for (uint e = 0; e < 4; e++) {
                        sums[n][e] += both[e / 2].x * products[n][e];
                        if (has_minimum(format)) sums[n][e] += both[e / 2].y * totals[n][e];
                        products[n][e] = totals[n][e] = 0.0f;
                    }
                }
            }
        }
        // all lanes have read the stage before the next copy overwrites it
        __syncwarp();
    }
    BARRIER;
    // the stages are no longer needed; their memory is reused for the sums of the warps
    float(*parts)[STAGE_ROWS][8 * NTILES + 1] = reinterpret_cast<float(*)[STAGE_ROWS][8 * NTILES + 1]>(stages);
    UNROLL for (uint n = 0; n < NTILES; n++) {
        UNROLL for (uint e = 0; e < 4; e++) {
            parts[warp][8 * (e / 2) + fragment_row][8 * n + 2 * quad + e % 2] = sums[n][e];
        }
    }
    BARRIER;
    for (uint i = me; i < STAGE_ROWS * 8 * NTILES; i += 32 * WARPS) {
        const uint row = first_row + i % STAGE_ROWS, token = i / STAGE_ROWS;
        if (row >= rows || token >= p.tokens) continue;
        float sum = 0.0f;
        UNROLL for (uint part = 0; part < WARPS; part++) sum += parts[part][i % STAGE_ROWS][token];
        const wide at = wide(token) * rows + row;
        y[at] = Out(p.factor * sum + (p.beta != 0.0f ? p.beta * float(y[at]) : 0.0f));
    }
}
