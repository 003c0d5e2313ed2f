// Sparse attention in low bits for Hopper: int8 q k^T, fp8 weights and values, fp32 all else.
//
// A persistent program takes one query block of 128 rows after another. One warp copies the
// selected key blocks into a ring of stages; two warpgroups take 64 query rows each: while one
// waits for the tensor cores, the other computes its exponentials, which bound the whole.
//
// Key blocks lie in memory as the tensor cores read them, see `quantize` in hopper.py.

#include "hopper.cuh"

constexpr int HEAD_DIM = 128;
constexpr int BLOCK_Q = 128;
constexpr int BLOCK_K = 64;
constexpr int BLOCK_BYTES = BLOCK_K * HEAD_DIM;  // of keys and of values, a byte each
constexpr int STAGES = 7;
constexpr int CONSUMER_WARPS = 8;
constexpr int LOWEST_SCORE = -(1 << 30);
// fp8 products add up in about 14 bits; after so many blocks their sum moves on to 24 bits.
constexpr int CHAIN = 32;
static_assert(CHAIN % 2 == 0);  // blocks go in pairs, the scores of one beside those of the next
// Lifts the weights in e4m3, which goes from 2^-9 to 448: scores may still exceed their row's
// reference by a factor of 2^4.8, so that few blocks raise it.
constexpr float WEIGHT_SHIFT = 4.0f;
constexpr float WEIGHT_LIMIT = 448.0f;

struct Stage {
    i8 keys[BLOCK_BYTES];
    i8 values[BLOCK_BYTES];
};

struct Shared {
    Stage stages[STAGES];
    i8 queries[2][64 * HEAD_DIM];
    float4 sums[16][32 * CONSUMER_WARPS];
    u64 full[STAGES];
    u64 empty[STAGES];
    float scale[STAGES];  // of the keys
    int inside[STAGES];   // keys from the block's first to the end
};

__device__ __forceinline__ void copy_block(void* to, const void* from, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(to)), "l"(from), "r"(BLOCK_BYTES), "r"(shared_address(barrier))
        : "memory");
}

// ---- products ----

// scores [64 rows, 64 keys] (+)= q [64, 32] k^T, both in shared memory
__device__ __forceinline__ void mma_scores(int (&d)[32], u64 queries, u64 keys, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p;\n"
        "}\n"
        : R16(d, 0), R16(d, 16)
        : "l"(queries), "l"(keys), "r"(add));
}

// sums [64 rows, 128 channels] (+)= weights [64, 32 keys] v
__device__ __forceinline__ void mma_values(float (&d)[64], const u32* a, u64 values, int add) {
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
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(values), "r"(add));
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

__device__ __forceinline__ void produce(
    Shared& shared, const i8* k, const float* k_scale, const i8* v, const int* block_map,
    int length, int count, int q_blocks, int k_blocks, int works
) {
    int lane = threadIdx.x % 32;
    Ring<STAGES> ring;
    for (int work = blockIdx.x; work < works; work += gridDim.x) {
        long long first_block = (long long)(work / q_blocks) * k_blocks;
        const int* selected = block_map + (long long)work * count;
#pragma unroll 1
        for (int base = 0; base < count; base += 32) {
            // 32 blocks' numbers and scales at a time: one by one each would wait for memory.
            int many = min(32, count - base);
            int block = lane < many ? selected[base + lane] : 0;
            float scale = k_scale[first_block + block];
#pragma unroll 1
            for (int i = 0; i < many; i++) {
                int own = __shfl_sync(0xffffffff, block, i);
                float own_scale = __shfl_sync(0xffffffff, scale, i);
                if (lane == 0) {
                    u64* empty = &shared.empty[ring.stage];
                    while (!barrier_passed(empty, ring.parity ^ 1)) __nanosleep(100);
                    shared.scale[ring.stage] = own_scale;
                    shared.inside[ring.stage] = length - own * BLOCK_K;
                    u64* full = &shared.full[ring.stage];
                    barrier_expect(full, 2 * BLOCK_BYTES);
                    long long offset = (first_block + own) * BLOCK_BYTES;
                    copy_block(shared.stages[ring.stage].keys, k + offset, full);
                    copy_block(shared.stages[ring.stage].values, v + offset, full);
                }
                __syncwarp();
                ring.next();
            }
        }
    }
}

__device__ __forceinline__ void start_scores(int (&s)[32], u64 queries, const Stage& stage) {
    u64 keys = descriptor(stage.keys, 128);
    hold(s);
    mma_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) mma_scores(s, queries + 2 * i, keys + 2 * i, i);
    mma_commit();
    hold(s);
}

__device__ __forceinline__ void start_values(
    float (&d)[64], u32 (&p)[8], const Stage& stage, bool add
) {
    u64 values = descriptor(stage.values, 64);
    hold(d);
    hold(p);
    mma_begin();
    mma_values(d, p, values, add);
    mma_values(d, p + 4, values + 2, 1);
    mma_commit();
    hold(d);
}

// A thread holds, of rows r = lane / 4 and r + 8 of its warp's 16, keys (or channels)
// 8 j + 2 (lane % 4) + {0, 1} in x[4 j], x[4 j + 1] and in x[4 j + 2], x[4 j + 3].
__device__ __forceinline__ int key_of(int index, int pair) {
    return 8 * (index / 4) + 2 * pair + index % 2;
}

// What a thread knows of its two rows. Weights are 2^(score - reference + WEIGHT_SHIFT).
struct Rows {
    float reference[2];
    float sum[2];
    float behind[2];  // factors that the waiting sums lack
};

__device__ __forceinline__ int highest(const int (&s)[32], int row) {
    int high = s[2 * row];
#pragma unroll
    for (int j = 0; j < 32; j += 4) high = max(high, max(s[j + 2 * row], s[j + 2 * row + 1]));
    return high;
}

// The sums of the thread's rows so far wait in shared memory, four at a time.
__device__ __forceinline__ float4& waiting(Shared& shared, int i) {
    return shared.sums[i][threadIdx.x];
}

__device__ __forceinline__ void set_waiting(
    Shared& shared, const float (&part)[64], Rows& rows, bool add
) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float4 x = make_float4(part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]);
        if (add) {
            float4 sum = waiting(shared, i);
            x.x = fmaf(sum.x, rows.behind[0], x.x), x.y = fmaf(sum.y, rows.behind[0], x.y);
            x.z = fmaf(sum.z, rows.behind[1], x.z), x.w = fmaf(sum.w, rows.behind[1], x.w);
        }
        waiting(shared, i) = x;
    }
    rows.behind[0] = rows.behind[1] = 1;
}

// The weights of s as e4m3, in the order that a product takes, and their totals.
__device__ __forceinline__ void weigh(
    u32 (&p)[8], float (&total)[2], const int (&s)[32], float scale, const Rows& rows
) {
    float shift[2] = {WEIGHT_SHIFT - rows.reference[0], WEIGHT_SHIFT - rows.reference[1]};
    float weights[32];
    total[0] = total[1] = 0;
#pragma unroll
    for (int j = 0; j < 32; j++) {
        weights[j] = exp2_fast(fmaf(s[j], scale, shift[j % 4 / 2]));
        total[j % 4 / 2] += weights[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        // Keys 16 j + 2 pair + {0, 1} and, 8 further, two more: v's rows lie in this order.
        float* w = weights + 8 * j;
        int half = 4 * (j / 2) + 2 * (j % 2);
        p[half] = pack_fp8(w[0], w[1], w[4], w[5]);
        p[half + 1] = pack_fp8(w[2], w[3], w[6], w[7]);
    }
}

// Lower all sums to a reference that this block's scores do not exceed; hide keys past the end.
__device__ __forceinline__ void raise_reference(
    int (&s)[32], float (&part)[64], Rows& rows, float scale, int inside, int pair
) {
    float factor[2];
#pragma unroll
    for (int j = 0; j < 32; j++)
        if (key_of(j, pair) >= inside) s[j] = LOWEST_SCORE;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float raised = fmaxf(rows.reference[row], scale * max_of_row(highest(s, row)));
        factor[row] = exp2_fast(rows.reference[row] - raised);
        rows.reference[row] = raised;
        rows.sum[row] *= factor[row];
        rows.behind[row] *= factor[row];
    }
#pragma unroll
    for (int i = 0; i < 64; i++) part[i] *= factor[i % 4 / 2];
}

// Hidden keys weigh nothing unless the scores are tiny. Their values are zeros: only totals see.
__device__ __forceinline__ void leave_out_hidden(
    float (&total)[2], float scale, const Rows& rows, int inside, int pair
) {
    int hidden = 0;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
        hidden += key_of(j, pair) >= inside;
        hidden += key_of(j + 1, pair) >= inside;
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float shift = WEIGHT_SHIFT - rows.reference[row];
        total[row] -= hidden * exp2_fast(fmaf(LOWEST_SCORE, scale, shift));
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

// One key block, whose scores s are there: start the scores of the next one, add this one's values.
// `before` are the weights whose product with the last block's values runs meanwhile.
__device__ __forceinline__ void step(
    Shared& shared, int (&s)[32], int (&next_s)[32], u32 (&p)[8], u32 (&before)[8],
    float (&part)[64], Rows& rows, u64 queries, Ring<STAGES>& ring, Block& block, bool& arrived,
    int& previous, float own_scale, bool add, bool more
) {
    int lane = threadIdx.x % 32, pair = lane % 4, stage = block.stage, inside = block.inside;
    float scale = own_scale * block.scale;
    // Past the last block it multiplies that one again: no branch around a product.
    int next = more ? ring.stage : stage;
    if (more && !arrived) barrier_wait(&shared.full[next], ring.parity);
    start_scores(next_s, queries, shared.stages[next]);
    // Never: block maps select blocks before the end. Without a branch here ptxas would spread the
    // four products over all that follows, and the values' product would have to wait for them.
    if (inside <= 0) __trap();
    block = block_in(shared, next);
    if (more) ring.next();
    arrived = __all_sync(0xffffffff, barrier_passed(&shared.full[ring.stage], ring.parity));
    float total[2];
    weigh(p, total, s, scale, rows);
    // No weight exceeds the total of its row. Beyond e4m3 the reference is too low.
    bool over = fmaxf(total[0], total[1]) > WEIGHT_LIMIT;
    if (__any_sync(0xffffffff, over) || inside < BLOCK_K) {
        mma_wait<0>();
        hold(part);
        hold(next_s);
        raise_reference(s, part, rows, scale, inside, pair);
        weigh(p, total, s, scale, rows);
        leave_out_hidden(total, scale, rows, inside, pair);
    }
    rows.sum[0] += total[0];
    rows.sum[1] += total[1];
    start_values(part, p, shared.stages[stage], add);
    // The values' product before this one is through, and so are the next scores.
    mma_wait<1>();
    hold(next_s);
    hold(before);
    if (previous >= 0 && lane == 0) barrier_arrive(&shared.empty[previous]);
    previous = stage;
}

__device__ __forceinline__ void prefetch(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// Bring what the end of this work and the start of the next one read into the cache.
__device__ __forceinline__ void prefetch_work(
    const i8* next_q, const u32* out, int row, int pair, int inside, int row_words, bool add
) {
    prefetch(next_q + (row + 8 * (pair / 2)) * HEAD_DIM);
#pragma unroll
    for (int half = 0; half < 16; half += 8)
        if (add && pair < 2 && row + half < inside)
            prefetch(out + (long long)(row + half) * row_words + pair * 32);
}

// This warpgroup's 64 rows of q, swizzled like the keys.
__device__ __forceinline__ void load_queries(i8* tile, const i8* q) {
    int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    int4 loaded[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        loaded[i] = *reinterpret_cast<const int4*>(q + (thread + 128 * i) * 16);
    // All four warps are through with the last tile.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = (thread + 128 * i) / 8, chunk = thread % 8;
        *reinterpret_cast<int4*>(tile + row * HEAD_DIM + (chunk ^ row % 8) * 16) = loaded[i];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

__device__ __forceinline__ void store_work(
    Shared& shared, const Rows& rows, const float* v_scale, u32* out,
    int row, int pair, int inside, int row_words, bool bf16, bool add
) {
    const float2* scales = reinterpret_cast<const float2*>(v_scale);
    float2 channels[16];
#pragma unroll
    for (int j = 0; j < 16; j++) channels[j] = scales[4 * j + pair];
    float norm0 = 1.0f / sum_of_row(rows.sum[0]), norm1 = 1.0f / sum_of_row(rows.sum[1]);
    u32* out0 = out + (long long)row * row_words + pair;
    u32* out1 = out0 + (long long)8 * row_words;
    u32 there0[16] = {}, there1[16] = {};
#pragma unroll
    for (int j = 0; j < 16; j++) {
        if (add && row < inside) there0[j] = out0[4 * j];
        if (add && row + 8 < inside) there1[j] = out1[4 * j];
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
        float4 x = waiting(shared, j);
        float2 a = pair_of(there0[j], bf16), b = pair_of(there1[j], bf16);
        a.x = fmaf(x.x * norm0, channels[j].x, a.x), a.y = fmaf(x.y * norm0, channels[j].y, a.y);
        b.x = fmaf(x.z * norm1, channels[j].x, b.x), b.y = fmaf(x.w * norm1, channels[j].y, b.y);
        if (row < inside) out0[4 * j] = packed_pair(a, bf16);
        if (row + 8 < inside) out1[4 * j] = packed_pair(b, bf16);
    }
}

__device__ __forceinline__ void consume(
    Shared& shared, const i8* q, const float* q_scale, const float* v_scale, u32* out,
    int length, int count, int q_blocks, int heads, int works, bool bf16, bool add
) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, pair = lane % 4;
    u32 p[8] = {}, other_p[8] = {};
    int s[32], other_s[32];
    float part[64];
    i8* q_tile = shared.queries[threadIdx.x / 128];
    u64 queries = descriptor(q_tile, 128);
    Ring<STAGES> ring;
    for (int work = blockIdx.x; work < works; work += gridDim.x) {
        int head = work / q_blocks, first_row = work % q_blocks * BLOCK_Q;
        long long place = ((long long)(head / heads) * length + first_row) * heads + head % heads;
        u32* rows_out = out + place * (HEAD_DIM / 2);
        int next = min(work + gridDim.x, works - 1);
        prefetch_work(q + (long long)next * BLOCK_Q * HEAD_DIM, rows_out, row, pair,
                      length - first_row, heads * (HEAD_DIM / 2), add);
        load_queries(q_tile, q + ((long long)work * BLOCK_Q + threadIdx.x / 128 * 64) * HEAD_DIM);
        float own_scale = q_scale[work];
        Rows rows = {{-1e30f, -1e30f}, {0, 0}, {1, 1}};
#pragma unroll
        for (int i = 0; i < 64; i++) part[i] = 0;
        barrier_wait(&shared.full[ring.stage], ring.parity);
        Block block = block_in(shared, ring.stage);
        start_scores(s, queries, shared.stages[ring.stage]);
        ring.next();
        mma_wait<0>();
        hold(s);
        int previous = -1;
        bool arrived = false;
#pragma unroll 1
        for (int first = 0; first < count; first += CHAIN) {
            int end = min(count, first + CHAIN), i = first;
#pragma unroll 1
            for (; i + 1 < end; i += 2) {
                step(shared, s, other_s, p, other_p, part, rows, queries, ring, block, arrived,
                     previous, own_scale, i > first, true);
                step(shared, other_s, s, other_p, p, part, rows, queries, ring, block, arrived,
                     previous, own_scale, true, i + 2 < count);
            }
            mma_wait<0>();
            hold(part);
            hold(other_p);
            if (i < end) {
                step(shared, s, other_s, p, other_p, part, rows, queries, ring, block, arrived,
                     previous, own_scale, i > first, false);
                mma_wait<0>();
                hold(part);
                hold(p);
            }
            set_waiting(shared, part, rows, first > 0);
        }
        if (lane == 0) barrier_arrive(&shared.empty[previous]);
        store_work(shared, rows, v_scale + (long long)head * HEAD_DIM, rows_out, row, pair,
                   length - first_row, heads * (HEAD_DIM / 2), bf16, add);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) sage_attention(
    const i8* q, const float* q_scale, const i8* k, const float* k_scale, const i8* v,
    const float* v_scale, const int* block_map, u32* out,
    int length, int count, int q_blocks, int k_blocks, int heads, int works, int bf16, int add
) {
    extern __shared__ char memory[];
    // Swizzled tiles start at multiples of 1024 bytes.
    char* aligned = memory + (-shared_address(memory) & 1023);
    Shared& shared = *reinterpret_cast<Shared*>(aligned);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 32 * CONSUMER_WARPS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        consume(shared, q, q_scale, v_scale, out, length, count, q_blocks, heads, works, bf16, add);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 32 * (CONSUMER_WARPS + 1))
            produce(shared, k, k_scale, v, block_map, length, count, q_blocks, k_blocks, works);
    }
}
