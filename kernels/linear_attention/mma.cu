// Sums over keys by mma.sync: softmax(k)^T v, softmax(k), and the largest |v|.
//
// A program takes some rows of one head, TILE of them after another; copies go STAGES - 1 tiles
// ahead. A warp takes the softmax of its keys where they lie in shared memory. Then each has 32 of
// k's channels and 64 of v's, whose products need all of the tile.

// Defined are STAGES, and BF16, whether k and v are bfloat16, else float16.

#include "keys.cuh"

constexpr int HEAD_DIM = 128;
constexpr int TILE = 32;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = HEAD_DIM / 8;             // of 16 bytes, of a row
constexpr int COPY_ROWS = THREADS / CHUNKS;      // that all threads copy at once
constexpr int COPIES = TILE / COPY_ROWS;
constexpr int WARP_K = 32, WARP_V = 64;          // channels of a warp's products
static_assert(HEAD_DIM / WARP_K * (HEAD_DIM / WARP_V) == WARPS && TILE == 4 * WARPS);

struct Stage {
    u16 k[TILE * HEAD_DIM];  // [TILE, HEAD_DIM], swizzled; then their softmax
    u16 v[TILE * HEAD_DIM];
};

// Where all tiles are done, what warps found of each channel.
struct Ends {
    float normalizer[WARPS][HEAD_DIM];
    u32 maxima[COPY_ROWS][HEAD_DIM / 2];
};

union Shared {
    Stage stages[STAGES];
    Ends ends;
};

struct Operands {
    const u16* k;       // [B, L, H, D]
    const u16* v;       // [B, L, H, D]
    float* state;       // [splits, B, H, D (of k), D (of v)]
    float* normalizer;  // [splits, B, H, D]
    float* maxima;      // [splits, B, H, D]
    int length, heads, heads_in_all, rows;  // rows of a program
    int k_b, k_l, k_h, v_b, v_l, v_h;
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

typedef float Sums[WARP_K / 16][WARP_V / 8][4];

// Where a row's chunk lies: eight rows of the same chunk meet all banks.
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return row * (2 * HEAD_DIM) + (chunk ^ row % 8) * 16;
}

__device__ __forceinline__ uint4& chunk_at(u16* tile, int row, int chunk) {
    return *reinterpret_cast<uint4*>(reinterpret_cast<i8*>(tile) + swizzled(row, chunk));
}

// Starts the copies of a tile whose first row is `first`. Rows from `end` on become zeros.
__device__ __forceinline__ void copy_tile(
    Stage& stage, const u16* k, const u16* v, int first, int end, const Operands& o
) {
    int chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int in_tile = threadIdx.x / CHUNKS + i * COPY_ROWS, row = first + in_tile;
        long long from = min(row, o.length - 1);
        int bytes = row < end ? 16 : 0;
        u32 to = swizzled(in_tile, chunk);
        copy_16(shared_address(stage.k) + to, k + from * o.k_l + 8 * chunk, bytes);
        copy_16(shared_address(stage.v) + to, v + from * o.v_l + 8 * chunk, bytes);
    }
}

// The softmax of this lane's key, in its place: channels 8 (lane % 8) + {0 .. 7}, of both halves.
// Those past the end, zeros, weigh nothing.
__device__ __forceinline__ void weigh_key(
    Stage& stage, float (&normalizer)[16], int row, int eighth, bool inside
) {
    float x[16], high = -1e30f, sum = 0;
#pragma unroll
    for (int half = 0; half < 2; half++)
        unpack(x + 8 * half, chunk_at(stage.k, row, eighth + 8 * half));
#pragma unroll
    for (int i = 0; i < 16; i++) high = fmaxf(high, x[i]);
    float shift = -key_max(high) * LOG2E;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] = exp2_fast(fmaf(x[i], LOG2E, shift));
        sum += x[i];
    }
    sum = key_sum(sum);
    float factor = inside ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] *= factor;
        normalizer[i] += x[i];
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
        chunk_at(stage.k, row, eighth + 8 * half) = packed_chunk(x + 8 * half);
}

// Of the values that this thread copied.
__device__ __forceinline__ void raise_maxima(u32 (&maxima)[4], Stage& stage) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int row = threadIdx.x / CHUNKS + i * COPY_ROWS;
        uint4 raw = chunk_at(stage.v, row, threadIdx.x % CHUNKS);
        const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            maxima[j] = max_of_pairs(maxima[j], pairs[j] & 0x7fff7fff, BF16);
    }
}

// sums += softmax(k)^T v of the tile. Both lie by keys, products want them by channels.
__device__ __forceinline__ void multiply(Sums& sums, const Stage& stage, int warp, int lane) {
    int k_chunk = warp / 2 * (WARP_K / 8) + lane / 8 % 2, k_row = lane / 16 * 8 + lane % 8;
    int v_chunk = warp % 2 * (WARP_V / 8) + lane / 16, v_row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int key = 0; key < TILE; key += 16) {
        u32 phi[WARP_K / 16][4];
#pragma unroll
        for (int m = 0; m < WARP_K / 16; m++)
            load_matrices_transposed(
                phi[m], shared_address(stage.k) + swizzled(key + k_row, k_chunk + 2 * m));
#pragma unroll
        for (int n = 0; n < WARP_V / 8; n += 2) {
            u32 v[4];
            load_matrices_transposed(
                v, shared_address(stage.v) + swizzled(key + v_row, v_chunk + n));
#pragma unroll
            for (int m = 0; m < WARP_K / 16; m++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (BF16)
                        mma_bf16(sums[m][n + i], phi[m], v[2 * i], v[2 * i + 1]);
                    else
                        mma_fp16(sums[m][n + i], phi[m], v[2 * i], v[2 * i + 1]);
        }
    }
}

__device__ __forceinline__ void store_state(const Sums& sums, float* state, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < WARP_K / 16; m++)
#pragma unroll
        for (int n = 0; n < WARP_V / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = warp / 2 * WARP_K + 16 * m + 8 * half + lane / 4;
                int column = warp % 2 * WARP_V + 8 * n + 2 * (lane % 4);
                *reinterpret_cast<float2*>(state + row * HEAD_DIM + column) =
                    make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
            }
}

// The four keys of a warp, then all warps.
__device__ __forceinline__ void store_ends(
    Ends& ends, float (&normalizer)[16], const u32 (&maxima)[4], const Operands& o, int warp,
    int lane
) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        normalizer[i] += __shfl_xor_sync(0xffffffff, normalizer[i], 8);
        normalizer[i] += __shfl_xor_sync(0xffffffff, normalizer[i], 16);
        if (lane < 8) ends.normalizer[warp][64 * (i / 8) + 8 * lane + i % 8] = normalizer[i];
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        ends.maxima[threadIdx.x / CHUNKS][4 * (threadIdx.x % CHUNKS) + j] = maxima[j];
    __syncthreads();
    long long at = (long long)blockIdx.x * HEAD_DIM + threadIdx.x;
    if (threadIdx.x < HEAD_DIM) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += ends.normalizer[i][threadIdx.x];
        o.normalizer[at] = sum;
        u32 highest = 0;
#pragma unroll
        for (int i = 0; i < COPY_ROWS; i++)
            highest = max_of_pairs(highest, ends.maxima[i][threadIdx.x / 2], BF16);
        float2 both = pair_of(highest, BF16);
        o.maxima[at] = threadIdx.x % 2 ? both.y : both.x;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) key_value_state(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // All heads of some rows run side by side: together they read whole rows.
    int head = blockIdx.x % o.heads_in_all, sample = head / o.heads;
    int begin = blockIdx.x / o.heads_in_all * o.rows, end = min(begin + o.rows, o.length);
    const u16* k = o.k + sample * (long long)o.k_b + head % o.heads * o.k_h;
    const u16* v = o.v + sample * (long long)o.v_b + head % o.heads * o.v_h;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        copy_tile(shared.stages[i], k, v, begin + i * TILE, end, o);
        copy_commit();
    }
    Sums sums = {};
    float normalizer[16] = {};
    u32 maxima[4] = {};
    int slot = 0, row = 4 * warp + lane / 8;
#pragma unroll 1
    for (int first = begin; first < end; first += TILE) {
        Stage& stage = shared.stages[slot];
        copy_wait<STAGES - 2>();
        __syncthreads();  // the tile is there, and all are done with the last one
        Stage& free = shared.stages[slot ? slot - 1 : STAGES - 1];
        copy_tile(free, k, v, first + (STAGES - 1) * TILE, end, o);
        copy_commit();
        weigh_key(stage, normalizer, row, lane % 8, first + row < end);
        raise_maxima(maxima, stage);
        __syncthreads();  // all of its weights are there
        multiply(sums, stage, warp, lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    store_state(sums, o.state + (long long)blockIdx.x * HEAD_DIM * HEAD_DIM, warp, lane);
    copy_wait<0>();
    __syncthreads();
    store_ends(shared.ends, normalizer, maxima, o, warp, lane);
}
