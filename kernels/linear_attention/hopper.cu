// Sums over keys for Hopper: softmax(k)^T v, softmax(k), and the largest |v|.
//
// A program takes some rows of one head, TILE of them after another, which one thread has copied
// STAGES - 1 tiles ahead. Eight lanes take the softmax of a key where it lies in shared memory; of
// int8, whose scale and center make a key, beside it. Then each of two warpgroups multiplies 64 of
// k's channels with all of v's. Beside keys in int8 v becomes fp8, as attention reads it.

// Defined are BF16, whether v is bfloat16, else float16; INT8, whether k is int8, else as v.

#include "hopper.cuh"
#include "keys.cuh"

constexpr int HEAD_DIM = 128;
constexpr int TILE = 64;
constexpr int STAGES = 3;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int HALF = TILE * 64;  // values of half the channels, whose rows are wide as a swizzle
constexpr int CHUNKS = HEAD_DIM / 8;         // of 16 bytes, of a row
constexpr float E4M3_LIMIT = 448.0f;
constexpr int READ_ROWS = THREADS / CHUNKS;  // of v that all threads look at, at once

struct Stage {
#if INT8
    i8 k[2 * HALF];  // [TILE, HEAD_DIM], swizzled
#else
    u16 k[2 * HALF];  // [2, TILE, 64], swizzled; then their softmax
#endif
    u16 v[2 * HALF];
};

// Where all tiles are done, what warps found of each channel.
struct Ends {
    float normalizer[WARPS][HEAD_DIM];
    u32 maxima[READ_ROWS][HEAD_DIM / 2];
};

struct Shared {
#if INT8
    Stage stages[STAGES];
    u16 phi[2][2 * HALF];  // [2, TILE, 64], swizzled, the softmax of keys
    float4 center[4][8];   // log2(e) times it, in the order of a key's eight lanes
    float factor[HEAD_DIM];  // that v's channels are multiplied by
    u16 ones[64];
    float farthest;  // of the center
#else
    union {
        Stage stages[STAGES];
        Ends ends;
    };
#endif
    u64 full[STAGES];
};

struct alignas(64) TensorMap {
    u64 opaque[16];
};

struct Operands {
    TensorMap v_map;  // of v [B, L, H D], TILE rows of 64 channels
#if INT8
    const i8* k;           // [B, K_HEADS, N TILE, D], swizzled
    const float* k_scale;  // [B, K_HEADS, N]
    const u16* center;     // [B, K_HEADS, D]
    i8* values;            // [B, K_HEADS, N, D, TILE] e4m3, swizzled
    const float* bound;    // [B, H, D], what becomes e4m3's largest number
#else
    TensorMap k_map;
#endif
    float* state;       // [splits, B, H, D (of k), D (of v)]
    float* normalizer;  // [splits, B, H, D]
    float* maxima;      // [splits, B, H, D]
    int length, heads, heads_in_all, rows;  // rows of a program
#if INT8
    int k_heads, k_blocks;  // N
#endif
};

static_assert(SHARED_BYTES == SWIZZLE_ALIGNMENT + sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

__device__ __forceinline__ void copy_half(
    u16* to, const TensorMap& map, int channel, int row, int sample, u64* barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(shared_address(to)), "l"(&map), "r"(channel), "r"(row), "r"(sample),
        "r"(shared_address(barrier)) : "memory");
}

// Rows beyond the end become zeros.
__device__ __forceinline__ void copy_tile(
    Shared& shared, const Operands& o, int slot, int row, int head, int sample
) {
    Stage& stage = shared.stages[slot];
    u64* full = &shared.full[slot];
    barrier_expect(full, sizeof(Stage));
#if INT8
    long long block = (sample * (long long)o.k_heads + head) * o.k_blocks + row / TILE;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(stage.k)), "l"(o.k + block * (TILE * HEAD_DIM)),
          "n"(sizeof(stage.k)), "r"(shared_address(full)) : "memory");
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int channel = head * HEAD_DIM + 64 * half;
#if !INT8
        copy_half(stage.k + half * HALF, o.k_map, channel, row, sample, full);
#endif
        copy_half(stage.v + half * HALF, o.v_map, channel, row, sample, full);
    }
}

__device__ __forceinline__ uint4& chunk_at(u16* tile, int row, int chunk) {
    u16* of_row = tile + chunk / 8 * HALF + row * 64;
    return *reinterpret_cast<uint4*>(of_row + (chunk % 8 ^ row % 8) * 8);
}

// The two chunks of an eighth of a key's channels, 8 each. Lanes of the upper half take them the
// other way round, so that eight lanes meet all banks.
__device__ __forceinline__ int chunk_of(int eighth, int i) { return 2 * eighth + (i ^ eighth / 4); }

#if INT8
// Of a key's eighth the exponents, as chunks go.
__device__ __forceinline__ void exponents(
    float (&x)[16], const Shared& shared, const Stage& stage, float scale, int row, int eighth
) {
    const i8* from = stage.k + row * HEAD_DIM + (eighth ^ row % 8) * 16;
    uint4 raw = *reinterpret_cast<const uint4*>(from);
    bool upper = eighth / 4;
    const u32 quads[4] = {upper ? raw.z : raw.x, upper ? raw.w : raw.y,
                          upper ? raw.x : raw.z, upper ? raw.y : raw.w};
    exponents(x, quads, shared.center, scale, eighth);
}
#else
__device__ __forceinline__ void exponents(float (&x)[16], Stage& stage, int row, int eighth) {
#pragma unroll
    for (int i = 0; i < 2; i++) unpack(x + 8 * i, chunk_at(stage.k, row, chunk_of(eighth, i)));
}

// The softmax of this lane's key, of which it has an eighth.
__device__ __forceinline__ void weigh_key(float (&x)[16], float (&normalizer)[16], bool inside) {
    float high = -1e30f, sum = 0;
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
}
#endif

__device__ __forceinline__ void store_key(u16* phi, const float (&x)[16], int row, int eighth) {
#pragma unroll
    for (int i = 0; i < 2; i++) chunk_at(phi, row, chunk_of(eighth, i)) = packed_chunk(x + 8 * i);
}

#if INT8
// A warp's 16 channels of v to fp8, and their maxima: of channels 16 warp + 8 i + lane / 4.
__device__ __forceinline__ void store_values(
    u32 (&maxima)[2], Stage& stage, const float* factors, i8* values, int warp, int lane
) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int chunk = 2 * warp + i, of_eight = lane / 4;
        float factor = factors[8 * chunk + of_eight];
        u32 bytes[4];  // of keys 16 j + 2 (lane % 4) + {0, 1, 8, 9}
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 pairs[4];
            load_matrices_transposed(
                pairs, shared_address(&chunk_at(stage.v, 32 * half + lane, chunk)));
#pragma unroll
            for (int j = 0; j < 4; j++)
                maxima[i] = max_of_pairs(maxima[i], pairs[j] & 0x7fff7fff, BF16);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float2 low = pair_of(pairs[2 * j], BF16), high = pair_of(pairs[2 * j + 1], BF16);
                bytes[2 * half + j] = packed_fp8(low.x * factor, low.y * factor,
                                                 high.x * factor, high.y * factor);
            }
        }
        transpose(bytes);  // 16 keys of a channel
        int column = chunk / 4 * 32 + of_eight / 2 * 8 + chunk % 4 * 2 + of_eight % 2;
        store_16(values + column * TILE + (lane % 4 ^ column / 2 % 4) * 16, bytes);
    }
}

// The largest |v| of a channel, of what four lanes have.
__device__ __forceinline__ void store_maxima(
    const u32 (&maxima)[2], float* to, int warp, int lane
) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float2 both = pair_of(maxima[i], BF16);
        float highest = max_or_nan(both.x, both.y);
        highest = max_or_nan(highest, __shfl_xor_sync(0xffffffff, highest, 1));
        highest = max_or_nan(highest, __shfl_xor_sync(0xffffffff, highest, 2));
        if (lane % 4 == 0) to[16 * warp + 8 * i + lane / 4] = highest;
    }
}
#else
__device__ __forceinline__ void raise_maxima(u32 (&maxima)[4], Stage& stage) {
#pragma unroll
    for (int i = 0; i < TILE / READ_ROWS; i++) {
        int row = threadIdx.x / CHUNKS + i * READ_ROWS;
        uint4 raw = chunk_at(stage.v, row, threadIdx.x % CHUNKS);
        const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            maxima[j] = max_of_pairs(maxima[j], pairs[j] & 0x7fff7fff, BF16);
    }
}
#endif

// Descriptor of a tile whose rows are keys, that a product takes by channels: 64 of them are as
// wide as a swizzle, the next 64 lie HALF further.
__device__ __forceinline__ u64 by_channels(const u16* tile) {
    u64 from = (shared_address(tile) & 0x3FFFF) >> 4, layout = 1;
    u64 next_channels = 2 * HALF >> 4, next_keys = 8 * 128 >> 4;
    return from | next_channels << 16 | next_keys << 32 | layout << 62;
}

// sums [64 channels of k, 128 of v] (+)= phi^T v of 16 keys
__device__ __forceinline__ void mma_keys(float (&sums)[64], u64 phi, u64 v, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
#if BF16
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
#else
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
#endif
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 1, 1;\n"
        "}\n"
        : F16(sums, 0), F16(sums, 16), F16(sums, 32), F16(sums, 48)
        : "l"(phi), "l"(v), "r"(add));
}

#if INT8
// total [64 channels of k, 8 times] (+)= phi^T 1 of 16 keys
__device__ __forceinline__ void mma_ones(float (&total)[4], u64 phi, u64 ones, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %6, 0;\n"
#if BF16
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
#else
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
#endif
        "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 1, 0;\n"
        "}\n"
        : F4(total, 0) : "l"(phi), "l"(ones), "r"(add));
}
#endif

__device__ __forceinline__ void store_state(const float (&sums)[64], float* state) {
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float2* to = reinterpret_cast<float2*>(state + row * HEAD_DIM) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        to[4 * j] = make_float2(sums[4 * j], sums[4 * j + 1]);
        to[4 * j + 4 * HEAD_DIM] = make_float2(sums[4 * j + 2], sums[4 * j + 3]);
    }
}

#if !INT8
// The four keys of a warp, then all warps.
__device__ __forceinline__ void store_ends(
    Ends& ends, float (&normalizer)[16], const u32 (&maxima)[4], const Operands& o, int warp,
    int lane
) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        normalizer[i] += __shfl_xor_sync(0xffffffff, normalizer[i], 8);
        normalizer[i] += __shfl_xor_sync(0xffffffff, normalizer[i], 16);
        if (lane < 8) ends.normalizer[warp][8 * chunk_of(lane, i / 8) + i % 8] = normalizer[i];
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
        for (int i = 0; i < READ_ROWS; i++)
            highest = max_of_pairs(highest, ends.maxima[i][threadIdx.x / 2], BF16);
        float2 both = pair_of(highest, BF16);
        o.maxima[at] = threadIdx.x % 2 ? both.y : both.x;
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) key_value_state(
    const __grid_constant__ Operands o
) {
    extern __shared__ char memory[];
    Shared& shared = *static_cast<Shared*>(aligned_for_swizzle(memory));
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, eighth = lane % 8;
    int key = 4 * warp + lane / 8;  // of each half of a tile
    // All heads of some rows run side by side: together they read whole rows.
    int whole_head = blockIdx.x % o.heads_in_all, sample = whole_head / o.heads;
    int head = whole_head % o.heads;
    int begin = blockIdx.x / o.heads_in_all * o.rows, end = min(begin + o.rows, o.length);
    int tiles = (end - begin + TILE - 1) / TILE;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(&shared.full[i], 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < min(STAGES - 1, tiles); i++)
            copy_tile(shared, o, i, begin + i * TILE, head, sample);
    }
#if INT8
    int k_head = sample * o.k_heads + head;
    int first_block = k_head * o.k_blocks + begin / TILE;
    float next_scale = o.k_scale[first_block];
    if (threadIdx.x < 32) {
        int i = threadIdx.x / 8;
        const u16* two = o.center + k_head * HEAD_DIM + 8 * chunk_of(threadIdx.x % 8, i / 2);
        shared.farthest = load_center(shared.center, reinterpret_cast<const uint2*>(two)[i % 2]);
    }
    if (threadIdx.x < HEAD_DIM) {
        float bound = o.bound[(long long)whole_head * HEAD_DIM + threadIdx.x];
        shared.factor[threadIdx.x] = __fdiv_rn(1.0f, bound) * E4M3_LIMIT;
        if (threadIdx.x < 64) shared.ones[threadIdx.x] = BF16 ? 0x3f80 : 0x3c00;
    }
    u32 maxima[2] = {};
    // Whichever chunk of 8 keys it takes of 8 columns, it finds ones.
    u64 ones = (shared_address(shared.ones) & 0x3FFFF) >> 4;
#else
    u32 maxima[4] = {};
#endif
    __syncthreads();
    float sums[64];
    hold(sums);
#if INT8
    float total[4];  // of 64 channels of k, of rows as in `sums`
    hold(total);
#else
    float normalizer[16] = {};
#endif
    int own = warp / 4 * HALF;  // of k, the warpgroup's
    Ring<STAGES> ring;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++, ring.next()) {
        Stage& stage = shared.stages[ring.stage];
        int left = end - begin - tile * TILE;  // rows
#if INT8
        u16* phi = shared.phi[tile % 2];
        float scale = LOG2E * next_scale;
        bool far = are_far(scale, shared.farthest);
        if (tile + 1 < tiles) next_scale = o.k_scale[first_block + tile + 1];
#else
        u16* phi = stage.k;
#endif
        barrier_wait(&shared.full[ring.stage], ring.parity);
#pragma unroll
        for (int row = key; row < TILE; row += TILE / 2) {
            float x[16];
#if INT8
            exponents(x, shared, stage, scale, row, eighth);
#else
            exponents(x, stage, row, eighth);
#endif
#if INT8
            weigh_key(x, far, row < left);
#else
            weigh_key(x, normalizer, row < left);
#endif
            store_key(phi, x, row, eighth);
        }
#if !INT8
        raise_maxima(maxima, stage);
#endif
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        mma_wait<0>();
        hold(sums);
#if INT8
        hold(total);
#endif
        __syncthreads();  // all weights are there, and all are done with the last tile
        if (threadIdx.x == 0 && tile + STAGES - 1 < tiles)
            copy_tile(shared, o, ring.stage ? ring.stage - 1 : STAGES - 1,
                      begin + (tile + STAGES - 1) * TILE, head, sample);
        u64 a = by_channels(phi + own), b = by_channels(stage.v);
        hold(sums);
#if INT8
        hold(total);
#endif
        mma_begin();
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) mma_keys(sums, a + 128 * i, b + 128 * i, tile + i);
#if INT8
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) mma_ones(total, a + 128 * i, ones, tile + i);
#endif
        mma_commit();
        hold(sums);
#if INT8
        hold(total);
        // Not before the fence, which would wait until all of it is stored.
        store_values(maxima, stage, shared.factor,
                     o.values + (first_block + tile) * (long long)(TILE * HEAD_DIM), warp, lane);
#endif
    }
    mma_wait<0>();
    hold(sums);
#if INT8
    hold(total);
#endif
    store_state(sums, o.state + (long long)blockIdx.x * HEAD_DIM * HEAD_DIM);
#if INT8
    long long at = (long long)blockIdx.x * HEAD_DIM;
    store_maxima(maxima, o.maxima + at, warp, lane);
    if (lane % 4 == 0) {
        float* to = o.normalizer + at + 16 * warp + lane / 4;
        to[0] = total[0], to[8] = total[2];
    }
#else
    __syncthreads();
    store_ends(shared.ends, normalizer, maxima, o, warp, lane);
#endif
}
