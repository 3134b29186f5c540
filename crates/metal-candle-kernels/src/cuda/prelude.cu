// Defines the macros and functions that the kernels share, for CUDA. It includes no headers: NVRTC may not have any.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long long wide;

struct f16_t {
    ushort bits;
    f16_t() = default;
    __device__ explicit f16_t(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};
struct bf16_t {
    ushort bits;
    bf16_t() = default;
    __device__ explicit bf16_t(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const { return __uint_as_float(uint(bits) << 16); }
};

#if ELEMENT == 0
typedef float T;
#elif ELEMENT == 1
typedef f16_t T;
#else
typedef bf16_t T;
#endif

// If the host defines the number of threads of a block, the compiler limits the registers of a thread so that one block, or
// BLOCKS_BESIDE blocks, fit on a multiprocessor.
#if defined(BLOCK_THREADS) && defined(BLOCKS_BESIDE)
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS_BESIDE) name
#elif defined(BLOCK_THREADS)
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) name
#else
#define KERNEL(name) extern "C" __global__ void name
#endif
#define IN(type, name, index) const type* name
#define OUT(type, name, index) type* name
#define WORDS(type, index) const type p
#define INDICES
#define GLOBAL
#define SHARED __shared__ __align__(16)
#define SHARED_ARG
#define PRIVATE
#define CONSTANT
#define FUNCTION static __device__ __forceinline__
#define group blockIdx
#define groups gridDim
#define me (threadIdx.x)
#define threads (blockDim.x)
#define lane (threadIdx.x & 31u)
#define warp (threadIdx.x >> 5)
#define BARRIER __syncthreads()
// A kernel is launched while the previous kernel runs. WAIT_FOR_INPUT waits until the previous kernel has ended, and allows the
// launch of the next kernel.
#if __CUDA_ARCH__ >= 900
#define WAIT_FOR_INPUT asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory")
#else
#define WAIT_FOR_INPUT
#endif
#define UNROLL _Pragma("unroll")
#define UNROLL4 _Pragma("unroll 4")
// For code that rarely runs, so that it does not raise the number of registers.
#define NO_UNROLL _Pragma("unroll 1")
#define PREFETCH(address) asm volatile("prefetch.global.L2 [%0];" ::"l"(address))
#define ATOMIC_UINT uint
#define ATOMIC_STORE(a, i, x) (*(volatile uint*)&(a)[i] = (x))
#define ATOMIC_LOAD(a, i) (*(volatile const uint*)&(a)[i])
#define ATOMIC_ADD(a, i, x) atomicAdd(&a[i], x)
#define EXP(x) expf(x)
#define LOG(x) logf(x)
#define SQRT(x) sqrtf(x)
#define RSQRT(x) (1.0f / sqrtf(x))
#undef INFINITY
#define INFINITY __int_as_float(0x7f800000)

// functions, not macros: an argument may be a shuffle, and all threads must execute it the same number of times
FUNCTION float MAXIMUM(float a, float b) { return a > b ? a : b; }
FUNCTION uint MAXIMUM(uint a, uint b) { return a > b ? a : b; }
FUNCTION float MINIMUM(float a, float b) { return a < b ? a : b; }
FUNCTION uint MINIMUM(uint a, uint b) { return a < b ? a : b; }
FUNCTION float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}
FUNCTION float warp_max(float x) {
    for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}
FUNCTION uint warp_sum_uint(uint x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}
FUNCTION bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
FUNCTION float warp_shuffle(float x, uint from) { return __shfl_sync(0xffffffffu, x, from); }
FUNCTION float warp_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION uint warp_shuffle_xor_uint(uint x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION float bits_to_float(uint x) { return __uint_as_float(x); }
FUNCTION uint float_to_bits(float x) { return __float_as_uint(x); }
FUNCTION float half_bits_to_float(ushort x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#if ELEMENT == 0
FUNCTION void load4(const T* x, float* y) {
    const float4 v = *reinterpret_cast<const float4*>(x);
    y[0] = v.x;
    y[1] = v.y;
    y[2] = v.z;
    y[3] = v.w;
}
FUNCTION void load8(const T* x, float* y) {
    load4(x, y);
    load4(x + 4, y + 4);
}
FUNCTION void store4(T* y, const float* x) {
    *reinterpret_cast<float4*>(y) = make_float4(x[0], x[1], x[2], x[3]);
}
#else
FUNCTION T from_bits(uint bits) {
    T x;
    x.bits = ushort(bits);
    return x;
}
FUNCTION void unpack(uint pair, float* y) {
    y[0] = float(from_bits(pair & 0xffffu));
    y[1] = float(from_bits(pair >> 16));
}
FUNCTION uint pack(float a, float b) {
#if __CUDA_ARCH__ >= 800
    uint pair;
#if ELEMENT == 2
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
#endif
    return pair;
#else
    return uint(T(a).bits) | (uint(T(b).bits) << 16);
#endif
}
FUNCTION void load4(const T* x, float* y) {
    const uint2 v = *reinterpret_cast<const uint2*>(x);
    unpack(v.x, y);
    unpack(v.y, y + 2);
}
FUNCTION void load8(const T* x, float* y) {
    const uint4 v = *reinterpret_cast<const uint4*>(x);
    unpack(v.x, y);
    unpack(v.y, y + 2);
    unpack(v.z, y + 4);
    unpack(v.w, y + 6);
}
FUNCTION void store4(T* y, const float* x) {
    *reinterpret_cast<uint2*>(y) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

#if ELEMENT == 2
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

// sums += A B for tiles A: 16 x 16 and B: 16 x 8 on tensor cores. A lane holds A[g, 2q], A[g + 8, 2q], A[g, 2q + 8] and
// A[g + 8, 2q + 8], each with the next column; B[2q, g] and B[2q + 8, g], each with the next row; and sums[g, 2q],
// sums[g, 2q + 1], sums[g + 8, 2q] and sums[g + 8, 2q + 1], where g = lane / 4 and q = lane % 4.
FUNCTION void multiply_tiles(float* sums, const uint* a, uint2 b) {
    asm(MULTIPLY " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
#endif

FUNCTION void load8_shared(const float* x, float* y) {
    const float4 a = *reinterpret_cast<const float4*>(x);
    const float4 b = *reinterpret_cast<const float4*>(x + 4);
    y[0] = a.x;
    y[1] = a.y;
    y[2] = a.z;
    y[3] = a.w;
    y[4] = b.x;
    y[5] = b.y;
    y[6] = b.z;
    y[7] = b.w;
}

// Eight elements, not converted to floats.
struct Eight {
#if ELEMENT == 0
    float4 low;
    float4 high;
#else
    uint4 bits;
#endif
};
FUNCTION Eight load_eight(const T* x) {
    Eight y;
#if ELEMENT == 0
    y.low = *reinterpret_cast<const float4*>(x);
    y.high = *reinterpret_cast<const float4*>(x + 4);
#else
    y.bits = *reinterpret_cast<const uint4*>(x);
#endif
    return y;
}
FUNCTION void unpack_eight(Eight x, float* y) {
#if ELEMENT == 0
    y[0] = x.low.x;
    y[1] = x.low.y;
    y[2] = x.low.z;
    y[3] = x.low.w;
    y[4] = x.high.x;
    y[5] = x.high.y;
    y[6] = x.high.z;
    y[7] = x.high.w;
#else
    unpack(x.bits.x, y);
    unpack(x.bits.y, y + 2);
    unpack(x.bits.z, y + 4);
    unpack(x.bits.w, y + 6);
#endif
}
