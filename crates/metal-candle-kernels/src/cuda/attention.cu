// Grouped-query attention over a ragged batch: forward, forward over a
// key/value cache, and a deterministic backward. Compiled at run time by NVRTC;
// the host defines, ahead of this text:
//   T_BF16 or T_F16   1 for the storage type of q, k, v, out and gradients
//   WIDTH             elements of a head: a multiple of 8, at most 256
//   MASK              0 for causal attention, 1 for a sliding window of
//                     `mask_size` keys, 2 for chunks of `mask_size` positions
//   HAS_CAP           1 to soft-cap scaled scores s: cap * tanh(s / cap)
//   HAS_SINKS         1 if each head has an attention sink
// Rows in shared memory have HEAD_DIM elements: WIDTH rounded up to 32, 64, 128 or
// 256 and padded with zeros. Products read up to the next multiple of 16.
// No headers are included. All sums are f32, without float atomics, so results are
// deterministic.
//
// RAGGED BATCH. Sequence i owns rows offsets[i]..offsets[i+1] of the flat tensors
// q/out [tokens, heads*WIDTH], k/v [tokens, kv_heads*WIDTH],
// lse/delta f32 [tokens, heads]. All T pointers must be 16-byte aligned.
//
// TILE LIST. `tiles` holds gridDim.x pairs (sequence, tile index in the sequence).
// Sort it longest first: query tiles (forward, dq) by descending last visible key;
// key tiles (dkv) by descending number of queries that attend to them. Blocks take (tile,
// head) pairs with the head running fastest, so the order applies to all heads.
//
// LAUNCH SHAPES (E = HEAD_DIM*2 bytes, the size of one row of one head)
//   kernel                   grid                         block         dynamic shared bytes
//   flash_forward            (query tiles, heads)         32*FWD_WARPS  (FWD_ROWS + 4*FWD_KEYS)*E
//   flash_forward_cached     (query tiles, heads)         32*FWD_WARPS  (FWD_ROWS + 4*FWD_KEYS)*E
//   flash_backward_delta     ceil(tokens*heads*(HEAD_DIM/8)/256)  256   0
//   flash_backward_dq        (query tiles, heads)         32*DQ_WARPS   (2*DQ_ROWS + 4*DQ_KEYS)*E
//   flash_backward_dkv       (key tiles, kv_heads, DKV_PASSES)  32*DKV_WARPS  (2*DKV_ROWS + 4*DKV_QUERIES)*E + 16*DKV_QUERIES
//   flash_backward_dkv_split (key tiles, kv_heads*splits, DKV_PASSES)  as dkv  as dkv
//   flash_backward_sum       (ceil(elements/8/256), 2)    256           0
// with FWD_ROWS = FWD_WARPS*16*FWD_MR query rows per tile, DQ_ROWS likewise, and
// DKV_ROWS = DKV_WARPS*16*DKV_MR keys per tile. Above 48 KiB the host must set
// the opt-in attribute for dynamic shared memory.

#ifndef T_BF16
#define T_BF16 0
#endif
#ifndef T_F16
#define T_F16 0
#endif
#if T_BF16 + T_F16 != 1
#error "define exactly one of T_BF16 and T_F16 as 1"
#endif
#if WIDTH % 8 != 0 || WIDTH > 256 || WIDTH == 0
#error "WIDTH must be a multiple of 8 and at most 256"
#endif
#if WIDTH <= 32
#define HEAD_DIM 32
#elif WIDTH <= 64
#define HEAD_DIM 64
#elif WIDTH <= 128
#define HEAD_DIM 128
#else
#define HEAD_DIM 256
#endif
// Wide heads need two passes, one for keys and one for values: the registers hold only one of the gradients.
#define DKV_PASSES (HEAD_DIM == 256 ? 2 : 1)

// Tile shapes. *_MR is the number of 16-row blocks a warp owns; the streamed side
// comes in double-buffered tiles of *_KEYS / *_QUERIES rows; *_SUB is the width
// of the score block held in registers at once in the backward kernels; *_AREG
// keeps the stationary operands in registers instead of rereading shared memory.
#ifndef FWD_WARPS
#define FWD_WARPS 4
#endif
#ifndef FWD_MR
#define FWD_MR (HEAD_DIM == 256 ? 1 : 2)
#endif
#ifndef FWD_KEYS
#define FWD_KEYS (HEAD_DIM == 256 ? 32 : 64)
#endif
#ifndef FWD_AREG
#define FWD_AREG (HEAD_DIM <= 64)
#endif
#ifndef FWD_MINB
#define FWD_MINB (HEAD_DIM == 256 ? 1 : 2)
#endif

#ifndef DQ_WARPS
#define DQ_WARPS 4
#endif
#ifndef DQ_MR
#define DQ_MR (HEAD_DIM == 256 ? 1 : 2)
#endif
#ifndef DQ_KEYS
#define DQ_KEYS (HEAD_DIM == 256 ? 16 : HEAD_DIM == 128 ? 32 : 64)
#endif
#ifndef DQ_SUB
#define DQ_SUB (HEAD_DIM == 256 ? 16 : 32)
#endif
#ifndef DQ_AREG
#define DQ_AREG (HEAD_DIM <= 64)
#endif
#ifndef DQ_MINB
#define DQ_MINB (HEAD_DIM == 256 ? 1 : 2)
#endif

#ifndef DKV_WARPS
#define DKV_WARPS 4
#endif
#ifndef DKV_MR
#define DKV_MR 1
#endif
#ifndef DKV_QUERIES
#define DKV_QUERIES (HEAD_DIM == 256 ? 16 : 64)
#endif
#ifndef DKV_SUB
#define DKV_SUB (HEAD_DIM == 256 ? 16 : 32)
#endif
#ifndef DKV_AREG
#define DKV_AREG (HEAD_DIM <= 64)
#endif
#ifndef DKV_MINB
#define DKV_MINB (HEAD_DIM == 256 ? 1 : 2)
#endif

#define FWD_ROWS (FWD_WARPS * 16 * FWD_MR)
#define DQ_ROWS (DQ_WARPS * 16 * DQ_MR)
#define DKV_ROWS (DKV_WARPS * 16 * DKV_MR)

typedef unsigned int u32;
typedef unsigned short elem;  // 16 bits of storage, bf16 or f16

#define ROW_BYTES (HEAD_DIM * 2)
#define CHUNKS (HEAD_DIM / 8)  // 16-byte chunks in a row
#define DSTEPS ((WIDTH + 15) / 16)
#define BLOCKS (2 * DSTEPS)  // 8-wide blocks of an accumulator
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define POS_INF __int_as_float(0x7f800000)
#define NEG_INF __int_as_float(0xff800000)

// ---------------------------------------------------------------- primitives

__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 a;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
    return a;
}

__device__ __forceinline__ void copy16(u32 dst, const void* src, bool live) {
    int bytes = live ? 16 : 0;  // zero-fills when dead
    asm volatile("{ .reg .u64 g; cvta.to.global.u64 g, %1; cp.async.cg.shared.global [%0], [g], 16, %2; }" ::"r"(dst),
                 "l"(src), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy4(u32 dst, const void* src) {
    asm volatile("{ .reg .u64 g; cvta.to.global.u64 g, %1; cp.async.ca.shared.global [%0], [g], 4; }" ::"r"(dst),
                 "l"(src)
                 : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if T_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 r;
#if T_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#endif
    return r;
}

__device__ __forceinline__ float low_float(u32 x) {
#if T_BF16
    return __uint_as_float(x << 16);
#else
    float f;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(f) : "r"(x));
    return f;
#endif
}

__device__ __forceinline__ float high_float(u32 x) {
#if T_BF16
    return __uint_as_float(x & 0xffff0000u);
#else
    float f;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(x));
    return f;
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void store_shared(u32 a, u32 v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(u32 a) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
    return v;
}

__device__ __forceinline__ float2 load_shared_pair(u32 a) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(a) : "memory");
    return v;
}

// ------------------------------------------------------------- shared tiles
//
// A tile is rows of HEAD_DIM elements. The 16-byte chunks of a row are permuted by
// XOR with bits of the row number, so that eight consecutive rows of one logical
// chunk (what one 8x8 matrix load reads) fall into different banks.

__device__ __forceinline__ u32 row_twist(u32 row) { return CHUNKS >= 8 ? (row & 7) : ((row >> 1) & 3); }

__device__ __forceinline__ u32 tile_offset(u32 row, u32 chunk) {
    return row * ROW_BYTES + ((chunk ^ row_twist(row)) << 4);
}

// Starts copying ROWS rows, the first `live` of which exist; the rest become zeros.
template <int ROWS, int THREADS>
__device__ __forceinline__ void start_tile(u32 dst, const elem* src, int stride, int live) {
    static_assert(ROWS * CHUNKS % THREADS == 0 && THREADS % CHUNKS == 0, "tile copy shape");
    const int chunk = threadIdx.x % CHUNKS;
    const int first = threadIdx.x / CHUNKS;
    const bool inside = chunk * 8 < WIDTH;
    src += chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int row = first + i * (THREADS / CHUNKS);
        bool ok = inside && row < live;
        copy16(dst + tile_offset(row, chunk), src + (ok ? row : 0) * stride, ok);
    }
}

// Lane's offset in a tile for each of the three 16x16 operand loads. To move by k
// 16-wide column blocks, XOR the address with k*32; to move by rows (multiples of
// 16), add rows*ROW_BYTES. Tile bases are multiples of ROW_BYTES, so both commute.
__device__ __forceinline__ u32 lane_rowmajor(u32 lane) {  // left operand; also right operand stored [k][n], transposed
    return tile_offset(lane & 15, lane >> 4);
}
__device__ __forceinline__ u32 lane_colmajor(u32 lane) {  // right operand stored [n][k]
    return tile_offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// Writes a warp's 16-row accumulator block into a tile as T, at row `row0`.
__device__ __forceinline__ void stage_rows(u32 tile, u32 row0, const float (&acc)[BLOCKS][4], float top,
                                           float bottom) {
    const u32 lane = threadIdx.x & 31;
    const u32 row = row0 + (lane >> 2);
#pragma unroll
    for (int c = 0; c < BLOCKS; c++) {
        store_shared(tile + tile_offset(row, c) + (lane & 3) * 4, pack(acc[c][0] * top, acc[c][1] * top));
        store_shared(tile + tile_offset(row + 8, c) + (lane & 3) * 4, pack(acc[c][2] * bottom, acc[c][3] * bottom));
    }
}

// Copies ROWS staged rows of one warp, from tile row `row0`, to global memory; only the first `live` exist.
template <int ROWS>
__device__ __forceinline__ void flush_rows(u32 tile, int row0, elem* dst, int stride, int live) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / 32; i++) {
        int row = (i * 32 + lane) / CHUNKS, chunk = lane % CHUNKS;
        uint4 v = load_shared16(tile + tile_offset(row0 + row, chunk));
        if (row < live && chunk * 8 < WIDTH) *(uint4*)(dst + row * stride + chunk * 8) = v;
    }
}

// The (tile, head) pair of this block, head fastest.
__device__ __forceinline__ void block_work(const u32* tiles, int& sequence, int& tile, int& head) {
    u32 linear = blockIdx.y * gridDim.x + blockIdx.x;
    u32 at = linear / gridDim.y;
    head = linear - at * gridDim.y;
    sequence = tiles[2 * at];
    tile = tiles[2 * at + 1];
}

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

// The first key that a query attends to, and the end of the queries that attend to a key.
__device__ __forceinline__ int first_key(int position, int size) {
    if (MASK == 1) return max(position + 1 - size, 0);
    if (MASK == 2) return position - position % size;
    return 0;
}
__device__ __forceinline__ int queries_end(int key, int size) {
    if (MASK == 1) return key > 0x7fffffff - size ? 0x7fffffff : key + size;
    const int begin = key - (MASK == 2 ? key % size : 0);
    if (MASK == 2) return begin > 0x7fffffff - size ? 0x7fffffff : begin + size;
    return 0x7fffffff;
}

// The factor that converts scores to base-2 logarithms.
__device__ __forceinline__ float factor_of(float scale) { return HAS_CAP ? LOG2E : scale * LOG2E; }

// The hyperbolic tangent of a scaled score over its cap.
__device__ __forceinline__ float tanh_of(float product, float scale, float cap) {
    return 1.f - 2.f / (1.f + exp2_fast(product * (2.f * LOG2E * scale / cap)));
}

// ------------------------------------------------------------------- forward

// One tile of FWD_ROWS queries. q, out: this head at the sequence's first query,
// row stride q_stride; k, v: this kv head at the first key, row stride kv_stride.
// Query r is at position r + keys - queries. It attends to the keys up to its position that the mask allows.
template <bool LSE>
__device__ __forceinline__ void forward_tile(const elem* q, const elem* k, const elem* v, elem* out, float* lse,
                                             int lse_stride, int q_stride, int kv_stride, int queries,
                                             int keys, int tile, float scale, int mask_size, float cap, float sink) {
    constexpr int THREADS = FWD_WARPS * 32;
    constexpr int NB = FWD_KEYS / 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int m0 = tile * FWD_ROWS;
    if (m0 >= queries) return;
    const int shift = keys - queries;
    const int live = min(queries - m0, FWD_ROWS);
    const int w0 = warp * (16 * FWD_MR);  // warp's first row in the tile
    const int first = m0 + w0 + shift;    // last key of its first row

    const u32 q_tile = shared_address(dynamic_shared);
    const u32 kv_tiles = q_tile + FWD_ROWS * ROW_BYTES;
    constexpr u32 KV = FWD_KEYS * ROW_BYTES;  // buffer b: k at 2*b*KV, v right after

    const int end = m0 + live + shift;  // keys visible to the tile
    const int steps = (end + FWD_KEYS - 1) / FWD_KEYS;
    const int begin = first_key(m0 + shift, mask_size) / FWD_KEYS;  // first visible tile of keys

    start_tile<FWD_ROWS, THREADS>(q_tile, q + (long long)m0 * q_stride, q_stride, live);
    {
        const int n1 = begin * FWD_KEYS;
        const u32 into = kv_tiles + (begin & 1) * (2 * KV);
        start_tile<FWD_KEYS, THREADS>(into, k + (long long)n1 * kv_stride, kv_stride, keys - n1);
        start_tile<FWD_KEYS, THREADS>(into + KV, v + (long long)n1 * kv_stride, kv_stride, keys - n1);
    }
    copies_commit();

    float o[FWD_MR][BLOCKS][4];
    float top[FWD_MR][2], sum[FWD_MR][2];
#pragma unroll
    for (int m = 0; m < FWD_MR; m++) {
        top[m][0] = top[m][1] = NEG_INF;
        sum[m][0] = sum[m][1] = 0.f;
#pragma unroll
        for (int c = 0; c < BLOCKS; c++) o[m][c][0] = o[m][c][1] = o[m][c][2] = o[m][c][3] = 0.f;
    }
    const float factor = factor_of(scale);
    const u32 q_lane = q_tile + w0 * ROW_BYTES + lane_rowmajor(lane);
    const u32 k_lane = kv_tiles + lane_colmajor(lane);
    const u32 v_lane = kv_tiles + KV + lane_rowmajor(lane);

    u32 qf[FWD_AREG ? DSTEPS : 1][FWD_MR][4];

    for (int j = begin; j < steps; j++) {
        copies_wait();
        __syncthreads();
        if (j + 1 < steps) {
            const int n1 = (j + 1) * FWD_KEYS;
            const u32 into = kv_tiles + ((j + 1) & 1) * (2 * KV);
            start_tile<FWD_KEYS, THREADS>(into, k + (long long)n1 * kv_stride, kv_stride, keys - n1);
            start_tile<FWD_KEYS, THREADS>(into + KV, v + (long long)n1 * kv_stride, kv_stride, keys - n1);
            copies_commit();
        }
        if (FWD_AREG && j == begin) {
#pragma unroll
            for (int d = 0; d < DSTEPS; d++)
#pragma unroll
                for (int m = 0; m < FWD_MR; m++) load_matrices(qf[FWD_AREG ? d : 0][m], (q_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
        }
        const int n0 = j * FWD_KEYS;
        if (n0 > first + 16 * FWD_MR - 1) continue;  // nothing visible to this warp
        if (MASK && n0 + FWD_KEYS - 1 < first_key(first, mask_size)) continue;
        const u32 buffer = (j & 1) * (2 * KV);

        float s[FWD_MR][NB][4];
#pragma unroll
        for (int m = 0; m < FWD_MR; m++)
#pragma unroll
            for (int n = 0; n < NB; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
#pragma unroll
        for (int d = 0; d < DSTEPS; d++) {
            u32(&a)[FWD_MR][4] = qf[FWD_AREG ? d : 0];
            if (!FWD_AREG) {
#pragma unroll
                for (int m = 0; m < FWD_MR; m++) load_matrices(a[m], (q_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
            }
#pragma unroll
            for (int n = 0; n < NB / 2; n++) {
                u32 b[4];
                load_matrices(b, ((k_lane + buffer) ^ (d * 32)) + n * (16 * ROW_BYTES));
#pragma unroll
                for (int m = 0; m < FWD_MR; m++) {
                    mma(s[m][2 * n], a[m], b[0], b[1]);
                    mma(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        if (HAS_CAP) {
#pragma unroll
            for (int m = 0; m < FWD_MR; m++)
#pragma unroll
                for (int n = 0; n < NB; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[m][n][e] = cap * tanh_of(s[m][n][e], scale, cap);
        }
        if (n0 + FWD_KEYS - 1 > first || (MASK && n0 < first_key(first + 16 * FWD_MR - 1, mask_size))) {
#pragma unroll
            for (int m = 0; m < FWD_MR; m++)
#pragma unroll
                for (int n = 0; n < NB; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int key = n0 + n * 8 + (lane & 3) * 2 + (e & 1);
                        int seen = first + m * 16 + (lane >> 2) + (e >> 1) * 8;
                        if (key > seen || (MASK && key < first_key(seen, mask_size))) s[m][n][e] = NEG_INF;
                    }
        }

        // Without a mask key 0 is visible to every row and comes in the first step, so from then on `top` is finite.
#pragma unroll
        for (int m = 0; m < FWD_MR; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float big = top[m][h];
#pragma unroll
                for (int n = 0; n < NB; n++) big = fmaxf(big, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                big = fmaxf(big, __shfl_xor_sync(0xffffffffu, big, 1));
                big = fmaxf(big, __shfl_xor_sync(0xffffffffu, big, 2));
                const float bias = MASK && big == NEG_INF ? 0.f : big * factor;
                const float shrink = exp2_fast(top[m][h] * factor - bias);
                top[m][h] = big;
                float total = 0.f;
#pragma unroll
                for (int n = 0; n < NB; n++) {
                    s[m][n][2 * h] = exp2_fast(s[m][n][2 * h] * factor - bias);
                    s[m][n][2 * h + 1] = exp2_fast(s[m][n][2 * h + 1] * factor - bias);
                    total += s[m][n][2 * h] + s[m][n][2 * h + 1];
                }
                sum[m][h] = sum[m][h] * shrink + total;
#pragma unroll
                for (int c = 0; c < BLOCKS; c++) {
                    o[m][c][2 * h] *= shrink;
                    o[m][c][2 * h + 1] *= shrink;
                }
            }

#pragma unroll
        for (int n = 0; n < NB / 2; n++) {
            u32 p[FWD_MR][4];
#pragma unroll
            for (int m = 0; m < FWD_MR; m++) {
                p[m][0] = pack(s[m][2 * n][0], s[m][2 * n][1]);
                p[m][1] = pack(s[m][2 * n][2], s[m][2 * n][3]);
                p[m][2] = pack(s[m][2 * n + 1][0], s[m][2 * n + 1][1]);
                p[m][3] = pack(s[m][2 * n + 1][2], s[m][2 * n + 1][3]);
            }
#pragma unroll
            for (int d = 0; d < DSTEPS; d++) {
                u32 b[4];
                load_matrices_transposed(b, ((v_lane + buffer) ^ (d * 32)) + n * (16 * ROW_BYTES));
#pragma unroll
                for (int m = 0; m < FWD_MR; m++) {
                    mma(o[m][2 * d], p[m], b[0], b[1]);
                    mma(o[m][2 * d + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

    // Each warp stages its rows where its own queries were; no other warp reads them.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < FWD_MR; m++) {
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            float level = top[m][h] * factor;  // to base 2
            float shrink = 1.f;
            if (HAS_SINKS) {
                const float most = fmaxf(level, sink * LOG2E);
                shrink = exp2_fast(level - most);
                total = total * shrink + exp2_fast(sink * LOG2E - most);
                level = most;
            }
            inverse[h] = shrink / total;
            if (LSE && (lane & 3) == 0) {
                int row = w0 + m * 16 + (lane >> 2) + h * 8;
                if (row < live) {
                    const float largest = HAS_SINKS || HAS_CAP ? level * LN2 : top[m][h] * scale;
                    lse[(long long)(m0 + row) * lse_stride] = largest + log2_fast(total) * LN2;
                }
            }
        }
        stage_rows(q_tile, w0 + m * 16, o[m], inverse[0], inverse[1]);
    }
    __syncwarp();
    flush_rows<16 * FWD_MR>(q_tile, w0, out + (long long)(m0 + w0) * q_stride, q_stride, live - w0);
}

// The scalar parameters of the kernels, one structure each.
struct ForwardWords {
    int heads;
    int kv_heads;
    float scale;
    int mask_size;
    float cap;
};
struct CachedWords {
    int heads;
    int kv_heads;
    int max_seq;
    float scale;
    int mask_size;
    float cap;
};
struct SumWords {
    unsigned long long elements;
    int splits;
};
struct SplitWords {
    int heads;
    int kv_heads;
    float scale;
    int mask_size;
    float cap;
    int tokens;
    int splits;
};

// Queries and keys of the ragged batch. Writes lse (natural log) for the backward pass.
extern "C" __global__ void __launch_bounds__(FWD_WARPS * 32, FWD_MINB)
    flash_forward(const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,
                  const float* __restrict__ sinks, elem* __restrict__ out, float* __restrict__ lse, const u32* __restrict__ offsets,
                  const u32* __restrict__ tiles, const ForwardWords p) {
    const int heads = p.heads, kv_heads = p.kv_heads;
    const float scale = p.scale;
    int sequence, tile, head;
    block_work(tiles, sequence, tile, head);
    const long long start = offsets[sequence];
    const int n = offsets[sequence + 1] - (u32)start;
    const int q_stride = heads * WIDTH, kv_stride = kv_heads * WIDTH;
    const long long q_at = start * q_stride + head * WIDTH;
    const long long kv_at = start * kv_stride + head / (heads / kv_heads) * WIDTH;
    forward_tile<true>(q + q_at, k + kv_at, v + kv_at, out + q_at, lse + start * heads + head, heads, q_stride,
                       kv_stride, n, n, tile, scale, p.mask_size, p.cap, HAS_SINKS ? sinks[head] : 0.f);
}

// Keys from a cache [slots, kv_heads, max_seq, WIDTH]. Slot slots[i] contains
// lengths[i] tokens of sequence i; its queries are the last of them.
extern "C" __global__ void __launch_bounds__(FWD_WARPS * 32, FWD_MINB)
    flash_forward_cached(const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,
                         const float* __restrict__ sinks, elem* __restrict__ out, const u32* __restrict__ offsets, const u32* __restrict__ lengths,
                         const u32* __restrict__ slots, const u32* __restrict__ tiles, const CachedWords p) {
    const int heads = p.heads, kv_heads = p.kv_heads, max_seq = p.max_seq;
    const float scale = p.scale;
    int sequence, tile, head;
    block_work(tiles, sequence, tile, head);
    const long long start = offsets[sequence];
    const int n = offsets[sequence + 1] - (u32)start;
    const int q_stride = heads * WIDTH;
    const long long q_at = start * q_stride + head * WIDTH;
    const long long kv_at =
        ((long long)slots[sequence] * kv_heads + head / (heads / kv_heads)) * max_seq * WIDTH;
    forward_tile<false>(q + q_at, k + kv_at, v + kv_at, out + q_at, nullptr, 0, q_stride, WIDTH, n,
                        (int)lengths[sequence], tile, scale, p.mask_size, p.cap, HAS_SINKS ? sinks[head] : 0.f);
}

// ------------------------------------------------------------------ backward

// delta[token, head] = sum over the head's dimensions of out * d_out; rows = tokens * heads.
extern "C" __global__ void __launch_bounds__(256)
    flash_backward_delta(const elem* __restrict__ out, const elem* __restrict__ d_out, float* __restrict__ delta,
                         unsigned long long rows) {
    const unsigned long long at = (unsigned long long)blockIdx.x * 256 + threadIdx.x;
    const unsigned long long row = at / CHUNKS;
    const int chunk = at % CHUNKS;
    float total = 0.f;
    if (row < rows && chunk < WIDTH / 8) {
        const unsigned long long from = row * (WIDTH / 8) + chunk;
        uint4 a = ((const uint4*)out)[from], b = ((const uint4*)d_out)[from];
        total = low_float(a.x) * low_float(b.x) + high_float(a.x) * high_float(b.x);
        total += low_float(a.y) * low_float(b.y) + high_float(a.y) * high_float(b.y);
        total += low_float(a.z) * low_float(b.z) + high_float(a.z) * high_float(b.z);
        total += low_float(a.w) * low_float(b.w) + high_float(a.w) * high_float(b.w);
    }
#pragma unroll
    for (int d = CHUNKS / 2; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
    if (row < rows && chunk == 0) delta[row] = total;
}

// dq of a tile of DQ_ROWS queries: a pass over the keys that recomputes the
// probabilities P from lse, dS = P * (d_out V^T - delta), dq = scale * dS K.
extern "C" __global__ void __launch_bounds__(DQ_WARPS * 32, DQ_MINB)
    flash_backward_dq(const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,
                      const elem* __restrict__ d_out, const float* __restrict__ lse, const float* __restrict__ delta,
                      elem* __restrict__ dq, const u32* __restrict__ offsets, const u32* __restrict__ tiles, const ForwardWords p) {
    const int heads = p.heads, kv_heads = p.kv_heads;
    const float scale = p.scale;
    constexpr int THREADS = DQ_WARPS * 32;
    constexpr int NB = DQ_SUB / 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int sequence, tile, head;
    block_work(tiles, sequence, tile, head);
    const long long start = offsets[sequence];
    const int n = offsets[sequence + 1] - (u32)start;
    const int m0 = tile * DQ_ROWS;
    if (m0 >= n) return;
    const int q_stride = heads * WIDTH, kv_stride = kv_heads * WIDTH;
    const long long q_at = (start + m0) * q_stride + head * WIDTH;
    const long long kv_at = start * kv_stride + head / (heads / kv_heads) * WIDTH;
    k += kv_at;
    v += kv_at;
    const int live = min(n - m0, DQ_ROWS);
    const int w0 = warp * (16 * DQ_MR);
    const int first = m0 + w0;

    const u32 q_tile = shared_address(dynamic_shared);
    const u32 g_tile = q_tile + DQ_ROWS * ROW_BYTES;
    const u32 kv_tiles = g_tile + DQ_ROWS * ROW_BYTES;
    constexpr u32 KV = DQ_KEYS * ROW_BYTES;
    const int steps = (m0 + live + DQ_KEYS - 1) / DQ_KEYS;
    const int begin = first_key(m0, p.mask_size) / DQ_KEYS;

    start_tile<DQ_ROWS, THREADS>(q_tile, q + q_at, q_stride, live);
    start_tile<DQ_ROWS, THREADS>(g_tile, d_out + q_at, q_stride, live);
    {
        const int n1 = begin * DQ_KEYS;
        const u32 into = kv_tiles + (begin & 1) * (2 * KV);
        start_tile<DQ_KEYS, THREADS>(into, k + (long long)n1 * kv_stride, kv_stride, n - n1);
        start_tile<DQ_KEYS, THREADS>(into + KV, v + (long long)n1 * kv_stride, kv_stride, n - n1);
    }
    copies_commit();

    float acc[DQ_MR][BLOCKS][4];
    float bias[DQ_MR][2], less[DQ_MR][2];
#pragma unroll
    for (int m = 0; m < DQ_MR; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = w0 + m * 16 + (lane >> 2) + h * 8;
            long long at = (start + m0 + row) * heads + head;
            bias[m][h] = row < live ? lse[at] * LOG2E : POS_INF;  // P = 0 for missing rows
            less[m][h] = row < live ? delta[at] : 0.f;
        }
#pragma unroll
        for (int c = 0; c < BLOCKS; c++) acc[m][c][0] = acc[m][c][1] = acc[m][c][2] = acc[m][c][3] = 0.f;
    }
    const float factor = factor_of(scale);
    const u32 q_lane = q_tile + w0 * ROW_BYTES + lane_rowmajor(lane);
    const u32 g_lane = g_tile + w0 * ROW_BYTES + lane_rowmajor(lane);
    const u32 kn_lane = kv_tiles + lane_colmajor(lane);
    const u32 kt_lane = kv_tiles + lane_rowmajor(lane);

    u32 qf[DQ_AREG ? DSTEPS : 1][DQ_MR][4];
    u32 gf[DQ_AREG ? DSTEPS : 1][DQ_MR][4];

    for (int j = begin; j < steps; j++) {
        copies_wait();
        __syncthreads();
        if (j + 1 < steps) {
            const int n1 = (j + 1) * DQ_KEYS;
            const u32 into = kv_tiles + ((j + 1) & 1) * (2 * KV);
            start_tile<DQ_KEYS, THREADS>(into, k + (long long)n1 * kv_stride, kv_stride, n - n1);
            start_tile<DQ_KEYS, THREADS>(into + KV, v + (long long)n1 * kv_stride, kv_stride, n - n1);
            copies_commit();
        }
        if (DQ_AREG && j == begin) {
#pragma unroll
            for (int d = 0; d < DSTEPS; d++)
#pragma unroll
                for (int m = 0; m < DQ_MR; m++) {
                    load_matrices(qf[DQ_AREG ? d : 0][m], (q_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                    load_matrices(gf[DQ_AREG ? d : 0][m], (g_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                }
        }
        const u32 buffer = (j & 1) * (2 * KV);
#pragma unroll 1
        for (int sub = 0; sub < DQ_KEYS / DQ_SUB; sub++) {
            const int n0 = j * DQ_KEYS + sub * DQ_SUB;
            if (n0 > first + 16 * DQ_MR - 1) break;
            if (MASK && n0 + DQ_SUB - 1 < first_key(first, p.mask_size)) continue;
            const u32 kn = kn_lane + buffer + sub * (DQ_SUB * ROW_BYTES);
            const u32 kt = kt_lane + buffer + sub * (DQ_SUB * ROW_BYTES);

            float s[DQ_MR][NB][4], dp[DQ_MR][NB][4];
#pragma unroll
            for (int m = 0; m < DQ_MR; m++)
#pragma unroll
                for (int b = 0; b < NB; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[m][b][e] = dp[m][b][e] = 0.f;
#pragma unroll
            for (int d = 0; d < DSTEPS; d++) {
                u32(&a)[DQ_MR][4] = qf[DQ_AREG ? d : 0];
                u32(&g)[DQ_MR][4] = gf[DQ_AREG ? d : 0];
                if (!DQ_AREG) {
#pragma unroll
                    for (int m = 0; m < DQ_MR; m++) {
                        load_matrices(a[m], (q_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                        load_matrices(g[m], (g_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                    }
                }
#pragma unroll
                for (int b = 0; b < NB / 2; b++) {
                    u32 x[4], y[4];
                    load_matrices(x, (kn ^ (d * 32)) + b * (16 * ROW_BYTES));
                    load_matrices(y, (kn ^ (d * 32)) + KV + b * (16 * ROW_BYTES));
#pragma unroll
                    for (int m = 0; m < DQ_MR; m++) {
                        mma(s[m][2 * b], a[m], x[0], x[1]);
                        mma(s[m][2 * b + 1], a[m], x[2], x[3]);
                        mma(dp[m][2 * b], g[m], y[0], y[1]);
                        mma(dp[m][2 * b + 1], g[m], y[2], y[3]);
                    }
                }
            }
            const bool edge =
                n0 + DQ_SUB - 1 > first || (MASK && n0 < first_key(first + 16 * DQ_MR - 1, p.mask_size));
#pragma unroll
            for (int m = 0; m < DQ_MR; m++)
#pragma unroll
                for (int b = 0; b < NB; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float t = HAS_CAP ? tanh_of(s[m][b][e], scale, p.cap) : 0.f;
                        float share = exp2_fast((HAS_CAP ? p.cap * t : s[m][b][e]) * factor - bias[m][e >> 1]);
                        if (edge) {
                            int key = n0 + b * 8 + (lane & 3) * 2 + (e & 1);
                            int seen = first + m * 16 + (lane >> 2) + (e >> 1) * 8;
                            if (key > seen || (MASK && key < first_key(seen, p.mask_size))) share = 0.f;
                        }
                        s[m][b][e] = share * (dp[m][b][e] - less[m][e >> 1]);
                        if (HAS_CAP) s[m][b][e] *= 1.f - t * t;
                    }
#pragma unroll
            for (int b = 0; b < NB / 2; b++) {
                u32 a[DQ_MR][4];
#pragma unroll
                for (int m = 0; m < DQ_MR; m++) {
                    a[m][0] = pack(s[m][2 * b][0], s[m][2 * b][1]);
                    a[m][1] = pack(s[m][2 * b][2], s[m][2 * b][3]);
                    a[m][2] = pack(s[m][2 * b + 1][0], s[m][2 * b + 1][1]);
                    a[m][3] = pack(s[m][2 * b + 1][2], s[m][2 * b + 1][3]);
                }
#pragma unroll
                for (int d = 0; d < DSTEPS; d++) {
                    u32 x[4];
                    load_matrices_transposed(x, (kt ^ (d * 32)) + b * (16 * ROW_BYTES));
#pragma unroll
                    for (int m = 0; m < DQ_MR; m++) {
                        mma(acc[m][2 * d], a[m], x[0], x[1]);
                        mma(acc[m][2 * d + 1], a[m], x[2], x[3]);
                    }
                }
            }
        }
    }

    __syncwarp();
#pragma unroll
    for (int m = 0; m < DQ_MR; m++) stage_rows(q_tile, w0 + m * 16, acc[m], scale, scale);
    __syncwarp();
    flush_rows<16 * DQ_MR>(q_tile, w0, dq + q_at + w0 * q_stride, q_stride, live - w0);
}

// Starts copying lse and delta of DKV_QUERIES queries; missing ones get an infinite lse (P = 0) and no delta.
__device__ __forceinline__ void start_stats(u32 dst, const float* lse, const float* delta, int heads, int live) {
    for (int i = threadIdx.x; i < DKV_QUERIES; i += DKV_WARPS * 32) {
        if (i < live) {
            copy4(dst + i * 4, lse + (long long)i * heads);
            copy4(dst + DKV_QUERIES * 4 + i * 4, delta + (long long)i * heads);
        } else {
            store_shared(dst + i * 4, 0x7f800000u);
            store_shared(dst + DKV_QUERIES * 4 + i * 4, 0u);
        }
    }
}

// dk and dv of a tile of DKV_ROWS keys: a pass over the queries that attend to them, for
// `group` query heads starting at `head0`. Scores are transposed (keys by
// queries), so P^T and dS^T are left operands directly from registers.
// PASS selects the gradients: 1 for dk, 2 for dv, 3 for both.
template <bool SPLIT, int PASS>
__device__ __forceinline__ void dkv_tile(const elem* q, const elem* k, const elem* v, const elem* d_out,
                                         const float* lse, const float* delta, elem* dk, elem* dv, float* dk_part,
                                         float* dv_part, long long start, int n, int tile, int head0, int group,
                                         int kv_head, int heads, int kv_heads, float scale, int mask_size,
                                         float cap) {
    constexpr int THREADS = DKV_WARPS * 32;
    constexpr int NB = DKV_SUB / 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int k0 = tile * DKV_ROWS;
    if (k0 >= n) return;
    const int q_stride = heads * WIDTH, kv_stride = kv_heads * WIDTH;
    const long long kv_at = (start + k0) * kv_stride + kv_head * WIDTH;
    const int live = min(n - k0, DKV_ROWS);
    const int w0 = warp * (16 * DKV_MR);
    const int first = k0 + w0;  // warp's first key

    const u32 k_tile = shared_address(dynamic_shared);
    const u32 v_tile = k_tile + DKV_ROWS * ROW_BYTES;
    const u32 q_tiles = v_tile + DKV_ROWS * ROW_BYTES;
    constexpr u32 Q = DKV_QUERIES * ROW_BYTES;  // buffer b: q at 2*b*Q, d_out right after
    const u32 stats = q_tiles + 4 * Q;          // buffer b: lse, then delta
    constexpr u32 STATS = DKV_QUERIES * 8;

    const int from = k0 / DKV_QUERIES * DKV_QUERIES;  // first query tile that attends to a key
    const int seen_until = min(n, queries_end(k0 + live - 1, mask_size));
    const int steps = group * ((seen_until - from + DKV_QUERIES - 1) / DKV_QUERIES);

    // The next tile to copy: head `next_head` at query `next_row`.
    int next_head = head0, next_row = from;
    start_tile<DKV_ROWS, THREADS>(k_tile, k + kv_at, kv_stride, live);
    start_tile<DKV_ROWS, THREADS>(v_tile, v + kv_at, kv_stride, live);
    auto start_step = [&](int b) {
        const long long row = start + next_row;
        const long long at = row * q_stride + next_head * WIDTH;
        start_tile<DKV_QUERIES, THREADS>(q_tiles + b * (2 * Q), q + at, q_stride, n - next_row);
        start_tile<DKV_QUERIES, THREADS>(q_tiles + b * (2 * Q) + Q, d_out + at, q_stride, n - next_row);
        start_stats(stats + b * STATS, lse + row * heads + next_head, delta + row * heads + next_head, heads,
                    n - next_row);
        copies_commit();
        next_row += DKV_QUERIES;
        if (next_row >= seen_until) {
            next_row = from;
            next_head++;
        }
    };
    start_step(0);

    float ak[DKV_MR][BLOCKS][4], av[DKV_MR][BLOCKS][4];
#pragma unroll
    for (int m = 0; m < DKV_MR; m++)
#pragma unroll
        for (int c = 0; c < BLOCKS; c++)
#pragma unroll
            for (int e = 0; e < 4; e++) ak[m][c][e] = av[m][c][e] = 0.f;
    const float factor = factor_of(scale);
    const u32 k_lane = k_tile + w0 * ROW_BYTES + lane_rowmajor(lane);
    const u32 v_lane = v_tile + w0 * ROW_BYTES + lane_rowmajor(lane);
    const u32 qn_lane = q_tiles + lane_colmajor(lane);
    const u32 qt_lane = q_tiles + lane_rowmajor(lane);

    u32 kf[DKV_AREG ? DSTEPS : 1][DKV_MR][4];
    u32 vf[DKV_AREG ? DSTEPS : 1][DKV_MR][4];

    int row = from;
    for (int j = 0; j < steps; j++) {
        copies_wait();
        __syncthreads();
        if (j + 1 < steps) start_step((j + 1) & 1);
        if (DKV_AREG && j == 0) {
#pragma unroll
            for (int d = 0; d < DSTEPS; d++)
#pragma unroll
                for (int m = 0; m < DKV_MR; m++) {
                    load_matrices(kf[DKV_AREG ? d : 0][m], (k_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                    load_matrices(vf[DKV_AREG ? d : 0][m], (v_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                }
        }
        const u32 buffer = (j & 1) * (2 * Q);
#pragma unroll 1
        for (int sub = 0; sub < DKV_QUERIES / DKV_SUB; sub++) {
            const int r0 = row + sub * DKV_SUB;             // first query of the block
            if (r0 + DKV_SUB - 1 < first || r0 >= n) continue;  // attends to none of the warp's keys
            if (MASK && r0 >= queries_end(first + 16 * DKV_MR - 1, mask_size)) continue;
            const u32 qn = qn_lane + buffer + sub * (DKV_SUB * ROW_BYTES);
            const u32 qt = qt_lane + buffer + sub * (DKV_SUB * ROW_BYTES);
            const u32 st = stats + (j & 1) * STATS + (sub * DKV_SUB + (lane & 3) * 2) * 4;

            float s[DKV_MR][NB][4], dp[DKV_MR][NB][4];
#pragma unroll
            for (int m = 0; m < DKV_MR; m++)
#pragma unroll
                for (int b = 0; b < NB; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[m][b][e] = dp[m][b][e] = 0.f;
#pragma unroll
            for (int d = 0; d < DSTEPS; d++) {
                u32(&a)[DKV_MR][4] = kf[DKV_AREG ? d : 0];
                u32(&g)[DKV_MR][4] = vf[DKV_AREG ? d : 0];
                if (!DKV_AREG) {
#pragma unroll
                    for (int m = 0; m < DKV_MR; m++) {
                        load_matrices(a[m], (k_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                        load_matrices(g[m], (v_lane ^ (d * 32)) + m * (16 * ROW_BYTES));
                    }
                }
#pragma unroll
                for (int b = 0; b < NB / 2; b++) {
                    u32 x[4], y[4];
                    load_matrices(x, (qn ^ (d * 32)) + b * (16 * ROW_BYTES));
                    load_matrices(y, (qn ^ (d * 32)) + Q + b * (16 * ROW_BYTES));
#pragma unroll
                    for (int m = 0; m < DKV_MR; m++) {
                        mma(s[m][2 * b], a[m], x[0], x[1]);
                        mma(s[m][2 * b + 1], a[m], x[2], x[3]);
                        mma(dp[m][2 * b], g[m], y[0], y[1]);
                        mma(dp[m][2 * b + 1], g[m], y[2], y[3]);
                    }
                }
            }
            const bool edge = r0 < first + 16 * DKV_MR - 1 ||
                              (MASK && r0 + DKV_SUB - 1 >= queries_end(first, mask_size));
#pragma unroll
            for (int b = 0; b < NB; b++) {
                const float2 l = load_shared_pair(st + b * 32);
                const float2 t = load_shared_pair(st + DKV_QUERIES * 4 + b * 32);
                const float bias[2] = {l.x * LOG2E, l.y * LOG2E};
                const float less[2] = {t.x, t.y};
#pragma unroll
                for (int m = 0; m < DKV_MR; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float t = HAS_CAP ? tanh_of(s[m][b][e], scale, cap) : 0.f;
                        float p = exp2_fast((HAS_CAP ? cap * t : s[m][b][e]) * factor - bias[e & 1]);
                        if (edge) {
                            int query = r0 + b * 8 + (lane & 3) * 2 + (e & 1);
                            int key = first + m * 16 + (lane >> 2) + (e >> 1) * 8;
                            if (key > query || (MASK && key < first_key(query, mask_size))) p = 0.f;
                        }
                        s[m][b][e] = p;
                        dp[m][b][e] = p * (dp[m][b][e] - less[e & 1]);
                        if (HAS_CAP) dp[m][b][e] *= 1.f - t * t;
                    }
            }
#pragma unroll
            for (int b = 0; b < NB / 2; b++) {
                u32 p[DKV_MR][4], ds[DKV_MR][4];
#pragma unroll
                for (int m = 0; m < DKV_MR; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int c = 2 * b + (i >> 1), e = (i & 1) * 2;
                        p[m][i] = pack(s[m][c][e], s[m][c][e + 1]);
                        ds[m][i] = pack(dp[m][c][e], dp[m][c][e + 1]);
                    }
#pragma unroll
                for (int d = 0; d < DSTEPS; d++) {
                    u32 x[4], y[4];
                    if (PASS & 1) load_matrices_transposed(x, (qt ^ (d * 32)) + b * (16 * ROW_BYTES));
                    if (PASS & 2) load_matrices_transposed(y, (qt ^ (d * 32)) + Q + b * (16 * ROW_BYTES));
#pragma unroll
                    for (int m = 0; m < DKV_MR; m++) {
                        if (PASS & 2) {
                            mma(av[m][2 * d], p[m], y[0], y[1]);
                            mma(av[m][2 * d + 1], p[m], y[2], y[3]);
                        }
                        if (PASS & 1) {
                            mma(ak[m][2 * d], ds[m], x[0], x[1]);
                            mma(ak[m][2 * d + 1], ds[m], x[2], x[3]);
                        }
                    }
                }
            }
        }
        row += DKV_QUERIES;
        if (row >= seen_until) row = from;
    }

    if (SPLIT) {
#pragma unroll
        for (int m = 0; m < DKV_MR; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = w0 + m * 16 + (lane >> 2) + h * 8;
                if (r < live) {
                    float* pk = dk_part + kv_at + (long long)r * kv_stride + (lane & 3) * 2;
                    float* pv = dv_part + kv_at + (long long)r * kv_stride + (lane & 3) * 2;
#pragma unroll
                    for (int c = 0; c < WIDTH / 8; c++) {
                        if (PASS & 1)
                            *(float2*)(pk + c * 8) = make_float2(ak[m][c][2 * h] * scale, ak[m][c][2 * h + 1] * scale);
                        if (PASS & 2) *(float2*)(pv + c * 8) = make_float2(av[m][c][2 * h], av[m][c][2 * h + 1]);
                    }
                }
            }
    } else {
        __syncwarp();
#pragma unroll
        for (int m = 0; m < DKV_MR; m++) {
            if (PASS & 1) stage_rows(k_tile, w0 + m * 16, ak[m], scale, scale);
            if (PASS & 2) stage_rows(v_tile, w0 + m * 16, av[m], 1.f, 1.f);
        }
        __syncwarp();
        if (PASS & 1)
            flush_rows<16 * DKV_MR>(k_tile, w0, dk + kv_at + w0 * kv_stride, kv_stride, live - w0);
        if (PASS & 2)
            flush_rows<16 * DKV_MR>(v_tile, w0, dv + kv_at + w0 * kv_stride, kv_stride, live - w0);
    }
}

// One block per key tile and kv head; it loops over the group's query heads and writes dk and dv itself.
extern "C" __global__ void __launch_bounds__(DKV_WARPS * 32, DKV_MINB)
    flash_backward_dkv(const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,
                       const elem* __restrict__ d_out, const float* __restrict__ lse, const float* __restrict__ delta,
                       elem* __restrict__ dk, elem* __restrict__ dv, const u32* __restrict__ offsets,
                       const u32* __restrict__ tiles, const ForwardWords p) {
    const int heads = p.heads, kv_heads = p.kv_heads;
    const float scale = p.scale;
    int sequence, tile, kv_head;
    block_work(tiles, sequence, tile, kv_head);
    const long long start = offsets[sequence];
    const int n = offsets[sequence + 1] - (u32)start;
    const int group = heads / kv_heads;
#if HEAD_DIM == 256
    if (blockIdx.z == 0) {
        dkv_tile<false, 1>(q, k, v, d_out, lse, delta, dk, dv, nullptr, nullptr, start, n, tile, kv_head * group, group,
                    kv_head, heads, kv_heads, scale, p.mask_size, p.cap);
    } else {
        dkv_tile<false, 2>(q, k, v, d_out, lse, delta, dk, dv, nullptr, nullptr, start, n, tile, kv_head * group, group,
                    kv_head, heads, kv_heads, scale, p.mask_size, p.cap);
    }
#else
    dkv_tile<false, 3>(q, k, v, d_out, lse, delta, dk, dv, nullptr, nullptr, start, n, tile, kv_head * group, group,
                    kv_head, heads, kv_heads, scale, p.mask_size, p.cap);
#endif
}

// As above, with each group of query heads divided among `splits` blocks (1 <= splits <=
// heads / kv_heads), for when key tiles * kv_heads alone are too few to fill the
// device. Block part s writes f32 sums to part s of dk_part and dv_part, each
// [splits, tokens, kv_heads*WIDTH]; flash_backward_sum then adds the parts in order.
extern "C" __global__ void __launch_bounds__(DKV_WARPS * 32, DKV_MINB)
    flash_backward_dkv_split(const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,
                             const elem* __restrict__ d_out, const float* __restrict__ lse,
                             const float* __restrict__ delta, float* __restrict__ dk_part,
                             float* __restrict__ dv_part, const u32* __restrict__ offsets,
                             const u32* __restrict__ tiles, const SplitWords p) {
    const int heads = p.heads, kv_heads = p.kv_heads, tokens = p.tokens, splits = p.splits;
    const float scale = p.scale;
    int sequence, tile, at;
    block_work(tiles, sequence, tile, at);
    const int kv_head = at / splits, part = at - kv_head * splits;
    const long long start = offsets[sequence];
    const int n = offsets[sequence + 1] - (u32)start;
    const int group = heads / kv_heads;
    const int lo = group * part / splits, hi = group * (part + 1) / splits;
    const long long skip = (long long)part * tokens * kv_heads * WIDTH;
#if HEAD_DIM == 256
    if (blockIdx.z == 0) {
        dkv_tile<true, 1>(q, k, v, d_out, lse, delta, nullptr, nullptr, dk_part + skip, dv_part + skip, start, n, tile,
                   kv_head * group + lo, hi - lo, kv_head, heads, kv_heads, scale, p.mask_size, p.cap);
    } else {
        dkv_tile<true, 2>(q, k, v, d_out, lse, delta, nullptr, nullptr, dk_part + skip, dv_part + skip, start, n, tile,
                   kv_head * group + lo, hi - lo, kv_head, heads, kv_heads, scale, p.mask_size, p.cap);
    }
#else
    dkv_tile<true, 3>(q, k, v, d_out, lse, delta, nullptr, nullptr, dk_part + skip, dv_part + skip, start, n, tile,
                   kv_head * group + lo, hi - lo, kv_head, heads, kv_heads, scale, p.mask_size, p.cap);
#endif
}

// dk = sum of dk_part's parts (blockIdx.y 0) and dv likewise (1); elements = tokens * kv_heads * WIDTH.
extern "C" __global__ void __launch_bounds__(256)
    flash_backward_sum(const float* __restrict__ dk_part, const float* __restrict__ dv_part, elem* __restrict__ dk,
                       elem* __restrict__ dv, const SumWords p) {
    const unsigned long long elements = p.elements;
    const int splits = p.splits;
    const unsigned long long at = ((unsigned long long)blockIdx.x * 256 + threadIdx.x) * 8;
    if (at >= elements) return;
    const float* part = blockIdx.y ? dv_part : dk_part;
    elem* out = blockIdx.y ? dv : dk;
    float x[8] = {};
    for (int s = 0; s < splits; s++) {
        const float4 a = *(const float4*)(part + s * elements + at);
        const float4 b = *(const float4*)(part + s * elements + at + 4);
        x[0] += a.x, x[1] += a.y, x[2] += a.z, x[3] += a.w;
        x[4] += b.x, x[5] += b.y, x[6] += b.z, x[7] += b.w;
    }
    uint4 r;
    r.x = pack(x[0], x[1]), r.y = pack(x[2], x[3]), r.z = pack(x[4], x[5]), r.w = pack(x[6], x[7]);
    *(uint4*)(out + at) = r;
}
