// Sparse attention in low bits for Hopper: int8 q k^T, fp8 weights and values, fp32 all else.
//
// A persistent program takes one query block of 128 rows after another, a tile. One warp copies the
// selected key blocks into a ring of stages, two more bring the next tile's queries. Two warpgroups
// take 64 query rows each. While a block is weighed, the product of the last one's weights with its
// values runs, and the scores of the next one; at a tile's end those of the next tile.
//
// Key blocks lie in memory as the tensor cores read them, see `quantize` in hopper.py.

// Defined is BF16, whether rows are bfloat16, else float16.

#include "hopper.cuh"

constexpr int HEAD_DIM = 128;
constexpr int BLOCK_Q = 128;
constexpr int BLOCK_K = 64;
constexpr int BLOCK_BYTES = BLOCK_K * HEAD_DIM;  // of keys and of values, a byte each
constexpr int STAGES = 7;
constexpr int CONSUMER_WARPS = 8;
constexpr int QUERY_WARPS = 2;
constexpr int THREADS = 32 * (CONSUMER_WARPS + 4);
constexpr int LOWEST_SCORE = -(1 << 30);
// fp8 products add up in about 14 bits; after so many blocks their sum is promoted to 24 bits.
constexpr int CHAIN = 32;
static_assert(CHAIN % 2 == 0);  // blocks go in pairs, the scores of one beside those of the next
// Lifts the weights in e4m3, which goes from 2^-9 to 448: scores may still exceed their row's
// row_max by a factor of 2^4.8, so that few blocks raise it.
constexpr float WEIGHT_SHIFT = 4.0f;
constexpr float WEIGHT_LIMIT = 448.0f;

struct Stage {
    i8 keys[BLOCK_BYTES];    // [BLOCK_K, HEAD_DIM], swizzled
    i8 values[BLOCK_BYTES];  // [HEAD_DIM, BLOCK_K] e4m3, swizzled
};

struct Shared {
    Stage stages[STAGES];
    i8 queries[2][2][64 * HEAD_DIM];  // of this tile and the next, [BLOCK_Q, HEAD_DIM], swizzled
    float4 promoted[16][32 * CONSUMER_WARPS];  // [BLOCK_Q, HEAD_DIM], a column for each thread
    u64 full[STAGES];
    u64 empty[STAGES];
    u64 q_full[2];  // the queries
    u64 q_empty[2];
    float scale[STAGES];  // of the keys
    int inside[STAGES];   // keys from the block's first to the end
    float q_scale[2];
};

struct Operands {
    const i8* q;           // [B, H, NQ, BLOCK_Q, D], zeros beyond L
    const float* q_scale;  // [B, H, NQ]
    const i8* k;           // [B, H, NK, BLOCK_K, D], zeros beyond L
    const float* k_scale;  // [B, H, NK]
    const i8* v;           // [B, H, NK, D, BLOCK_K] e4m3, zeros beyond L
    const float* v_scale;  // [B, H, D]
    const int* block_map;  // [B, H, NQ, count]
    u32* out;              // [B, L, H, D], pairs of 16 bits
    int length, count, q_blocks, k_blocks, heads;
    int tiles;             // query blocks of all heads, B H NQ
    int add;               // whether to add to what is in out
};

static_assert(SHARED_BYTES == SWIZZLE_ALIGNMENT + sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

__device__ __forceinline__ void copy_block(void* to, const void* from, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(to)), "l"(from), "r"(BLOCK_BYTES), "r"(shared_address(barrier))
        : "memory");
}

// ---- products ----

// scores [64 rows, 64 keys] (+)= q [64, 32] k^T, both in shared memory
__device__ __forceinline__ void mma_scores(int (&scores)[32], u64 queries, u64 keys, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p;\n"
        "}\n"
        : R16(scores, 0), R16(scores, 16)
        : "l"(queries), "l"(keys), "r"(add));
}

// acc [64 rows, 128 channels] (+)= weights [64, 32 keys] v
__device__ __forceinline__ void mma_values(
    float (&acc)[64], const u32* weights, u64 values, int add
) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1;\n"
        "}\n"
        : F16(acc, 0), F16(acc, 16), F16(acc, 32), F16(acc, 48)
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values),
          "r"(add));
}

// ---- arithmetic ----

// Four weights as e4m3, the first in the lowest byte.
__device__ __forceinline__ u32 pack_fp8(float a, float b, float c, float d) {
    u32 packed;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed;
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

// ---- the two roles ----

__device__ __forceinline__ void produce(Shared& shared, const Operands& o) {
    int lane = threadIdx.x % 32;
    Ring<STAGES> ring;
    for (int tile = blockIdx.x; tile < o.tiles; tile += gridDim.x) {
        long long first_block = (long long)(tile / o.q_blocks) * o.k_blocks;
        const int* selected = o.block_map + (long long)tile * o.count;
#pragma unroll 1
        for (int base = 0; base < o.count; base += 32) {
            // 32 blocks' numbers and scales at a time: one by one each would wait for memory.
            int many = min(32, o.count - base);
            int block = lane < many ? selected[base + lane] : 0;
            float scale = o.k_scale[first_block + block];
#pragma unroll 1
            for (int i = 0; i < many; i++) {
                int own = __shfl_sync(0xffffffff, block, i);
                float own_scale = __shfl_sync(0xffffffff, scale, i);
                if (lane == 0) {
                    u64* empty = &shared.empty[ring.stage];
                    while (!barrier_passed(empty, ring.parity ^ 1)) __nanosleep(100);
                    shared.scale[ring.stage] = own_scale;
                    shared.inside[ring.stage] = o.length - own * BLOCK_K;
                    u64* full = &shared.full[ring.stage];
                    barrier_expect(full, 2 * BLOCK_BYTES);
                    long long offset = (first_block + own) * BLOCK_BYTES;
                    copy_block(shared.stages[ring.stage].keys, o.k + offset, full);
                    copy_block(shared.stages[ring.stage].values, o.v + offset, full);
                }
                __syncwarp();
                ring.next();
            }
        }
    }
}

__device__ __forceinline__ void start_scores(int (&scores)[32], u64 queries, const Stage& stage) {
    u64 keys = matrix_descriptor(stage.keys, 128);
    hold(scores);
    mma_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) mma_scores(scores, queries + 2 * i, keys + 2 * i, i);
    mma_commit();
    hold(scores);
}

// Two warps bring the next tile's queries, swizzled like the keys, while this one's are multiplied.
__device__ __forceinline__ void produce_queries(Shared& shared, const Operands& o) {
    int thread = threadIdx.x - 32 * (CONSUMER_WARPS + 1);
    Ring<2> ring;
    for (int tile = blockIdx.x; tile < o.tiles; tile += gridDim.x) {
        while (!barrier_passed(&shared.q_empty[ring.stage], ring.parity ^ 1)) __nanosleep(100);
        const i8* q = o.q + (long long)tile * BLOCK_Q * HEAD_DIM + thread * 16;
        int row = thread / 8, chunk = thread % 8;
        u32 to = shared_address(shared.queries[ring.stage]) + row * HEAD_DIM + (chunk ^ row) * 16;
#pragma unroll 4
        for (int i = 0; i < BLOCK_Q * HEAD_DIM; i += 32 * QUERY_WARPS * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(q + i)
                         : "memory");
        if (thread == 0) shared.q_scale[ring.stage] = o.q_scale[tile];
        asm volatile("cp.async.wait_all;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(&shared.q_full[ring.stage]);
        ring.next();
    }
}

// A thread holds, of rows r = lane / 4 and r + 8 of its warp's 16, keys (or channels)
// 8 j + 2 (lane % 4) + {0, 1} in x[4 j], x[4 j + 1] and in x[4 j + 2], x[4 j + 3].
__device__ __forceinline__ int key_of(int index, int pair) {
    return 8 * (index / 4) + 2 * pair + index % 2;
}

// What a thread knows of its two rows. Weights are 2^(score - row_max + WEIGHT_SHIFT).
struct Rows {
    float row_max[2];  // raised only where weights would leave e4m3: scores may exceed it
    float row_sum[2];
    float rescale[2];  // factors that what is promoted lacks
};

__device__ __forceinline__ int highest(const int (&scores)[32], int row) {
    int high = scores[2 * row];
#pragma unroll
    for (int j = 0; j < 32; j += 4)
        high = max(high, max(scores[j + 2 * row], scores[j + 2 * row + 1]));
    return high;
}

// What of the thread's rows is promoted to 24 bits, in shared memory, four at a time.
__device__ __forceinline__ float4& promoted(Shared& shared, int i) {
    return shared.promoted[i][threadIdx.x];
}

// The sums so far, with what is promoted if there is any.
__device__ __forceinline__ float4 with_promoted(
    Shared& shared, const float (&acc)[64], const Rows& rows, int i, bool any
) {
    float4 x = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
    if (any) {
        float4 sum = promoted(shared, i);
        x.x = fmaf(sum.x, rows.rescale[0], x.x), x.y = fmaf(sum.y, rows.rescale[0], x.y);
        x.z = fmaf(sum.z, rows.rescale[1], x.z), x.w = fmaf(sum.w, rows.rescale[1], x.w);
    }
    return x;
}

__device__ __forceinline__ void promote(
    Shared& shared, const float (&acc)[64], Rows& rows, bool any
) {
#pragma unroll
    for (int i = 0; i < 16; i++) promoted(shared, i) = with_promoted(shared, acc, rows, i, any);
    rows.rescale[0] = rows.rescale[1] = 1;
}

// The weights of the scores as e4m3, in the order that a product takes, and their totals.
__device__ __forceinline__ void weigh(
    u32 (&weights)[8], float (&block_sum)[2], const int (&scores)[32], float scale,
    const Rows& rows
) {
    float shift[2] = {WEIGHT_SHIFT - rows.row_max[0], WEIGHT_SHIFT - rows.row_max[1]};
    float w[32];
    block_sum[0] = block_sum[1] = 0;
#pragma unroll
    for (int j = 0; j < 32; j++) {
        w[j] = exp2_fast(fmaf(scores[j], scale, shift[j % 4 / 2]));
        block_sum[j % 4 / 2] += w[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        // Keys 16 j + 2 pair + {0, 1} and, 8 further, two more: v's rows lie in this order.
        float* of_16 = w + 8 * j;
        int half = 4 * (j / 2) + 2 * (j % 2);
        weights[half] = pack_fp8(of_16[0], of_16[1], of_16[4], of_16[5]);
        weights[half + 1] = pack_fp8(of_16[2], of_16[3], of_16[6], of_16[7]);
    }
}

// Rescale to a row_max that this block's scores do not exceed; hide keys past the end.
__device__ __forceinline__ void raise_row_max(
    int (&scores)[32], float (&acc)[64], Rows& rows, float scale, int inside, int pair
) {
    float factor[2];
#pragma unroll
    for (int j = 0; j < 32; j++)
        if (key_of(j, pair) >= inside) scores[j] = LOWEST_SCORE;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float raised = fmaxf(rows.row_max[row], scale * max_of_row(highest(scores, row)));
        factor[row] = exp2_fast(rows.row_max[row] - raised);
        rows.row_max[row] = raised;
        rows.row_sum[row] *= factor[row];
        rows.rescale[row] *= factor[row];
    }
#pragma unroll
    for (int i = 0; i < 64; i++) acc[i] *= factor[i % 4 / 2];
}

// Hidden keys weigh nothing unless the scores are tiny. Their values are zeros: only totals see.
__device__ __forceinline__ void leave_out_hidden(
    float (&block_sum)[2], float scale, const Rows& rows, int inside, int pair
) {
    int hidden = 0;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
        hidden += key_of(j, pair) >= inside;
        hidden += key_of(j + 1, pair) >= inside;
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float shift = WEIGHT_SHIFT - rows.row_max[row];
        block_sum[row] -= hidden * exp2_fast(fmaf(LOWEST_SCORE, scale, shift));
    }
}

// A key block whose copy has arrived, or is on its way.
struct Block {
    int stage;
    float scale;
    int inside;
};

__device__ __forceinline__ Block block_in(const Shared& shared, int stage) {
    return {stage, shared.scale[stage], shared.inside[stage]};
}

// One key block, whose scores are there: weigh them, then start the product with its values and
// the scores of the block after the next one in their place. Meanwhile the products of the last
// step run, `last_weights` with the last block's values and the next block's scores.
__device__ __forceinline__ void step(
    Shared& shared, int (&scores)[32], int (&next_scores)[32], u32 (&weights)[8],
    u32 (&last_weights)[8], float (&acc)[64], Rows& rows, u64 queries, Ring<STAGES>& ring,
    Block& block, Block& next, bool& arrived, int& previous, float own_scale, bool add, bool more
) {
    int lane = threadIdx.x % 32, pair = lane % 4, stage = block.stage, inside = block.inside;
    float scale = own_scale * block.scale;
    float block_sum[2];
    weigh(weights, block_sum, scores, scale, rows);
    // No weight exceeds the total of its row. Beyond e4m3 row_max is too low.
    bool over = fmaxf(block_sum[0], block_sum[1]) > WEIGHT_LIMIT;
    if (__any_sync(0xffffffff, over) || inside < BLOCK_K) {
        mma_wait<0>();
        hold(acc);
        raise_row_max(scores, acc, rows, scale, inside, pair);
        weigh(weights, block_sum, scores, scale, rows);
        leave_out_hidden(block_sum, scale, rows, inside, pair);
    }
    mma_wait<0>();  // the last step's
    hold(acc);
    hold(next_scores);
    hold(last_weights);
    if (previous >= 0 && lane == 0) barrier_arrive(&shared.empty[previous]);
    previous = stage;
    rows.row_sum[0] += block_sum[0];
    rows.row_sum[1] += block_sum[1];
    block = next;
    // Past the program's last block it multiplies that again: no branch around a product.
    int after = more ? ring.stage : next.stage;
    if (more && !arrived) barrier_wait(&shared.full[after], ring.parity);
    next = block_in(shared, after);
    u64 keys = matrix_descriptor(shared.stages[after].keys, 128);
    u64 values = matrix_descriptor(shared.stages[stage].values, 64);
    hold(scores);
    hold(acc);
    hold(weights);
    mma_begin();
    mma_values(acc, weights, values, add);
    mma_values(acc, weights + 4, values + 2, 1);
#pragma unroll
    for (int i = 0; i < 4; i++) mma_scores(scores, queries + 2 * i, keys + 2 * i, i);
    mma_commit();
    hold(scores);
    hold(acc);
    if (more) ring.next();
    arrived = __all_sync(0xffffffff, barrier_passed(&shared.full[ring.stage], ring.parity));
}

__device__ __forceinline__ void prefetch(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// Bring what the end of this tile reads into the cache.
__device__ __forceinline__ void prefetch_tile(
    const u32* out, int row, int pair, int inside, int row_words, bool add
) {
#pragma unroll
    for (int half = 0; half < 16; half += 8)
        if (add && pair < 2 && row + half < inside)
            prefetch(out + (long long)(row + half) * row_words + pair * 32);
}

// Of 32 channels a thread has eight that lie side by side, see `quantize` in hopper.py.
__device__ __forceinline__ void store_tile(
    Shared& shared, const float (&acc)[64], const Rows& rows, const float* v_scale, u32* out,
    int row, int pair, int inside, int row_words, bool add, bool any_promoted
) {
    const float4* scales = reinterpret_cast<const float4*>(v_scale) + 2 * pair;
    float4 channels[8];
#pragma unroll
    for (int i = 0; i < 8; i++) channels[i] = scales[i / 2 * 8 + i % 2];
    float norm0 = 1.0f / sum_of_row(rows.row_sum[0]), norm1 = 1.0f / sum_of_row(rows.row_sum[1]);
    uint4* out0 = reinterpret_cast<uint4*>(out + (long long)row * row_words) + pair;
    uint4* out1 = out0 + 2 * (long long)row_words;
    uint4 there[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (add && row < inside) there[0][i] = out0[4 * i];
        if (add && row + 8 < inside) there[1][i] = out1[4 * i];
    }
    u32 *there0 = &there[0][0].x, *there1 = &there[1][0].x;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        float4 x = with_promoted(shared, acc, rows, j, any_promoted), both = channels[j / 2];
        float2 scale = j % 2 ? make_float2(both.z, both.w) : make_float2(both.x, both.y);
        float2 a = pair_of(there0[j], BF16), b = pair_of(there1[j], BF16);
        a.x = fmaf(x.x * norm0, scale.x, a.x), a.y = fmaf(x.y * norm0, scale.y, a.y);
        b.x = fmaf(x.z * norm1, scale.x, b.x), b.y = fmaf(x.w * norm1, scale.y, b.y);
        there0[j] = packed_pair(a, BF16), there1[j] = packed_pair(b, BF16);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (row < inside) store_16(out0 + 4 * i, there0 + 4 * i);
        if (row + 8 < inside) store_16(out1 + 4 * i, there1 + 4 * i);
    }
}

// Scores that are there trade places.
__device__ __forceinline__ void swap(int (&a)[32], int (&b)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int x = a[i];
        a[i] = b[i], b[i] = x;
    }
}

__device__ __forceinline__ void consume(Shared& shared, const Operands& o) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, pair = lane % 4;
    // The same in a warp, as only a shuffle tells the compiler.
    int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    // Of a warpgroup, two of each because the next block's scores come while these weigh:
    int scores[32], other_scores[32];             // [64, BLOCK_K]
    u32 weights[8] = {}, other_weights[8] = {};   // [64, BLOCK_K] e4m3
    float acc[64];                                // [64, HEAD_DIM], of CHAIN blocks at most
    Ring<STAGES> ring;
    Ring<2> q_ring;
    barrier_wait(&shared.q_full[0], 0);
    barrier_wait(&shared.full[0], 0);
    u64 queries = matrix_descriptor(shared.queries[0][group], 128);
    Block block = block_in(shared, 0);
    start_scores(scores, queries, shared.stages[0]);
    ring.next();
    // A lone block is taken twice: such a program has a single tile.
    bool lone = o.count == 1;
    if (!lone) barrier_wait(&shared.full[1], 0);
    Block next_block = lone ? block : block_in(shared, 1);
    start_scores(other_scores, queries, shared.stages[next_block.stage]);
    if (!lone) ring.next();
    mma_wait<0>();
    hold(scores);
    hold(other_scores);
    bool arrived = false;
    for (int tile = blockIdx.x; tile < o.tiles; tile += gridDim.x) {
        int head = tile / o.q_blocks, first_row = tile % o.q_blocks * BLOCK_Q;
        long long place = ((long long)(head / o.heads) * o.length + first_row) * o.heads
            + head % o.heads;
        u32* out = o.out + place * (HEAD_DIM / 2);
        prefetch_tile(out, row, pair, o.length - first_row, o.heads * (HEAD_DIM / 2), o.add);
        float own_scale = shared.q_scale[q_ring.stage];
        u64* q_empty = &shared.q_empty[q_ring.stage];
        u64 own_queries = queries;
        q_ring.next();
        bool last_tile = tile + gridDim.x >= o.tiles;
        if (!last_tile) queries = matrix_descriptor(shared.queries[q_ring.stage][group], 128);
        Rows rows = {{-1e30f, -1e30f}, {0, 0}, {1, 1}};
#pragma unroll
        for (int i = 0; i < 64; i++) acc[i] = 0;
        int previous = -1, first = 0;
// Weighs the tile's block i; the scores two blocks later may be the next tile's. A macro: with a
// lambda, and a struct of places for the end, ptxas chose other registers, up to 5 % slower.
#define STEP(i, own, other, of_own, of_other, add)                                           \
    {                                                                                        \
        bool of_tile = i + 2 < o.count;                                                      \
        if (i + 2 == o.count && !last_tile)                                                  \
            barrier_wait(&shared.q_full[q_ring.stage], q_ring.parity);                       \
        step(shared, own, other, of_own, of_other, acc, rows, of_tile ? own_queries : queries, \
             ring, block, next_block, arrived, previous, own_scale, add, of_tile || !last_tile); \
    }
#pragma unroll 1
        for (;; first += CHAIN) {
            int end = min(o.count, first + CHAIN), i = first;
#pragma unroll 1
            for (; i + 1 < end; i += 2) {
                STEP(i, scores, other_scores, weights, other_weights, i > first)
                STEP(i + 1, other_scores, scores, other_weights, weights, true)
            }
            if (i < end) STEP(i, scores, other_scores, weights, other_weights, i > first)
            mma_wait<0>();
            hold(acc);
            hold(scores);
            hold(other_scores);
            hold(weights);
            hold(other_weights);
            if (end == o.count) break;
            promote(shared, acc, rows, first > 0);
        }
        if (lane == 0) barrier_arrive(&shared.empty[previous]);
        if (lane == 0) barrier_arrive(q_empty);
        store_tile(shared, acc, rows, o.v_scale + (long long)head * HEAD_DIM, out, row, pair,
                   o.length - first_row, o.heads * (HEAD_DIM / 2), o.add, first > 0);
        if (o.count % 2) swap(scores, other_scores);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sage_attention(
    const __grid_constant__ Operands o
) {
    extern __shared__ char memory[];
    Shared& shared = *static_cast<Shared*>(aligned_for_swizzle(memory));
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], CONSUMER_WARPS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&shared.q_full[i], QUERY_WARPS);
            barrier_init(&shared.q_empty[i], CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // All registers of the program, 384 times 168: for one more each it would wait for ever.
    if (threadIdx.x < 32 * CONSUMER_WARPS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        consume(shared, o);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 32 * (CONSUMER_WARPS + 1))
            produce(shared, o);
        else if (threadIdx.x < 32 * (CONSUMER_WARPS + 1 + QUERY_WARPS))
            produce_queries(shared, o);
    }
}
