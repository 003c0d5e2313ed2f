// INT8 weights from block scales to one scale for each row.
//
// WARPS warps share a row, of which a thread holds EACH chunks. What it has turned into int8 makes
// room for the same chunks of the program's next row, which arrive meanwhile.

// Defined are COLUMNS, K; WARPS; EACH; PROGRAMS, of a multiprocessor.

#include "rows.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK = 128;  // rows and columns that share a scale
constexpr int CHUNK = 16;   // numbers that a thread takes at once
constexpr int BLOCKS = (COLUMNS + BLOCK - 1) / BLOCK;
static_assert(COLUMNS % CHUNK == 0 && COLUMNS <= CHUNK * EACH * THREADS);

struct Operands {
    const i8* q;         // [N, K]
    const float* scale;  // [N / BLOCK, K / BLOCK], rounded up
    i8* out;             // [N, K]
    float* row_scale;    // [N]
    u32 n;
    int q_n;
};

struct Shared {
    float amax[2][WARPS];  // of this row and the last one: one barrier a row is enough
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

struct Chunk {
    uint4 raw;
    float scale;
};

// The first column of this thread's i-th chunk.
__device__ __forceinline__ u32 column_of(int i) { return CHUNK * (threadIdx.x + i * THREADS); }

__device__ __forceinline__ bool inside(int i) {
    return CHUNK * (i + 1) * THREADS <= COLUMNS || column_of(i) < COLUMNS;
}

// This thread's i-th chunk of a row. Beyond the row's end it is all zeros.
__device__ __forceinline__ Chunk chunk_of(const Operands& o, u32 row, int i) {
    if (!inside(i)) return {make_uint4(0, 0, 0, 0), 0};
    const i8* from = o.q + row * (long long)o.q_n + column_of(i);
    return {read_once(reinterpret_cast<const uint4*>(from)),
            o.scale[row / BLOCK * BLOCKS + column_of(i) / BLOCK]};
}

// The largest of 16 integers without their signs. 1024 plus a byte is a float16.
__device__ __forceinline__ float largest(const uint4& raw) {
    const u32 quads[4] = {raw.x, raw.y, raw.z, raw.w};
    u32 high = 0x64806480, low = high;  // 1024 + 128: 0
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 quad = quads[i] ^ 0x80808080;  // each integer plus 128
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 pair = __byte_perm(quad, 0x64646464, half ? 0x4342 : 0x4140);
            high = max_of_pairs(high, pair, false), low = min_of_pairs(low, pair, false);
        }
    }
    float2 most = pair_of(high, false), least = pair_of(low, false);
    return fmaxf(fmaxf(most.x, most.y) - 1152.0f, 1152.0f - fminf(least.x, least.y));
}

// Four integers times a scale.
__device__ __forceinline__ void unpack(float (&x)[4], u32 quad, float scale) {
    quad ^= 0x80808080;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float n = __uint_as_float(__byte_perm(quad, 0x4b000000, 0x7540 + j));  // plus 2^23
        x[j] = __fmul_rn(n - (8388608.0f + 128.0f), scale);
    }
}

__device__ __forceinline__ uint4 requantized(const Chunk& chunk, float factor) {
    const u32 quads[4] = {chunk.raw.x, chunk.raw.y, chunk.raw.z, chunk.raw.w};
    u32 y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x[4];
        unpack(x, quads[i], chunk.scale);
        y[i] = int8_of(x, factor);
    }
    return make_uint4(y[0], y[1], y[2], y[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) requantize_rows(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = 0;
    Chunk own[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) own[i] = chunk_of(o, blockIdx.x, i);
#pragma unroll 1
    for (u32 row = blockIdx.x; row < o.n; row += gridDim.x, turn ^= 1) {
        float amax = 1e-8f;
#pragma unroll
        for (int i = 0; i < EACH; i++)  // rounded as each of them would be
            amax = max_or_nan(amax, largest(own[i].raw) * fabsf(own[i].scale));
        amax = warp_max(amax);
        if (lane == 0) shared.amax[turn][warp] = amax;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARPS; i++) amax = max_or_nan(amax, shared.amax[turn][i]);
        float factor = __fdiv_rn(128.0f, amax);
        // Behind the last one itself again, which is in L2: all programs' own place, and no branch.
        u32 next = row + gridDim.x < o.n ? row + gridDim.x : row;
        i8* to = o.out + row * (long long)COLUMNS;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint4 y = requantized(own[i], factor);
            own[i] = chunk_of(o, next, i);
            if (inside(i)) *reinterpret_cast<uint4*>(to + column_of(i)) = y;
        }
        if (threadIdx.x == 0) o.row_scale[row] = amax * (1.0f / 128);
    }
}
