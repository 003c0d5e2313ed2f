// Sums over keys by mma.sync: softmax(k)^T v, softmax(k), and the largest |v|.
//
// A program takes some rows of one head, TILE of them after another; copies go STAGES - 1 tiles
// ahead. A warp takes the softmax of its keys where they lie in shared memory; of int8, whose scale
// and center make a key, beside it. Then each has 32 of k's channels and 64 of v's, whose products
// need all of the tile. Beside keys in int8 v becomes fp8 or float16, as attention reads it.

// Defined are STAGES; BF16, whether v is bfloat16, else float16; INT8, whether k is int8, else as v.
// Then FP8, whether values are e4m3, else float16, and VALUE_LIMIT, the largest of them.

#include "keys.cuh"

constexpr int HEAD_DIM = 128;
constexpr int TILE = 32;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = 2 * HEAD_DIM;
constexpr int CHUNKS = ROW_BYTES / 16;           // of a row
constexpr int COPY_ROWS = THREADS / CHUNKS;      // that all threads copy at once
constexpr int COPIES = TILE / COPY_ROWS;
constexpr int WARP_K = 32, WARP_V = 64;          // channels of a warp's products
constexpr int BLOCK = 64;                        // keys that share a scale, and values of a block
static_assert(HEAD_DIM / WARP_K * (HEAD_DIM / WARP_V) == WARPS && TILE == 4 * WARPS);

struct Stage {
#if INT8
    i8 k[TILE * HEAD_DIM];  // [TILE, HEAD_DIM], swizzled
#else
    u16 k[TILE * HEAD_DIM];  // [TILE, HEAD_DIM], swizzled; then their softmax
#endif
    u16 v[TILE * HEAD_DIM];
};

// Where all tiles are done, what warps found of each channel.
struct Ends {
    float normalizer[WARPS][HEAD_DIM];
    u32 maxima[COPY_ROWS][HEAD_DIM / 2];
};

#if INT8
struct Shared {
    Stage stages[STAGES];
    u16 phi[TILE * HEAD_DIM];  // [TILE, HEAD_DIM], swizzled, the softmax of keys
    float4 center[4][8];       // log2(e) times it, in the order of a key's eight lanes
    float farthest;            // of the center
};
#else
union Shared {
    Stage stages[STAGES];
    Ends ends;
};
#endif

struct Operands {
#if INT8
    const i8* k;           // [B, K_HEADS, N BLOCK, D], swizzled
    const float* k_scale;  // [B, K_HEADS, N]
    const u16* center;     // [B, K_HEADS, D]
    i8* values;            // [B, K_HEADS, N, D, BLOCK] e4m3 or float16, swizzled
    const float* bound;    // [B, H, D], what becomes VALUE_LIMIT
#else
    const u16* k;       // [B, L, H, D]
#endif
    const u16* v;       // [B, L, H, D]
    float* state;       // [splits, B, H, D (of k), D (of v)]
    float* normalizer;  // [splits, B, H, D]
    float* maxima;      // [splits, B, H, D]
    int length, heads, heads_in_all, rows;  // rows of a program
#if INT8
    int k_heads, k_blocks;  // N
#else
    int k_b, k_l, k_h;
#endif
    int v_b, v_l, v_h;
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

typedef float Sums[WARP_K / 16][WARP_V / 8][4];
typedef float Totals[WARP_K / 16][4];  // of the weights, in each of 8 columns

// Where a row's chunk lies: eight rows of the same chunk meet all banks.
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ row % 8) * 16;
}

// The address of a chunk `n` after that at `address`, whose number has zeros where n has ones.
__device__ __forceinline__ u32 chunks_on(u32 address, int n) { return address ^ n * 16; }

__device__ __forceinline__ uint4& chunk_at(u16* tile, int row, int chunk) {
    return *reinterpret_cast<uint4*>(reinterpret_cast<i8*>(tile) + swizzled(row, chunk));
}

// Starts the copies of a tile whose first row is `first`. Rows from `end` on become zeros.
#if INT8
__device__ __forceinline__ void copy_tile(
    Stage& stage, const i8* k, const u16* v, int first, int end, const Operands& o
) {
    int chunk = threadIdx.x % CHUNKS;
    static_assert(sizeof(Stage::k) == 16 * THREADS);
    copy_16(shared_address(stage.k) + 16 * threadIdx.x, k + (long long)first * HEAD_DIM + 16 * threadIdx.x);
#else
__device__ __forceinline__ void copy_tile(
    Stage& stage, const u16* k, const u16* v, int first, int end, const Operands& o
) {
    int chunk = threadIdx.x % CHUNKS;
#endif
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int in_tile = threadIdx.x / CHUNKS + i * COPY_ROWS, row = first + in_tile;
        long long from = min(row, o.length - 1);
        int bytes = row < end ? 16 : 0;
        u32 to = swizzled(in_tile, chunk);
#if !INT8
        copy_16(shared_address(stage.k) + to, k + from * o.k_l + 8 * chunk, bytes);
#endif
        copy_16(shared_address(stage.v) + to, v + from * o.v_l + 8 * chunk, bytes);
    }
}

#if INT8
// Puts the softmax of this lane's key, of which it takes an eighth, into phi.
__device__ __forceinline__ void weigh(
    Shared& shared, const Stage& stage, float scale, int row, int eighth, bool inside
) {
    float x[16];
    exponents(x, shared.center, stage.k, scale, row, eighth);
    weigh_key(x, are_far(scale, shared.farthest), inside);
#pragma unroll
    for (int i = 0; i < 2; i++)
        chunk_at(shared.phi, row, chunk_of(eighth, i)) = packed_chunk(x + 8 * i);
}

// Pairs that are at most `high` and at least minus it.
__device__ __forceinline__ u32 limited(u32 pair, u32 high, bool bf16) {
    return max_of_pairs(min_of_pairs(pair, high, bf16), high ^ 0x80008000, bf16);
}

// A warp's 16 channels of v in low bits, and their maxima: of channels 16 warp + 8 i + lane / 4.
// `half` of the block's keys are in this tile.
__device__ __forceinline__ void store_values(
    u32 (&maxima)[2], const Stage& stage, const float (&factors)[2], const u32 (&highs)[2],
    i8* block, int half, int warp, int lane
) {
    u32 from = shared_address(stage.v) + swizzled(lane, 2 * warp);
    u32 x[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 pairs[4];  // of keys 8 j + 2 (lane % 4) + {0, 1}
        load_matrices_transposed(pairs, chunks_on(from, i));
#pragma unroll
        for (int j = 0; j < 4; j++)
            maxima[i] = max_of_pairs(maxima[i], pairs[j] & 0x7fff7fff, BF16);
#if FP8
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float2 first = pair_of(limited(pairs[2 * j], highs[i], BF16), BF16);
            float2 second = pair_of(limited(pairs[2 * j + 1], highs[i], BF16), BF16);
            x[2 * i + j] = packed_fp8(first.x * factors[i], first.y * factors[i],
                                      second.x * factors[i], second.y * factors[i]);
        }
#else
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 both = pair_of(pairs[j], BF16);
            u32 scaled = packed_pair({both.x * factors[i], both.y * factors[i]}, false);
            x[j] = limited(scaled, highs[i], false);
        }
        transpose(x);  // 8 keys of a channel
        int channel = 16 * warp + 8 * i + lane / 4;
        u32 to = channel * (2 * BLOCK) + (lane % 4 ^ lane / 4) * 16;
        store_16(block + chunks_on(to, 4 * half), x);
#endif
    }
#if FP8
    transpose(x);  // 16 keys of a channel
    int channel = 16 * warp + lane % 4 / 2 * 8 + lane / 4;
    u32 to = channel * BLOCK + (lane % 2 ^ channel / 2 % 4) * 16;
    store_16(block + chunks_on(to, 2 * half), x);
#endif
}
#else
// The softmax of this lane's key, in its place: channels 8 (lane % 8) + {0 .. 7}, of both halves.
// Those past the end, zeros, weigh nothing.
__device__ __forceinline__ void weigh_key(
    Stage& stage, float (&normalizer)[16], int row, int eighth, bool inside
) {
    float x[16], high = -1e30f, sum = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 raw = chunk_at(stage.k, row, eighth + 8 * half);
        const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 both = pair_of(pairs[i], BF16);
            x[8 * half + 2 * i] = both.x, x[8 * half + 2 * i + 1] = both.y;
        }
    }
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
#endif

__device__ __forceinline__ void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (BF16)
        mma_bf16(sum, a, b0, b1);
    else
        mma_fp16(sum, a, b0, b1);
}

// sums += phi^T v of the tile. Both lie by keys, products want them by channels.
__device__ __forceinline__ void multiply(
    Sums& sums, Totals& totals, const u16* weights, const u16* values, int warp, int lane
) {
    int k_chunk = warp / 2 * (WARP_K / 8) + lane / 8 % 2, k_row = lane / 16 * 8 + lane % 8;
    int v_chunk = warp % 2 * (WARP_V / 8) + lane / 16, v_row = lane / 8 % 2 * 8 + lane % 8;
    u32 k_at = shared_address(weights) + swizzled(k_row, k_chunk);
    u32 v_at = shared_address(values) + swizzled(v_row, v_chunk);
#pragma unroll
    for (int key = 0; key < TILE; key += 16) {
        u32 phi[WARP_K / 16][4];
#pragma unroll
        for (int m = 0; m < WARP_K / 16; m++)
            load_matrices_transposed(phi[m], chunks_on(k_at, 2 * m) + key * ROW_BYTES);
#if INT8
        const u32 ones = BF16 ? 0x3f803f80 : 0x3c003c00;
#pragma unroll
        for (int m = 0; m < WARP_K / 16; m++) mma(totals[m], phi[m], ones, ones);
#endif
#pragma unroll
        for (int n = 0; n < WARP_V / 8; n += 2) {
            u32 v[4];
            load_matrices_transposed(v, chunks_on(v_at, n) + key * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < WARP_K / 16; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) mma(sums[m][n + i], phi[m], v[2 * i], v[2 * i + 1]);
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

#if INT8
// A warp's 32 channels, each in the first of four lanes.
__device__ __forceinline__ void store_totals(
    const Totals& totals, float* to, int warp, int lane
) {
    if (warp % 2 || lane % 4) return;
#pragma unroll
    for (int m = 0; m < WARP_K / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            to[warp / 2 * WARP_K + 16 * m + 8 * half + lane / 4] = totals[m][2 * half];
}
#else
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
#endif

#if INT8
extern "C" __global__ void __launch_bounds__(THREADS, 2) key_value_state(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(256) char memory[];  // see chunks_on
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // All heads of some rows run side by side: together they read whole rows.
    int whole_head = blockIdx.x % o.heads_in_all, sample = whole_head / o.heads;
    int head = whole_head % o.heads, k_head = sample * o.k_heads + head;
    int begin = blockIdx.x / o.heads_in_all * o.rows, end = min(begin + o.rows, o.length);
    int last = begin + (end - begin + BLOCK - 1) / BLOCK * BLOCK;  // of whole blocks
    long long first_block = (long long)k_head * o.k_blocks;
    const i8* k = o.k + first_block * (BLOCK * HEAD_DIM);
    const u16* v = o.v + sample * (long long)o.v_b + head * o.v_h;
    constexpr int value_bytes = BLOCK * HEAD_DIM * (FP8 ? 1 : 2);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (begin + i * TILE < last)
            copy_tile(shared.stages[i], k, v, begin + i * TILE, end, o);
        copy_commit();
    }
    if (warp == 0) shared.farthest = load_center(shared.center, o.center + k_head * HEAD_DIM);
    float factors[2];
    u32 highs[2];  // of two values, see store_values
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int channel = 16 * warp + 8 * i + lane / 4;
        float bound = o.bound[whole_head * HEAD_DIM + channel];
        factors[i] = __fdiv_rn(1.0f, bound) * VALUE_LIMIT;
        highs[i] = FP8 ? packed_pair({bound, bound}, BF16)
                       : packed_pair({VALUE_LIMIT, VALUE_LIMIT}, false);
    }
    float next_scale = o.k_scale[first_block + begin / BLOCK];
    Sums sums = {};
    Totals totals = {};
    u32 maxima[2] = {};
    int slot = 0, row = 4 * warp + lane / 8;
#pragma unroll 1
    for (int first = begin; first < last; first += TILE) {
        Stage& stage = shared.stages[slot];
        int block = first / BLOCK, ahead = first + (STAGES - 1) * TILE;
        float scale = LOG2E * next_scale;
        if (first + TILE < last) next_scale = o.k_scale[first_block + (first + TILE) / BLOCK];
        copy_wait<STAGES - 2>();
        __syncthreads();  // the tile is there, and all are done with the last one
        Stage& free = shared.stages[slot ? slot - 1 : STAGES - 1];
        if (ahead < last) copy_tile(free, k, v, ahead, end, o);
        copy_commit();
        weigh(shared, stage, scale, row, lane % 8, first + row < end);
        store_values(maxima, stage, factors, highs, o.values + (first_block + block) * value_bytes,
                     first / TILE % (BLOCK / TILE), warp, lane);
        __syncthreads();  // all of its weights are there
        multiply(sums, totals, shared.phi, stage.v, warp, lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    store_state(sums, o.state + (long long)blockIdx.x * HEAD_DIM * HEAD_DIM, warp, lane);
    store_totals(totals, o.normalizer + blockIdx.x * HEAD_DIM, warp, lane);
    store_maxima(maxima, o.maxima + blockIdx.x * HEAD_DIM, warp, lane);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 2) key_value_state(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(256) char memory[];  // see chunks_on
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
    Totals totals = {};
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
        multiply(sums, totals, stage.k, stage.v, warp, lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    store_state(sums, o.state + (long long)blockIdx.x * HEAD_DIM * HEAD_DIM, warp, lane);
    copy_wait<0>();
    __syncthreads();
    store_ends(shared.ends, normalizer, maxima, o, warp, lane);
}
#endif
