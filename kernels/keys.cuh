// The softmax of keys for the sums over them, which both kinds of cards share: each of eight lanes
// takes an eighth of a key's 128 channels. BF16 says what 16 bits are.

#include "mma.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr float SAFE_EXPONENT = 64.0f;  // sums of powers of 2 and their inverses stay in float32

// Over the eight lanes of a key.
__device__ __forceinline__ float key_max(float x) {
#pragma unroll
    for (int distance = 4; distance; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

__device__ __forceinline__ float key_sum(float x) {
#pragma unroll
    for (int distance = 4; distance; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
}

__device__ __forceinline__ void unpack(float* x, const uint4& raw) {
    const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 both = pair_of(pairs[i], BF16);
        x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
}

// Eight of a lane's numbers in 16 bits.
__device__ __forceinline__ uint4 packed_chunk(const float* x) {
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = packed_pair({x[2 * j], x[2 * j + 1]}, BF16);
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// ---- keys in int8 ----

// log2(e) times a center to shared memory, and its largest number; by one warp, whose lane l has
// the four channels that come at place l / 8 to lane l % 8 of a key.
__device__ __forceinline__ float load_center(float4 (&to)[4][8], uint2 raw) {
    float2 low = pair_of(raw.x, BF16), high = pair_of(raw.y, BF16);
    to[threadIdx.x / 8][threadIdx.x % 8] =
        make_float4(LOG2E * low.x, LOG2E * low.y, LOG2E * high.x, LOG2E * high.y);
    float far = fmaxf(fmaxf(fabsf(low.x), fabsf(low.y)), fmaxf(fabsf(high.x), fabsf(high.y)));
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        far = fmaxf(far, __shfl_xor_sync(0xffffffff, far, distance));
    return LOG2E * far;
}

// The exponents of a key's eighth, `quads` of int8 times the scale plus a center: of base 2.
__device__ __forceinline__ void exponents(
    float (&x)[16], const u32 (&quads)[4], const float4 (&center)[4][8], float scale, int eighth
) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float4 four = center[i][eighth];
        const float centers[4] = {four.x, four.y, four.z, four.w};
        u32 quad = quads[i] ^ 0x80808080;  // each integer plus 128
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float n = __uint_as_float(__byte_perm(quad, 0x4b000000, 0x7540 + j));  // plus 2^23
            x[4 * i + j] = fmaf(n - (8388608.0f + 128.0f), scale, centers[j]);
        }
    }
}

// Whether exponents of keys by this scale, around a center whose `farthest` this is, have to be
// taken less their maximum.
__device__ __forceinline__ bool are_far(float scale, float farthest) {
    return !(fmaf(127.0f, scale, farthest) < SAFE_EXPONENT);
}

// From an eighth of a key's exponents to its softmax; a key past the end weighs nothing.
__device__ __forceinline__ void weigh_key(float (&x)[16], bool far, bool inside) {
    float sum = 0;
    if (far) {
        float high = -1e30f;
#pragma unroll
        for (int i = 0; i < 16; i++) high = fmaxf(high, x[i]);
        high = key_max(high);
#pragma unroll
        for (int i = 0; i < 16; i++) x[i] -= high;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] = exp2_fast(x[i]);
        sum += x[i];
    }
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(key_sum(sum)));
    inverse = inside ? inverse : 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] *= inverse;
}
