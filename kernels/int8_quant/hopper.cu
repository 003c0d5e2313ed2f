// INT8 of rows for Hopper, as they are or after GELU: a scale for each row.
//
// A program takes one row after another, a warp EACH times SPAN channels of it. What a thread has
// turned into fp32 makes room for the same channels of the program's next row, which arrive while
// this one is quantized.

// Defined are ACTIVATE, whether GELU comes first; WARPS and EACH; CHANNELS; PROGRAMS, of a
// multiprocessor; BF16, whether rows are bfloat16, else float16.

#include "rows.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int SPAN = 256;  // channels that a warp takes at once
static_assert(WARPS * EACH * SPAN == CHANNELS);

struct Operands {
    const u16* x;  // [B, L, C]
    i8* q;         // [B, L, C]
    float* scale;  // [B, L]
    int length, rows;  // rows of all samples
    int x_b, x_l;
};

struct Shared {
    float amax[2][WARPS];  // of this row and the last one: one barrier a row is enough
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

__device__ __forceinline__ const uint4* channels_of(const Operands& o, int row) {
    int sample = row / o.length, in_sample = row % o.length;
    const u16* x = o.x + sample * (long long)o.x_b + in_sample * (long long)o.x_l;
    return reinterpret_cast<const uint4*>(x) + threadIdx.x;
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) quantize_rows(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = 0;
    uint4 raw[EACH];
    const uint4* from = channels_of(o, blockIdx.x);
#pragma unroll
    for (int i = 0; i < EACH; i++) raw[i] = read_once(from + i * THREADS);
#pragma unroll 1
    for (int row = blockIdx.x; row < o.rows; row += gridDim.x, turn ^= 1) {
        from = channels_of(o, min(row + (int)gridDim.x, o.rows - 1));
        float y[8 * EACH], amax = 1e-8f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            unpack(y + 8 * i, raw[i], BF16);
            raw[i] = read_once(from + i * THREADS);
#pragma unroll
            for (int j = 8 * i; j < 8 * i + 8; j++) {
                if (ACTIVATE) y[j] = gelu(y[j]);
                amax = max_or_nan(amax, fabsf(y[j]));
            }
        }
        amax = warp_max(amax);
        if (lane == 0) shared.amax[turn][warp] = amax;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARPS; i++) amax = max_or_nan(amax, shared.amax[turn][i]);
        float factor = __fdiv_rn(128.0f, amax);
        uint2* to = reinterpret_cast<uint2*>(o.q + (long long)row * CHANNELS) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            to[i * THREADS] =
                make_uint2(int8_of(y + 8 * i, factor), int8_of(y + 8 * i + 4, factor));
        if (threadIdx.x == 0) o.scale[row] = amax * (1.0f / 128);
    }
}
