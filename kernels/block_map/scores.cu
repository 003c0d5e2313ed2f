// Scores of key blocks by mma.sync: the products of all block means of queries and of keys, float32.
//
// A number is its upper bits, a tf32, and what is left, nearly one: three products of four are nearly
// as exact as float32. One alone would reorder blocks of close scores.

// Defined is HEAD_DIM.

#include "mma.cuh"

constexpr int QUERIES = 64, KEYS = 128;            // of a program, one head
constexpr int WARP_QUERIES = 32, WARP_KEYS = 64;   // of a warp
constexpr int ACROSS = KEYS / WARP_KEYS;           // warps along the keys
constexpr int THREADS = 32 * QUERIES / WARP_QUERIES * ACROSS;
constexpr int STEP = 32;                           // channels that are copied at a time
constexpr int STEPS = HEAD_DIM / STEP;
constexpr int ROW_BYTES = 4 * STEP, CHUNKS = ROW_BYTES / 16;
constexpr int COPY_ROWS = THREADS / CHUNKS;        // that all threads copy at once
constexpr int STAGES = 2;
constexpr int PROGRAMS = 3;                        // of a multiprocessor, by registers

struct Stage {
    float rows[QUERIES + KEYS][STEP];  // queries, then keys, swizzled
};

struct Operands {
    const float* q;  // [H, NQ, D]
    const float* k;  // [H, NK, D]
    float* scores;   // [H, NQ, NK]
    int n_queries, n_keys;
};

static_assert(SHARED_BYTES == STAGES * sizeof(Stage));
static_assert(OPERANDS_BYTES == sizeof(Operands));
static_assert(ROW_BYTES == 128 && QUERIES % COPY_ROWS == 0 && COPY_ROWS % 8 == 0);

// Where 16 bytes of a row lie: eight rows of the same chunk meet all banks.
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ row % 8) * 16;
}

// Starts the copies of a step of some rows, of which `many` are left; the others become zeros.
template <int ROWS>
__device__ __forceinline__ void copy_rows(u32 to, const float* from, int many) {
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    to += swizzled(row, chunk), from += 4 * chunk;
#pragma unroll
    for (int i = 0; i < ROWS; i += COPY_ROWS)
        copy_16(to + i * ROW_BYTES, from + min(row + i, many - 1) * HEAD_DIM,
                row + i < many ? 16 : 0);
}

// Four numbers as what tf32 holds of them, and what is left.
__device__ __forceinline__ void split(u32 (&high)[4], u32 (&low)[4], const u32 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        high[i] = x[i] & 0xffffe000u;
        low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
}

typedef float Sums[WARP_QUERIES / 16][WARP_KEYS / 8][4];

__device__ __forceinline__ void multiply(Sums& sums, u32 stage, int warp, int lane) {
    int query = warp / ACROSS * WARP_QUERIES, key = QUERIES + warp % ACROSS * WARP_KEYS;
    u32 q_at = stage + swizzled(query + lane % 16, lane / 16);
    u32 k_at = stage + swizzled(key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int depth = 0; depth < STEP / 8; depth++) {
        u32 a[WARP_QUERIES / 16][2][4];
#pragma unroll
        for (int m = 0; m < WARP_QUERIES / 16; m++) {
            u32 x[4];
            load_matrices(x, (q_at ^ 32 * depth) + m * 16 * ROW_BYTES);
            split(a[m][0], a[m][1], x);
        }
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; n += 2) {
            u32 x[4], high[4], low[4];
            load_matrices(x, (k_at ^ 32 * depth) + n * 8 * ROW_BYTES);
            split(high, low, x);
#pragma unroll
            for (int product = 0; product < 3; product++)  // what is small first
#pragma unroll
                for (int m = 0; m < WARP_QUERIES / 16; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const u32(&b)[4] = product == 0 ? low : high;
                        mma_tf32(sums[m][n + i], a[m][product == 1], b[2 * i], b[2 * i + 1]);
                    }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) score_blocks(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(128) char memory[];
    u32 stages = shared_address(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int across = (o.n_keys + KEYS - 1) / KEYS, down = (o.n_queries + QUERIES - 1) / QUERIES;
    int head = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
    int first_query = tile / across * QUERIES, first_key = tile % across * KEYS;
    int queries = o.n_queries - first_query, keys = o.n_keys - first_key;
    const float* q = o.q + ((long long)head * o.n_queries + first_query) * HEAD_DIM;
    const float* k = o.k + ((long long)head * o.n_keys + first_key) * HEAD_DIM;
    auto copy_step = [&](int step) {
        u32 stage = stages + step % STAGES * sizeof(Stage);
        copy_rows<QUERIES>(stage, q + step * STEP, queries);
        copy_rows<KEYS>(stage + QUERIES * ROW_BYTES, k + step * STEP, keys);
        copy_commit();
    };
    copy_step(0);
    Sums sums = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        copy_wait<0>();
        __syncthreads();  // the step is there, and all are done with the last one
        if (step + 1 < STEPS) copy_step(step + 1);
        multiply(sums, stages + step % STAGES * sizeof(Stage), warp, lane);
    }
    int row = warp / ACROSS * WARP_QUERIES + lane / 4;
    int column = warp % ACROSS * WARP_KEYS + 2 * (lane % 4);
    float* to = o.scores + ((long long)head * o.n_queries + first_query + row) * o.n_keys
        + first_key + column;
#pragma unroll
    for (int i = 0; i < WARP_QUERIES / 8; i++) {
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (row + 8 * i < queries && column + 8 * n + j < keys)
                    to[8 * n + j] = sums[i / 2][n][i % 2 * 2 + j];
        to += 8ll * o.n_keys;
    }
}
