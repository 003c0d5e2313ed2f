// Sparse attention in low bits by mma.sync: int8 q k^T, fp8 or float16 weights and values.
//
// A program takes one query block of 128 rows, a warp 32 of them; two programs share a
// multiprocessor, and the products of one run beside the exponentials of the other. Of a block's
// scores a warp holds those of 32 keys at a time, then only their weights, in the order in which
// the next product takes them. The block's values and the next keys are on their way meanwhile.
//
// The queries wait in shared memory and are read again for each block: while weights are multiplied
// with values, their 32 registers hold what comes next from there.
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
constexpr int PART = 32;  // keys whose scores a warp holds at once
constexpr int PARTS = BLOCK_K / PART;
constexpr int DEPTHS = FP8 ? 1 : 2;  // products along a part's keys, 32 bytes each
// Lifts the weights in e4m3, which goes from 2^-9 to 448: scores may still exceed their row's
// row_max by a factor of 2^4.8, so that few blocks raise it.
constexpr float WEIGHT_SHIFT = 4.0f;
// What the weights of a part may come to in each of the four threads of a row. Values go to
// VALUE_LIMIT, rounding adds at most 1/16: a block stays below 65504, the largest float16.
constexpr float WEIGHT_LIMIT = 448.0f;
static_assert(PARTS * 4 * WEIGHT_LIMIT * VALUE_LIMIT * 17 / 16 < 65504);
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
    int next[2];                     // number of the block after them: not waited for
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
typedef u32 Queries[2][HEAD_DIM / 32][4];   // [32, HEAD_DIM] int8
typedef int Scores[2][PART / 8][4];         // [32, PART]
typedef u32 Weights[PARTS * DEPTHS][2][4];  // [32, BLOCK_K] e4m3 or float16
typedef float Sums[2][HEAD_DIM / 8][4];     // [32, HEAD_DIM]

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
        copy_4(shared_address(&shared.scale[i % 2]), o.k_scale + block);
        copy_4(shared_address(&shared.next[i % 2]), selected + min(i + 1, o.count - 1));
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

// This warp's 32 rows of q; `from` is where the lane reads the first 32 bytes of them.
__device__ __forceinline__ void load_queries(Queries& queries, u32 from) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++)
#pragma unroll
        for (int m = 0; m < 2; m++)
            load_matrices(queries[m][i], (from ^ 32 * i) + m * 16 * HEAD_DIM);
}

// ---- scores and weights ----

// Of rows lane / 4 + 8 r, r = 0 .. 3, of the warp. Weights are 2^(score - row_max + WEIGHT_SHIFT).
struct Rows {
    float row_max[4];  // raised only where weights would leave e4m3: scores may exceed it
    float row_sum[4];  // of the weights of this thread's keys
};

// Products come 16 keys or channels and 64 bytes of their rows at a time: four sums grow side by
// side, as a product waits for the last one of its sum. The next operands are on their way
// meanwhile. `keep_order` holds back those after them, whose registers others need.
__device__ __forceinline__ void keep_order() { __syncwarp(); }

// Rows of `step`, each of HALVES times 64 bytes.
template <int HALVES, int WIDTH>
__device__ __forceinline__ void load_operands(u32 (&x)[2][4], int step, u32 rows) {
    u32 from = step % HALVES ? other_half(rows) : rows;
#pragma unroll
    for (int n = 0; n < 2; n++)
        load_matrices(x[n], from + (step / HALVES * 2 + n) * 8 * WIDTH);
}

// x[m][n][i] is the score of row 16 m + lane / 4 + i / 2 * 8 and key 8 n + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void multiply_keys(
    Scores& scores, const Queries& queries, u32 keys
) {
    constexpr int halves = HEAD_DIM / 64, steps = PART / 16 * halves;
    const int zero[4] = {SCORE_ZERO, SCORE_ZERO, SCORE_ZERO, SCORE_ZERO};
    u32 k[2][2][4];
    load_operands<halves, HEAD_DIM>(k[0], 0, keys);
#pragma unroll
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps)
            load_operands<halves, HEAD_DIM>(k[(step + 1) % 2], step + 1, keys);
        keep_order();
        const u32(&own)[2][4] = k[step % 2];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    int(&sum)[4] = scores[m][step / halves * 2 + n];
                    const u32(&q)[4] = queries[m][step % halves * 2 + i];
                    if (step % halves || i)
                        mma_int8(sum, q, own[n][2 * i], own[n][2 * i + 1], sum);
                    else
                        mma_int8(sum, q, own[n][2 * i], own[n][2 * i + 1], zero);
                }
    }
}

__device__ __forceinline__ float score_of(int x) { return __int_as_float(x) - SCORE_ZERO_VALUE; }

// The part's weights as the values' product takes them, and their sums in this thread. Those of
// keys past the end are 0 if ENDS.
template <bool ENDS>
__device__ __forceinline__ void weigh(
    u32 (&weights)[DEPTHS][2][4], float (&sums)[4], const Scores& scores, float scale,
    const Rows& rows, int inside, int lane
) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int m = r / 2, half = r % 2;
        float shift = fmaf(-SCORE_ZERO_VALUE, scale, WEIGHT_SHIFT - rows.row_max[r]);
        float w[PART / 8][2];
        sums[r] = 0;
#pragma unroll
        for (int n = 0; n < PART / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = __int_as_float(scores[m][n][2 * half + i]);
                w[n][i] = exp2_fast(fmaf(x, scale, shift));
                if (ENDS && 8 * n + 2 * (lane % 4) + i >= inside) w[n][i] = 0;
                sums[r] += w[n][i];
            }
#if FP8
        weights[0][m][half] = packed_fp8(w[0][0], w[0][1], w[1][0], w[1][1]);
        weights[0][m][half + 2] = packed_fp8(w[2][0], w[2][1], w[3][0], w[3][1]);
#else
#pragma unroll
        for (int n = 0; n < PART / 8; n++)
            weights[n / 2][m][half + n % 2 * 2] = packed_pair({w[n][0], w[n][1]}, false);
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

// Weights of `packed` times a factor of their row.
__device__ __forceinline__ u32 scaled_weights(u32 packed, float factor) {
#if FP8
    float2 low = pair_of(pair_of_fp8(packed), false);
    float2 high = pair_of(pair_of_fp8(packed >> 16), false);
    return packed_fp8(low.x * factor, low.y * factor, high.x * factor, high.y * factor);
#else
    float2 both = pair_of(packed, false);
    return packed_pair({both.x * factor, both.y * factor}, false);
#endif
}

// Raise row_max to what this part's scores do not exceed, and take along what is relative to it:
// the sums, and the block's first DONE depths of weights.
template <int DONE>
__device__ __forceinline__ void raise_row_max(
    Rows& rows, Sums& acc, Weights& weights,
    const Scores& scores, float scale, int inside, int lane
) {
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int highest = LOWEST_SCORE;
#pragma unroll
        for (int n = 0; n < PART / 8; n++)
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
#pragma unroll
    for (int depth = 0; depth < DONE; depth++)
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                weights[depth][m][i] = scaled_weights(weights[depth][m][i], factor[2 * m + i % 2]);
}

// The scores and weights of one part of a block's keys.
template <int NUMBER>
__device__ __forceinline__ void weigh_part(
    Weights& weights, Rows& rows, Sums& acc, const Scores& scores, float scale,
    int inside, int lane
) {
    inside -= NUMBER * PART;
    float sums[4];
    auto& own = reinterpret_cast<u32(&)[DEPTHS][2][4]>(weights[NUMBER * DEPTHS]);
    weigh<false>(own, sums, scores, scale, rows, inside, lane);
    // No weight exceeds its sum. Beyond the limit row_max is too low.
    float most = fmaxf(fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3]));
    if (__any_sync(0xffffffff, most > WEIGHT_LIMIT) || inside < PART) {
        raise_row_max<NUMBER * DEPTHS>(rows, acc, weights, scores, scale, inside, lane);
        weigh<true>(own, sums, scores, scale, rows, inside, lane);
    }
#pragma unroll
    for (int r = 0; r < 4; r++) rows.row_sum[r] += sums[r];
}

// ---- values ----

// acc += weights v
__device__ __forceinline__ void multiply_values(Sums& acc, const Weights& weights, u32 values) {
    constexpr int width = VALUE_BYTES / HEAD_DIM, halves = width / 64;
    constexpr int steps = HEAD_DIM / 16 * halves;
    u32 v[2][2][4];
    load_operands<halves, width>(v[0], 0, values);
#pragma unroll
    for (int pair = 0; pair < HEAD_DIM / 16; pair++) {
#if FP8 || SHORT_SUMS
        u32 sum[2][2][2] = {};
#endif
#pragma unroll
        for (int half = 0; half < halves; half++) {
            int step = pair * halves + half;
            if (step + 1 < steps)
                load_operands<halves, width>(v[(step + 1) % 2], step + 1, values);
            keep_order();
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
        Queries queries;
        load_queries(queries, q);
        Scores scores;
        multiply_keys(scores, queries, at);
        // Behind what the first products read: that would wait for copies before it.
        const i8* v = o.v + (long long)(first_block + own) * VALUE_BYTES;
        copy_bytes(shared_address(shared.values), v, VALUE_BYTES);
        copy_commit();
        int inside = o.length - own * BLOCK_K;  // keys from the block's first to the end
        own = shared.next[i % 2];
        start_keys(shared, o, selected, i + 1, first_block + own);
        copy_commit();
        weigh_part<0>(weights, rows, acc, scores, scale, inside, lane);
        multiply_keys(scores, queries, at + PART * HEAD_DIM);
        weigh_part<1>(weights, rows, acc, scores, scale, inside, lane);
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
