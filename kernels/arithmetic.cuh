// What all CUDA kernels share: types, shared memory, arithmetic.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef signed char i8;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Whether the barrier's phase of this parity is over; that before the first one has parity 1.
__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n" : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes at once: the compiler would store what it has, and memory would get pieces of sectors.
__device__ __forceinline__ void store_16(void* to, const u32* x) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// Pairs of bfloat16 or float16.

__device__ __forceinline__ float2 pair_of(u32 packed, bool bf16) {
    float2 x;
    if (bf16)
        x = {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
    else
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
            : "=f"(x.x), "=f"(x.y) : "r"(packed));
    return x;
}

__device__ __forceinline__ u32 packed_pair(float2 x, bool bf16) {
    u32 packed;
    if (bf16)
        asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(x.x), "f"(x.y));
    else
        asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(x.x), "f"(x.y));
    return packed;
}

// Of 32 columns thread t of four holds columns 8 j + 2 t + {0, 1} in x[j], or 8 t + {0 .. 7}: from
// either to the other.
__device__ __forceinline__ void transpose(u32 (&x)[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 got = __shfl_xor_sync(0xffffffff, odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 got = __shfl_xor_sync(0xffffffff, upper ? x[i] : x[i + 2], 2);
        (upper ? x[i] : x[i + 2]) = got;
    }
}
