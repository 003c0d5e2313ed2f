// Sparse attention in low bits by mma.sync: int8 q k^T, fp8 or float16 weights and values.
//
// A program takes one query block of 128 rows, a warp 32 of them; two programs share a
// multiprocessor, and the products of one run beside the exponentials of the other. A warp holds
// all scores of a block, then their weights too, in the order in which the next product takes them.
// The block's values and the next keys are on their way meanwhile.
//
// The queries wait in shared memory and are read again for each block, 64 of their channels at a
// time, which leaves the scores room in registers.
//
// fp8 products, and float16 ones if SHORT_SUMS, add up in float16: consumer cards then multiply at
// twice the rate. A block's sums stay below the largest float16, see WEIGHT_LIMIT, and join float32
// sums at its end.
//
// Key blocks lie in memory as ldmatrix reads them, see `quantize` in mma.py.

// Defined are HEAD_DIM, 64 or 128; FP8, whether values are e4m3, else float16; SHORT_SUMS;
// VALUE_LIMIT, the largest value; BF16, whether rows are bfloat16, else float16.

#include "mma.cuh"

constexpr int BLOCK_Q = 128;
constexpr int BLOCK_K = 64;
constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int KEY_BYTES = BLOCK_K * HEAD_DIM;  // of a block
constexpr int VALUE_BYTES = KEY_BYTES * (FP8 ? 1 : 2);
constexpr int DEPTHS = FP8 ? 2 : 4;        // products along a block's keys, 32 bytes each
constexpr int HALVES = HEAD_DIM / 64;      // of the channels of queries and keys
constexpr bool SHORT = FP8 || SHORT_SUMS;  // whether values' products add up in float16
// Behind which steps of the scores' products the copies of values and of the next keys start: by
// trial, fp8's where few registers spill; never before what the first step reads, which would wait.
constexpr bool LATE = SHORT && !FP8 && HALVES == 2;
constexpr int VALUES_STEP = LATE ? 4 : 0, KEYS_STEP = VALUES_STEP + SHORT;
// Lifts the weights in e4m3, which goes from 2^-9 to 448: one may still exceed that of its row's
// row_max by a factor of 2^4.8, of 2^7 in float16, so that few blocks raise it.
constexpr float WEIGHT_SHIFT = 4.0f;
// What a block's weights may come to in each of the four threads of a row. Values go to
// VALUE_LIMIT, rounding adds at most 1/16: a block stays below 65504, the largest float16. No e4m3
// exceeds 448.
constexpr float WEIGHT_LIMIT = FP8 ? 448.0f : 2048.0f;
static_assert(4 * WEIGHT_LIMIT * VALUE_LIMIT * 17 / 16 < 65504);
// Scores add up on top of the bits of 1.5 * 2^23: read as float32 they are 1.5 * 2^23 + score.
constexpr int SCORE_ZERO = 0x4B400000;
constexpr float SCORE_ZERO_VALUE = 12582912.0f;
static_assert(127 * 127 * HEAD_DIM < 1 << 22);
constexpr int LOWEST_SCORE = 0x4B000000;

struct Shared {
    i8 queries[BLOCK_Q * HEAD_DIM];  // [BLOCK_Q, HEAD_DIM], swizzled; then the output
    i8 keys[2][KEY_BYTES];           // [BLOCK_K, HEAD_DIM] of this block and the next, swizzled
    i8 values[VALUE_BYTES];          // [HEAD_DIM, BLOCK_K], swizzled
    float scale[2];                  // of the keys
    int next[2];                     // right behind it: number of the block after those keys
};

struct Operands {
    const i8* q;           // [B, H, NQ, BLOCK_Q, D], zeros beyond L
    const float* q_scale;  // [B, H, NQ]
    const i8* k;           // [B, H, NK, BLOCK_K, D], zeros beyond L
    const float* k_scale;  // [B, H, NK]
    const i8* v;           // [B, H, NK, D, BLOCK_K] e4m3 or float16, zeros beyond L
    const float* v_scale;  // [B, H, D]
    const int* block_map;  // [B, H, NQ, count]
    u16* out;              // [B, L, H, D]
    int length, count, q_blocks, k_blocks, heads;
    int tiles;             // query blocks of all heads, B H NQ
    int add;               // whether to add to what is in out
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));
// The output goes through their memory, 16 rows of each warp at a time.
static_assert(WARPS * 16 * HEAD_DIM * 2 <= sizeof(Shared::queries));

// What a thread holds of its warp's 32 rows, 16 at a time, as products take and leave it.
typedef u32 Queries[2][2][4];            // [32, 64] int8
typedef int Scores[2][BLOCK_K / 8][4];   // [32, BLOCK_K]
typedef u32 Weights[DEPTHS][2][4];       // [32, BLOCK_K] e4m3 or float16
typedef float Sums[2][HEAD_DIM / 8][4];  // [32, HEAD_DIM]

// Where a lane's 16 bytes lie for `load_matrices`: four chunks of eight rows of WIDTH bytes.
// Rows of 128 bytes have eight chunks, whose second half is 64 bytes away, see `other_half`.
template <int WIDTH> __device__ __forceinline__ u32 swizzled(int lane) {
    int row = lane % 8, turn = WIDTH == 128 ? row : row / 2;
    return row * WIDTH + (lane / 8 ^ turn) * 16;
}

__device__ __forceinline__ u32 other_half(u32 address) { return address ^ 64; }

// ---- what comes from memory ----

// A warp copies its quarter: addresses a few hundred bytes apart take one sum.
__device__ __forceinline__ void copy_bytes(u32 to, const i8* from, int bytes) {
    int first = threadIdx.x / 32 * (bytes / WARPS) + threadIdx.x % 32 * 16;
    to += first;
    from += first;
#pragma unroll
    for (int i = 0; i < bytes / WARPS; i += 512) copy_16(to + i, from + i);
}

// Starts the copies of the keys of the i-th selected block, number `block` of all heads. Past the
// last one it is copied again, as a branch would cost more.
__device__ __forceinline__ void start_keys(
    Shared& shared, const Operands& o, const int* selected, int i, long long block
) {
    copy_bytes(shared_address(shared.keys[i % 2]), o.k + block * KEY_BYTES, KEY_BYTES);
    if (threadIdx.x == 0) {
        // One address for both, which is faster: nothing pads Shared.
        u32 scale = shared_address(&shared.scale[i % 2]), next = scale + sizeof(shared.scale);
        copy_4(scale, o.k_scale + block);
        copy_4(next, selected + min(i + 1, o.count - 1));
    }
}

// Where 16 bytes of a row of q lie: eight rows of the same chunk meet all banks.
__device__ __forceinline__ u32 query_place(int row, int chunk) {
    return row * HEAD_DIM + (chunk ^ row / (128 / HEAD_DIM) % (HEAD_DIM / 16)) * 16;
}

__device__ __forceinline__ void start_queries(Shared& shared, const i8* q) {
    constexpr int chunks = HEAD_DIM / 16;
#pragma unroll
    for (int first = 0; first < BLOCK_Q * chunks; first += THREADS) {
        int i = first + threadIdx.x;
        copy_16(shared_address(shared.queries) + query_place(i / chunks, i % chunks), q + 16 * i);
    }
}

// 64 channels of this warp's 32 rows of q; `from` is where the lane reads the first 32 of them.
__device__ __forceinline__ void load_queries(Queries& queries, u32 from) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int m = 0; m < 2; m++)
            load_matrices(queries[m][i], (from ^ 32 * i) + m * 16 * HEAD_DIM);
}

// ---- scores and weights ----

// Of rows lane / 4 + 8 r, r = 0 .. 3, of the warp. Weights are 2^(score - row_max + WEIGHT_SHIFT).
struct Rows {
    float row_max[4];  // raised only where weights exceed WEIGHT_LIMIT: scores may exceed it
    float row_sum[4];  // of the weights of this thread's keys
};

// Products come 16 keys or channels and 64 bytes of their rows at a time: four sums grow side by
// side, as a product waits for the last one of its sum. The next operands are on their way
// meanwhile.

// 64 bytes of the rows 16 group + {0 .. 15}; `rows` is where the lane reads those of the first.
template <int WIDTH>
__device__ __forceinline__ void load_operands(u32 (&x)[2][4], int group, u32 rows) {
#pragma unroll
    for (int n = 0; n < 2; n++) load_matrices(x[n], rows + (group * 2 + n) * 8 * WIDTH);
}

// x[m][n][i] is the score of row 16 m + lane / 4 + i / 2 * 8 and key 8 n + 2 (lane % 4) + i % 2.
// 64 channels of all keys come first, then the others, whose queries take their registers.
// `copy_values` and `copy_next_keys` start copies behind steps of their own, in this order: values
// are waited for alone.
template <typename First, typename Second>
__device__ __forceinline__ void multiply_keys(
    Scores& scores, u32 q, u32 keys, First copy_values, Second copy_next_keys
) {
    constexpr int groups = BLOCK_K / 16, steps = groups * HALVES;
    static_assert(VALUES_STEP <= KEYS_STEP && KEYS_STEP < steps);
    const int zero[4] = {SCORE_ZERO, SCORE_ZERO, SCORE_ZERO, SCORE_ZERO};
    u32 k[2][2][4];
    Queries queries[HALVES];
    load_queries(queries[0], q);
    load_operands<HEAD_DIM>(k[0], 0, keys);
#pragma unroll
    for (int step = 0; step < steps; step++) {
        int half = step / groups, group = step % groups, next = step + 1;
        if (next < steps)
            load_operands<HEAD_DIM>(k[next % 2], next % groups,
                                    next / groups ? other_half(keys) : keys);
        if (HALVES == 2 && next == groups) load_queries(queries[1], other_half(q));
        const u32(&own)[2][4] = k[step % 2];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    int(&sum)[4] = scores[m][group * 2 + n];
                    const u32(&of)[4] = queries[half][m][i];
                    if (half || i)
                        mma_int8(sum, of, own[n][2 * i], own[n][2 * i + 1], sum);
                    else
                        mma_int8(sum, of, own[n][2 * i], own[n][2 * i + 1], zero);
                }
        if (step == VALUES_STEP) copy_values();
        if (step == KEYS_STEP) copy_next_keys();
    }
}

__device__ __forceinline__ float score_of(int x) { return __int_as_float(x) - SCORE_ZERO_VALUE; }

#if !FP8
// Of a block's weights of a row in this thread, rounded as they are, so that the sum is of what the
// values are multiplied with. Beyond float16 it is infinite.
__device__ __forceinline__ float sum_of(const Weights& weights, int m, int half) {
    u32 sums[DEPTHS];
#pragma unroll
    for (int i = 0; i < DEPTHS; i++)
        sums[i] = sum_of_pairs(weights[i][m][half], weights[i][m][half + 2]);
    u32 sum = sum_of_pairs(sum_of_pairs(sums[0], sums[1]), sum_of_pairs(sums[2], sums[3]));
    float2 both = pair_of(sum, false);
    return both.x + both.y;
}
#endif

// The block's weights as the values' product takes them, and their sums in this thread. Those of
// keys past the end are 0 if ENDS.
template <bool ENDS>
__device__ __forceinline__ void weigh(
    Weights& weights, float (&sums)[4], const Scores& scores, float scale, const Rows& rows,
    int inside, int lane
) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int m = r / 2, half = r % 2;
        float shift = fmaf(-SCORE_ZERO_VALUE, scale, WEIGHT_SHIFT - rows.row_max[r]);
        float w[BLOCK_K / 8][2];
        sums[r] = 0;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = __int_as_float(scores[m][n][2 * half + i]);
                w[n][i] = exp2_fast(fmaf(x, scale, shift));
                if (ENDS && 8 * n + 2 * (lane % 4) + i >= inside) w[n][i] = 0;
                if (FP8) sums[r] += w[n][i];
            }
#if FP8
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; n += 2)
            weights[n / 4][m][half + n / 2 % 2 * 2] =
                packed_fp8(w[n][0], w[n][1], w[n + 1][0], w[n + 1][1]);
#else
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; n++)
            weights[n / 2][m][half + n % 2 * 2] = packed_pair({w[n][0], w[n][1]}, false);
        sums[r] = sum_of(weights, m, half);
#endif
    }
}

// The largest of what the four threads of a row hold.
__device__ __forceinline__ int max_of_row(int x) {
    x = max(x, __shfl_xor_sync(0xffffffff, x, 1));
    return max(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Raise row_max to what this block's scores do not exceed, and take along what is relative to it.
__device__ __forceinline__ void raise_row_max(
    Rows& rows, Sums& acc, const Scores& scores, float scale, int inside, int lane
) {
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int highest = LOWEST_SCORE;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (8 * n + 2 * (lane % 4) + i < inside)
                    highest = max(highest, scores[r / 2][n][2 * (r % 2) + i]);
        float raised = fmaxf(rows.row_max[r], scale * score_of(max_of_row(highest)));
        factor[r] = exp2_fast(rows.row_max[r] - raised);
        rows.row_max[r] = raised;
        rows.row_sum[r] *= factor[r];
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] *= factor[2 * m + i / 2];
}

// The weights of a block, of whose keys `inside` are not past the end.
__device__ __forceinline__ void weigh_block(
    Weights& weights, Rows& rows, Sums& acc, const Scores& scores, float scale, int inside, int lane
) {
    float sums[4];
    weigh<false>(weights, sums, scores, scale, rows, inside, lane);
    // No weight exceeds its sum. Beyond the limit row_max is too low.
    float most = fmaxf(fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3]));
    if (__any_sync(0xffffffff, most > WEIGHT_LIMIT) || inside < BLOCK_K) {
        raise_row_max(rows, acc, scores, scale, inside, lane);
        weigh<true>(weights, sums, scores, scale, rows, inside, lane);
    }
#pragma unroll
    for (int r = 0; r < 4; r++) rows.row_sum[r] += sums[r];
}

// ---- values ----

// Holds back the operands after the next ones, whose registers others need; with float32 sums at
// every other step, by trial.
__device__ __forceinline__ void keep_order() { __syncwarp(); }

// acc += weights v
__device__ __forceinline__ void multiply_values(Sums& acc, const Weights& weights, u32 values) {
    constexpr int width = VALUE_BYTES / HEAD_DIM, halves = width / 64;
    constexpr int steps = HEAD_DIM / 16 * halves;
    u32 v[2][2][4];
    load_operands<width>(v[0], 0, values);
#pragma unroll
    for (int pair = 0; pair < HEAD_DIM / 16; pair++) {
#if FP8 || SHORT_SUMS
        u32 sum[2][2][2] = {};
#endif
#pragma unroll
        for (int half = 0; half < halves; half++) {
            int step = pair * halves + half, next = step + 1;
            if (next < steps)
                load_operands<width>(v[next % 2], next / halves,
                                     next % halves ? other_half(values) : values);
            if (SHORT || half) keep_order();
            const u32(&own)[2][4] = v[step % 2];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const u32(&w)[4] = weights[2 * half + i][m];
#if FP8
                        mma_fp8_short(sum[m][n], w, own[n][2 * i], own[n][2 * i + 1], sum[m][n]);
#elif SHORT_SUMS
                        mma_fp16_short(sum[m][n], w, own[n][2 * i], own[n][2 * i + 1], sum[m][n]);
#else
                        mma_fp16(acc[m][2 * pair + n], w, own[n][2 * i], own[n][2 * i + 1]);
#endif
                    }
        }
#if FP8 || SHORT_SUMS
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 x = pair_of(sum[m][n][i], false);
                    acc[m][2 * pair + n][2 * i] += x.x;
                    acc[m][2 * pair + n][2 * i + 1] += x.y;
                }
#endif
    }
}

// ---- output ----

// Of 16 rows of the warp, in its part of shared memory: chunks of 16 bytes, swizzled by row.
__device__ __forceinline__ i8* staged(i8* tile, int row, int byte) {
    return tile + row * (2 * HEAD_DIM) + ((byte / 16) ^ row % 8) * 16 + byte % 16;
}

// Copies 16 rows between `out` and shared memory, whole lines at a time.
template <bool STORE>
__device__ __forceinline__ void move_rows(
    i8* tile, u16* out, int inside, long long stride, int lane
) {
    constexpr int chunks = HEAD_DIM / 8;
#pragma unroll
    for (int i = 0; i < 16 * chunks; i += 32) {
        int row = (i + lane) / chunks, chunk = (i + lane) % chunks;
        uint4* here = reinterpret_cast<uint4*>(staged(tile, row, 16 * chunk));
        uint4* there = reinterpret_cast<uint4*>(out + row * stride + 8 * chunk);
        if (row >= inside) continue;
        if (STORE)
            *there = *here;
        else
            *here = *there;
    }
}

// Writes 32 rows, on top of what waits in `out` if asked for; `inside` counts rows to the end.
__device__ __forceinline__ void store_rows(
    const Sums& acc, const Rows& rows, const float* v_scale, i8* tile,
    u16* out, int inside, long long stride, bool add, int lane
) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        u16* own = out + 16 * m * stride;
        __syncwarp();
        if (add) move_rows<false>(tile, own, inside - 16 * m, stride, lane);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float norm = 1.0f / sum_of_row(rows.row_sum[2 * m + half]);
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                int channel = 8 * n + 2 * (lane % 4);
                float2 scale = *reinterpret_cast<const float2*>(v_scale + channel);
                u32* place =
                    reinterpret_cast<u32*>(staged(tile, lane / 4 + 8 * half, 2 * channel));
                float2 x = {0, 0};
                if (add) x = pair_of(*place, BF16);
                x.x = fmaf(acc[m][n][2 * half] * norm, scale.x, x.x);
                x.y = fmaf(acc[m][n][2 * half + 1] * norm, scale.y, x.y);
                *place = packed_pair(x, BF16);
            }
        }
        __syncwarp();
        move_rows<true>(tile, own, inside - 16 * m, stride, lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sage_attention(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tile = blockIdx.x, head = tile / o.q_blocks;
    int first_block = head * o.k_blocks;
    const int* selected = o.block_map + (long long)tile * o.count;
    int own = selected[0];  // number of the block
    start_queries(shared, o.q + (long long)tile * BLOCK_Q * HEAD_DIM);
    start_keys(shared, o, selected, 0, first_block + own);
    copy_commit();
    float own_scale = o.q_scale[tile];
    Sums acc = {};
    Weights weights;
    Rows rows = {{-1e30f, -1e30f, -1e30f, -1e30f}, {0, 0, 0, 0}};
    u32 q = shared_address(shared.queries) + query_place(32 * warp + lane % 16, lane / 16);
    u32 keys = shared_address(shared.keys[0]) + swizzled<HEAD_DIM>(lane);
    u32 values = shared_address(shared.values) + swizzled<VALUE_BYTES / HEAD_DIM>(lane);
#pragma unroll 1
    for (int i = 0; i < o.count; i++) {
        copy_wait<0>();
        __syncthreads();  // these keys are there, and all are through with the last block
        u32 at = keys + i % 2 * KEY_BYTES;
        float scale = own_scale * shared.scale[i % 2];
        int next = shared.next[i % 2], inside = o.length - own * BLOCK_K;  // keys to the end
        Scores scores;
        multiply_keys(
            scores, q, at,
            [&] {
                const i8* v = o.v + (long long)(first_block + own) * VALUE_BYTES;
                copy_bytes(shared_address(shared.values), v, VALUE_BYTES);
                copy_commit();
            },
            [&] {
                own = next;
                start_keys(shared, o, selected, i + 1, first_block + own);
                copy_commit();
            }
        );
        weigh_block(weights, rows, acc, scores, scale, inside, lane);
        copy_wait<1>();
        __syncthreads();  // these values are there
        multiply_values(acc, weights, values);
    }
    copy_wait<0>();
    __syncthreads();
    int row = tile % o.q_blocks * BLOCK_Q + 32 * warp;
    long long stride = (long long)o.heads * HEAD_DIM;
    long long first_row = (long long)(head / o.heads) * o.length + row;
    store_rows(acc, rows, o.v_scale + (long long)head * HEAD_DIM,
               shared.queries + warp * 16 * HEAD_DIM * 2,
               o.out + first_row * stride + head % o.heads * HEAD_DIM, o.length - row, stride,
               o.add, lane);
}
