// What kernels that hold whole rows in registers share: eight channels of 16 bits at a time.

#include "arithmetic.cuh"
#include "mma.cuh"

constexpr unsigned ALL = 0xffffffff;  // lanes of a warp

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
    return x;
}

// NaN where one is.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        x = max_or_nan(x, __shfl_xor_sync(ALL, x, distance));
    return x;
}

// Eight channels that nobody reads again.
__device__ __forceinline__ uint4 read_once(const uint4* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

// Eight channels as fp32.
__device__ __forceinline__ void unpack(float* x, const uint4& packed, bool bf16) {
    const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 both = pair_of(pairs[i], bf16);
        x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
}

// x (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3). What overflows
// becomes 0 and x, as it should.
__device__ __forceinline__ float gelu(float x) {
    constexpr float LINEAR = -2.302208198144325f;  // -2 sqrt(2 / pi) / ln 2
    float exponent = x * fmaf(x * x, LINEAR * 0.044715f, LINEAR), inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + exp2_fast(exponent)));
    return x * inverse;
}

// Four numbers times `factor` as int8, as the reference rounds them: half to even. The product is
// rounded before the sum, which leaves the integer in the low byte.
__device__ __forceinline__ u32 int8_of(const float* x, float factor) {
    u32 n[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float scaled = fminf(__fmul_rn(x[i], factor), 127.0f);
        n[i] = __float_as_uint(__fadd_rn(scaled, 12582912.0f));  // 1.5 * 2^23
    }
    return __byte_perm(__byte_perm(n[0], n[1], 0x0040), __byte_perm(n[2], n[3], 0x0040), 0x5410);
}
