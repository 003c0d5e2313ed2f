// INT8 of rows after GELU: a scale for each row.
//
// A program takes one row after another, a warp EACH times SPAN channels of it. Above its lowest
// point GELU rises, so the row's largest number tells the largest of what comes out, and GELU itself
// is taken once, where the integers are made. What a thread has quantized makes room for the same
// channels of the program's next row, which arrive meanwhile.

// Defined are WARPS and EACH; CHANNELS; PROGRAMS, of a multiprocessor; BF16, whether rows are
// bfloat16, else float16.

#include "rows.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int SPAN = 256;  // channels that a warp takes at once
constexpr float DEEPEST = 0.1701f;  // no GELU is lower than minus that
static_assert(WARPS * EACH * SPAN == CHANNELS);

struct Operands {
    const u16* x;  // [B, L, C]
    i8* q;         // [B, L, C]
    float* scale;  // [B, L]
    int length, rows;  // rows of all samples
    int x_b, x_l;
};

struct Shared {
    u32 ends[2][WARPS];  // of this row and the last one: one barrier a row is enough
    float amax[WARPS];
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

__device__ __forceinline__ const uint4* channels_of(const Operands& o, int row) {
    int sample = row / o.length, in_sample = row % o.length;
    const u16* x = o.x + sample * (long long)o.x_b + in_sample * (long long)o.x_l;
    return reinterpret_cast<const uint4*>(x) + threadIdx.x;
}

// The largest number of the row and minus its smallest, as a pair; NaN where one is.
__device__ __forceinline__ u32 ends_of(const uint4 (&raw)[EACH], u32 (&of_warps)[WARPS]) {
    u32 high = raw[0].x, low = high;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const u32 pairs[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            high = max_of_pairs(high, pairs[j], BF16), low = min_of_pairs(low, pairs[j], BF16);
    }
    low ^= 0x80008000;
    u32 ends = max_of_pairs(
        __byte_perm(high, low, 0x5410), __byte_perm(high, low, 0x7632), BF16);
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        ends = max_of_pairs(ends, __shfl_xor_sync(ALL, ends, distance), BF16);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = ends;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) ends = max_of_pairs(ends, of_warps[i], BF16);
    return ends;
}

// The largest |GELU| of the row, by all of its numbers. That is rare: they are read again.
__device__ __forceinline__ float largest(const uint4* from, float (&of_warps)[WARPS]) {
    float amax = 1e-8f;
#pragma unroll 1
    for (int i = 0; i < EACH; i++) {
        float x[8];
        unpack(x, from[i * THREADS], BF16);
#pragma unroll
        for (int j = 0; j < 8; j++) amax = max_or_nan(amax, fabsf(gelu(x[j])));
    }
    amax = warp_max(amax);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = amax;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) amax = max_or_nan(amax, of_warps[i]);
    return amax;
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) activate_rows(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int turn = 0;
    uint4 raw[EACH];
    const uint4* from = channels_of(o, blockIdx.x);
#pragma unroll
    for (int i = 0; i < EACH; i++) raw[i] = read_once(from + i * THREADS);
#pragma unroll 1
    for (int row = blockIdx.x; row < o.rows; row += gridDim.x, turn ^= 1) {
        float2 ends = pair_of(ends_of(raw, shared.ends[turn]), BF16);
        float amax = gelu(ends.x);
        // Also where there is NaN, or minus infinity, of which GELU is NaN.
        if (!(amax > DEEPEST && ends.y < __int_as_float(0x7f800000)))
            amax = largest(channels_of(o, row), shared.amax);
        float factor = __fdiv_rn(128.0f, amax);
        // Behind the last row itself again, which is in L2: all programs' own place, and no branch.
        from = channels_of(o, row + (int)gridDim.x < o.rows ? row + gridDim.x : row);
        uint2* to = reinterpret_cast<uint2*>(o.q + (long long)row * CHANNELS) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float y[8];
            unpack(y, raw[i], BF16);
            raw[i] = read_once(from + i * THREADS);
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] = gelu(y[j]);
            to[i * THREADS] = make_uint2(int8_of(y, factor), int8_of(y + 4, factor));
        }
        if (threadIdx.x == 0) o.scale[row] = amax * (1.0f / 128);
    }
}
