// Sums over keys for Hopper: softmax(k)^T v, softmax(k), and the largest |v|.
//
// A program takes some rows of one head, TILE of them after another, which one thread has copied
// STAGES - 1 tiles ahead. Eight lanes take the softmax of a key where it lies in shared memory.
// Then each of two warpgroups multiplies 64 of k's channels with all of v's.

// Defined is BF16, whether k and v are bfloat16, else float16.

#include "hopper.cuh"
#include "mma.cuh"

constexpr int HEAD_DIM = 128;
constexpr int TILE = 64;
constexpr int STAGES = 3;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int HALF = TILE * 64;  // values of half the channels, whose rows are wide as a swizzle
constexpr int CHUNKS = HEAD_DIM / 8;         // of 16 bytes, of a row
constexpr int READ_ROWS = THREADS / CHUNKS;  // of v that all threads look at, at once

struct Stage {
    u16 k[2 * HALF];  // [2, TILE, 64], swizzled; then their softmax
    u16 v[2 * HALF];
};

// Where all tiles are done, what warps found of each channel.
struct Ends {
    float normalizer[WARPS][HEAD_DIM];
    u32 maxima[READ_ROWS][HEAD_DIM / 2];
};

struct Shared {
    union {
        Stage stages[STAGES];
        Ends ends;
    };
    u64 full[STAGES];
};

struct alignas(64) TensorMap {
    u64 opaque[16];
};

struct Operands {
    TensorMap k_map, v_map;  // of k and v [B, L, H D], TILE rows of 64 channels
    float* state;       // [splits, B, H, D (of k), D (of v)]
    float* normalizer;  // [splits, B, H, D]
    float* maxima;      // [splits, B, H, D]
    int length, heads, heads_in_all, rows;  // rows of a program
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
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int channel = head * HEAD_DIM + 64 * half;
        copy_half(stage.k + half * HALF, o.k_map, channel, row, sample, full);
        copy_half(stage.v + half * HALF, o.v_map, channel, row, sample, full);
    }
}

__device__ __forceinline__ uint4& chunk_at(u16* tile, int row, int chunk) {
    u16* of_row = tile + chunk / 8 * HALF + row * 64;
    return *reinterpret_cast<uint4*>(of_row + (chunk % 8 ^ row % 8) * 8);
}

// Over the eight lanes of a key.
__device__ __forceinline__ float key_max(float x) {
#pragma unroll
    for (int distance = 4; distance; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

__device__ __forceinline__ float key_sum(float x) {
#pragma unroll
    for (int distance = 4; distance; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
}

// The two chunks of an eighth of a key's channels. Lanes of the upper half take them the other way
// round, so that eight lanes meet all banks.
__device__ __forceinline__ int chunk_of(int eighth, int i) { return 2 * eighth + (i ^ eighth / 4); }

__device__ __forceinline__ void unpack(float* x, const uint4& raw) {
    const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 both = pair_of(pairs[i], BF16);
        x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
}

// The softmax of this lane's key, in its place; of those past the end zeros.
__device__ __forceinline__ void weigh_key(
    Stage& stage, float (&normalizer)[16], int row, int eighth, bool inside
) {
    const float log2e = 1.4426950408889634f;
    float x[16], high = -1e30f, sum = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) unpack(x + 8 * i, chunk_at(stage.k, row, chunk_of(eighth, i)));
#pragma unroll
    for (int i = 0; i < 16; i++) high = fmaxf(high, x[i]);
    float shift = -key_max(high) * log2e;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] = exp2_fast(fmaf(x[i], log2e, shift));
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
    for (int i = 0; i < 2; i++) {
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            pairs[j] = packed_pair({x[8 * i + 2 * j], x[8 * i + 2 * j + 1]}, BF16);
        chunk_at(stage.k, row, chunk_of(eighth, i)) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

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

__device__ __forceinline__ void store_state(const float (&sums)[64], float* state) {
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float2* to = reinterpret_cast<float2*>(state + row * HEAD_DIM) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        to[4 * j] = make_float2(sums[4 * j], sums[4 * j + 1]);
        to[4 * j + 4 * HEAD_DIM] = make_float2(sums[4 * j + 2], sums[4 * j + 3]);
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
    __syncthreads();
    float sums[64];
    hold(sums);
    float normalizer[16] = {};
    u32 maxima[4] = {};
    int own = warp / 4 * HALF;  // of k, the warpgroup's
    Ring<STAGES> ring;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++, ring.next()) {
        Stage& stage = shared.stages[ring.stage];
        int left = end - begin - tile * TILE;  // rows
        barrier_wait(&shared.full[ring.stage], ring.parity);
#pragma unroll
        for (int row = key; row < TILE; row += TILE / 2)
            weigh_key(stage, normalizer, row, eighth, row < left);
        raise_maxima(maxima, stage);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        mma_wait<0>();
        hold(sums);
        __syncthreads();  // all weights are there, and all are done with the last tile
        if (threadIdx.x == 0 && tile + STAGES - 1 < tiles)
            copy_tile(shared, o, ring.stage ? ring.stage - 1 : STAGES - 1,
                      begin + (tile + STAGES - 1) * TILE, head, sample);
        u64 a = by_channels(stage.k + own), b = by_channels(stage.v);
        hold(sums);
        mma_begin();
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) mma_keys(sums, a + 128 * i, b + 128 * i, tile + i);
        mma_commit();
        hold(sums);
    }
    mma_wait<0>();
    hold(sums);
    store_state(sums, o.state + (long long)blockIdx.x * HEAD_DIM * HEAD_DIM);
    __syncthreads();
    store_ends(shared.ends, normalizer, maxima, o, warp, lane);
}
