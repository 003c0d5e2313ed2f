// What all CUDA kernels share: types, addresses in shared memory, arithmetic.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef signed char i8;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
