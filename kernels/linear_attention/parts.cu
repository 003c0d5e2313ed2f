// What programs of sums over keys left, by all of them: sums, and the largest of maxima. Part by
// part, so that the bits are the same every time.

#include "mma.cuh"

constexpr int THREADS = 256;

struct Operands {
    const float* state;       // [PARTS, STATES]
    const float* normalizer;  // [PARTS, CHANNELS]
    const float* maxima;      // [PARTS, CHANNELS]
    float* state_sum;         // [STATES]
    float* normalizer_sum;    // [CHANNELS]
    float* maximum;           // [CHANNELS]
    int parts, states, channels;  // numbers of a part, whole fours
};

static_assert(SHARED_BYTES == 0);
static_assert(OPERANDS_BYTES == sizeof(Operands));

__device__ __forceinline__ float4 sum(float4 x, float4 y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

__device__ __forceinline__ float4 larger(float4 x, float4 y) {
    return make_float4(max_or_nan(x.x, y.x), max_or_nan(x.y, y.y), max_or_nan(x.z, y.z),
                       max_or_nan(x.w, y.w));
}

// Four numbers of each part, `step` apart.
template <typename Join>
__device__ __forceinline__ void join(
    const float* from, float* to, int at, int step, int parts, Join with
) {
    float4 all = *reinterpret_cast<const float4*>(from + at);
#pragma unroll 4
    for (int i = 1; i < parts; i++)
        all = with(all, *reinterpret_cast<const float4*>(from + i * (long long)step + at));
    *reinterpret_cast<float4*>(to + at) = all;
}

extern "C" __global__ void __launch_bounds__(THREADS) join_parts(
    const __grid_constant__ Operands o
) {
    int at = 4 * (blockIdx.x * THREADS + threadIdx.x);
    if (at < o.states) return join(o.state, o.state_sum, at, o.states, o.parts, sum);
    at -= o.states;
    if (at < o.channels)
        return join(o.normalizer, o.normalizer_sum, at, o.channels, o.parts, sum);
    at -= o.channels;
    if (at < o.channels) join(o.maxima, o.maximum, at, o.channels, o.parts, larger);
}
