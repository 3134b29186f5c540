// Defines the macros and functions that the kernels share, for Metal.
#include <metal_stdlib>
using namespace metal;
typedef ulong wide;

#if ELEMENT == 0
typedef float T;
typedef float4 T4;
#elif ELEMENT == 1
typedef half T;
typedef half4 T4;
#else
typedef bfloat T;
typedef bfloat4 T4;
#endif

#define KERNEL(name) kernel void name
#define IN(type, name, index) device const type* name [[buffer(index)]]
#define OUT(type, name, index) device type* name [[buffer(index)]]
#define WORDS(type, index) constant type& p [[buffer(index)]]
// The last parameters of a kernel: `group`, the index of the group; `me`, the thread's index in the group; `threads`, the number
// of threads in the group; and the thread's `lane` and `warp`.
#define INDICES                                                                                                       \
    , uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],                           \
        uint me [[thread_index_in_threadgroup]], uint3 threads3 [[threads_per_threadgroup]],                      \
        uint lane [[thread_index_in_simdgroup]], uint warp [[simdgroup_index_in_threadgroup]]
#define GLOBAL device
#define SHARED threadgroup
#define SHARED_ARG threadgroup
#define PRIVATE thread
#define CONSTANT constant
#define FUNCTION static inline
#define threads (threads3.x)
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define WAIT_FOR_INPUT
#define UNROLL _Pragma("unroll")
#define UNROLL4
#define NO_UNROLL
#define PREFETCH(address)
#define ATOMIC_UINT atomic_uint
#define ATOMIC_STORE(a, i, x) atomic_store_explicit(&(a)[i], x, memory_order_relaxed)
#define ATOMIC_LOAD(a, i) atomic_load_explicit(&(a)[i], memory_order_relaxed)
#define ATOMIC_ADD(a, i, x) atomic_fetch_add_explicit(&(a)[i], x, memory_order_relaxed)
#define EXP(x) exp(x)
#define LOG(x) log(x)
#define SQRT(x) sqrt(x)
#define RSQRT(x) rsqrt(x)
#define MAXIMUM(a, b) max(a, b)
#define MINIMUM(a, b) min(a, b)

FUNCTION float warp_sum(float x) { return simd_sum(x); }
FUNCTION float warp_max(float x) { return simd_max(x); }
FUNCTION uint warp_sum_uint(uint x) { return simd_sum(x); }
FUNCTION bool warp_any(bool x) { return simd_any(x); }
FUNCTION float warp_shuffle(float x, uint from) { return simd_shuffle(x, ushort(from)); }
FUNCTION float warp_shuffle_xor(float x, uint mask) { return simd_shuffle_xor(x, ushort(mask)); }
FUNCTION uint warp_shuffle_xor_uint(uint x, uint mask) { return simd_shuffle_xor(x, ushort(mask)); }
FUNCTION float bits_to_float(uint x) { return as_type<float>(x); }
FUNCTION uint float_to_bits(float x) { return as_type<uint>(x); }
FUNCTION float half_bits_to_float(ushort x) { return float(as_type<half>(x)); }

// Loads four elements; `x` is aligned to four elements.
FUNCTION void load4(device const T* x, thread float* y) {
    const T4 v = *reinterpret_cast<device const T4*>(x);
    y[0] = float(v[0]);
    y[1] = float(v[1]);
    y[2] = float(v[2]);
    y[3] = float(v[3]);
}
FUNCTION void store4(device T* y, thread const float* x) {
    *reinterpret_cast<device T4*>(y) = T4(T(x[0]), T(x[1]), T(x[2]), T(x[3]));
}
// Loads eight elements; `x` is aligned to eight elements.
FUNCTION void load8(device const T* x, thread float* y) {
    load4(x, y);
    load4(x + 4, y + 4);
}
// Loads eight floats from shared memory; `x` is aligned to eight floats.
FUNCTION void load8_shared(threadgroup const float* x, thread float* y) {
    for (uint i = 0; i < 8; i++) y[i] = x[i];
}
// Eight elements, not converted to floats.
struct Eight {
    T4 low;
    T4 high;
};
FUNCTION Eight load_eight(device const T* x) {
    Eight y;
    y.low = *reinterpret_cast<device const T4*>(x);
    y.high = *reinterpret_cast<device const T4*>(x + 4);
    return y;
}
FUNCTION void unpack_eight(Eight x, thread float* y) {
    for (uint i = 0; i < 4; i++) {
        y[i] = float(x.low[i]);
        y[4 + i] = float(x.high[i]);
    }
}
