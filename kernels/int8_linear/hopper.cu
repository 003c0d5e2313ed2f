// INT8 linear for Hopper: x [B, L, K] times the transpose of w [N, K], a scale for each row of both.
//
// A persistent program takes one tile of 128 x 256 after another. Two of a cluster take tiles of the
// same columns, and each copies half of their weights for both. One warp copies steps of 128 k
// into a ring of stages, another prepares what belongs to the tile's columns; two warpgroups
// multiply 64 rows each. The next tile's first stages arrive while they finish.

// Defined is BF16, whether bias, residual and out are bfloat16, else float16.

#include "hopper.cuh"

constexpr int TILE_L = 128;
constexpr int TILE_N = 256;
constexpr int STEP = 128;  // of k: a row of a stage, as wide as a swizzle
constexpr int STAGES = 4;
// Up to here the residual is fetched ahead; in longer tiles it hardly matters, and costs more.
constexpr int FEW = 2048;  // of k
constexpr int GROUP = 8;  // pairs of tiles along L that share weights before N moves on
constexpr int CONSUMER_WARPS = 8;
constexpr int THREADS = 32 * (CONSUMER_WARPS + 4);

struct Stage {
    i8 x[TILE_L * STEP];  // [TILE_L, STEP], swizzled
    i8 w[TILE_N * STEP];  // [TILE_N, STEP], swizzled
};

struct Shared {
    Stage stages[STAGES];
    float2 columns[2][TILE_N];  // of two tiles: what a column is multiplied with, what is added
    u64 full[STAGES];
    u64 empty[STAGES];
    u64 known[2];  // the columns
    u64 used[2];
};

struct alignas(64) TensorMap {
    u64 opaque[16];
};

struct Operands {
    TensorMap x_map, w_map;  // of x [B, L, K] and w [N, K], int8; half a tile's columns
    const float* x_scale;    // [B, L]
    const float* w_scale;    // [N]
    const u16* bias;         // [N] or null
    const float* gate;       // [B, N] or null
    const u16* residual;     // [B, L, N] or null
    u16* out;                // [B, L, N]
    float* squares;          // [B, N / TILE_N, L] or null: sums of each row's squares, a tile each
    int batch, length, n, k;
    int gate_b, residual_b, residual_l, out_b, out_l;
};

static_assert(SHARED_BYTES == SWIZZLE_ALIGNMENT + sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

// ---- tiles ----

struct Tile {
    int sample, row, column;
};

__device__ __forceinline__ int tiles_across(const Operands& o) {
    return (o.n + TILE_N - 1) / TILE_N;
}
// The two programs of a cluster take pairs of tiles, one below the other.
__device__ __forceinline__ int pairs_down(const Operands& o) {
    return (o.length + 2 * TILE_L - 1) / (2 * TILE_L);
}
__device__ __forceinline__ int rank_in_pair() { return blockIdx.x % 2; }
__device__ __forceinline__ int first_pair() { return blockIdx.x / 2; }
__device__ __forceinline__ int pairs_at_once() { return gridDim.x / 2; }
__device__ __forceinline__ int pairs(const Operands& o) {
    return o.batch * tiles_across(o) * pairs_down(o);
}

__device__ __forceinline__ Tile tile_of(int index, const Operands& o) {
    int across = tiles_across(o), down = pairs_down(o), each = across * down;
    int of_group = GROUP * across, in_sample = index % each, in_group = in_sample % of_group;
    int first = in_sample / of_group * GROUP, many = min(GROUP, down - first);
    return {index / each, (2 * (first + in_group % many) + rank_in_pair()) * TILE_L,
            in_group / many * TILE_N};
}

// ---- the copying warp ----

__device__ __forceinline__ void copy_x(
    void* to, const TensorMap& map, int k, int row, int sample, u64* barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(shared_address(to)), "l"(&map), "r"(k), "r"(row), "r"(sample),
        "r"(shared_address(barrier)) : "memory");
}

// To both programs, and tells both.
__device__ __forceinline__ void copy_w(
    void* to, const TensorMap& map, int k, int row, u64* barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(shared_address(to)), "l"(&map), "r"(k), "r"(row), "r"(shared_address(barrier)),
          "h"((u16)3) : "memory");
}

__device__ __forceinline__ void copy_stages(Shared& shared, const Operands& o) {
    Ring<STAGES> ring;
    for (int index = first_pair(); index < pairs(o); index += pairs_at_once()) {
        Tile tile = tile_of(index, o);
#pragma unroll 1
        for (int k = 0; k < o.k; k += STEP, ring.next()) {
            barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            u64* full = &shared.full[ring.stage];
            barrier_expect(full, sizeof(Stage));
            copy_x(shared.stages[ring.stage].x, o.x_map, k, tile.row, tile.sample, full);
            int half = rank_in_pair() * (TILE_N / 2);
            copy_w(shared.stages[ring.stage].w + half * STEP, o.w_map, k, tile.column + half, full);
        }
    }
}

// ---- the warp for the columns ----

// Brings what the end of a tile adds into the cache: read there, all would wait for memory.
__device__ __forceinline__ void prefetch_residual(const Tile& tile, const Operands& o) {
    int bytes = 2 * min(TILE_N, o.n - tile.column);
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < min(TILE_L, o.length - tile.row); i += 32) {
        const u16* row = o.residual + tile.sample * (long long)o.residual_b
            + (tile.row + i) * (long long)o.residual_l + tile.column;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "r"(bytes)
                     : "memory");
    }
}

// (sum x_scale w_scale + bias) gate is sum x_scale a + b, with a column's a and b from here.
__device__ __forceinline__ void prepare_columns(Shared& shared, const Operands& o) {
    // Read once: fields would be read again behind every wait, and linears be 2 % slower.
    const float *scales = o.w_scale, *gates = o.gate;
    const u16* biases = o.bias;
    int last = o.n - 2, gate_b = o.gate_b;
    int lane = threadIdx.x % 32;
    bool residual = o.residual && o.k <= FEW;
    Ring<2> ring;
    int index = first_pair();
    for (; index < pairs(o); index += pairs_at_once(), ring.next()) {
        Tile tile = tile_of(index, o);
        const float* sample_gates = gates + (long long)tile.sample * gate_b;
        barrier_wait(&shared.used[ring.stage], ring.parity ^ 1);
        // Now the tile before is begun.
        if (residual && index > first_pair())
            prefetch_residual(tile_of(index - pairs_at_once(), o), o);
#pragma unroll
        for (int at = 2 * lane; at < TILE_N; at += 64) {
            int column = min(tile.column + at, last);
            float2 scale = *reinterpret_cast<const float2*>(scales + column);
            float2 add = {0, 0}, gate = {1, 1};
            if (biases) add = pair_of(*reinterpret_cast<const u32*>(biases + column), BF16);
            if (gates) gate = *reinterpret_cast<const float2*>(sample_gates + column);
            *reinterpret_cast<float4*>(&shared.columns[ring.stage][at]) = make_float4(
                scale.x * gate.x, add.x * gate.x, scale.y * gate.y, add.y * gate.y);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.known[ring.stage]);
    }
    if (!residual) return;
    barrier_wait(&shared.used[ring.stage], ring.parity ^ 1);
    prefetch_residual(tile_of(index - pairs_at_once(), o), o);
}

// ---- the multiplying warpgroups ----

// acc [64 rows, 256 columns] (+)= x [64, 32] w^T, both in shared memory
__device__ __forceinline__ void mma(int (&acc)[128], u64 x, u64 w, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
        "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "
        "%123, %124, %125, %126, %127}, %128, %129, p;\n"
        "}\n"
        : R64(acc, 0), R64(acc, 64)
        : "l"(x), "l"(w), "r"(add));
}

// This program's warp is done with a stage, which both programs' copies go into.
__device__ __forceinline__ void release(u64* empty) {
    barrier_arrive(empty);
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                 ::"r"(shared_address(empty)), "r"(rank_in_pair() ^ 1) : "memory");
}

// Of the cluster's programs.
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// All of a tile's products but the last ones are done on return, those are under way.
__device__ __forceinline__ void multiply(
    Shared& shared, int (&acc)[128], Ring<STAGES>& ring, int k
) {
    int lane = threadIdx.x % 32, rows = threadIdx.x / 128 * 64, before = 0;
#pragma unroll 1
    for (int step = 0; step * STEP < k; step++, ring.next()) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        const Stage& stage = shared.stages[ring.stage];
        u64 x = matrix_descriptor(stage.x + rows * STEP, 128), w = matrix_descriptor(stage.w, 128);
        hold(acc);
        mma_begin();
#pragma unroll
        for (int i = 0; i < 4; i++) mma(acc, x + 2 * i, w + 2 * i, step + i);
        mma_commit();
        hold(acc);
        if (step) {
            mma_wait<1>();
            if (lane == 0) release(&shared.empty[before]);
        }
        before = ring.stage;
    }
}

// A thread's two rows, r and r + 8 of its warp's 16, from its first column on.
struct Rows {
    float scale[2];
    const u16* residual[2];
    u16* out[2];
    bool inside[2];
};

__device__ __forceinline__ Rows rows_of(const Tile& tile, const Operands& o) {
    Rows rows;
    int lane = threadIdx.x % 32;
    long long sample = tile.sample;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = tile.row + threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
        int column = tile.column + 8 * (lane % 4);
        rows.inside[half] = row < o.length;
        row = min(row, o.length - 1);  // read again in place of what is beyond the end
        rows.scale[half] = o.x_scale[sample * o.length + row];
        rows.residual[half] = o.residual + sample * o.residual_b + (long long)row * o.residual_l
            + column;
        rows.out[half] = o.out + sample * o.out_b + (long long)row * o.out_l + column;
    }
    return rows;
}

__device__ __forceinline__ void load_residual(
    u32 (&residual)[8][2][4], const Rows& rows, int columns
) {
#pragma unroll
    for (int group = 0; group < 8; group++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (32 * group + threadIdx.x % 4 * 8 < columns)
                *reinterpret_cast<uint4*>(residual[group][half]) =
                    *reinterpret_cast<const uint4*>(rows.residual[half] + 32 * group);
}

// Also adds to `squares` those of what the thread writes of its two rows, before rounding.
template <bool RESIDUAL, bool SQUARES> __device__ __forceinline__ void store(
    const int (&acc)[128], u32 (&residual)[8][2][4], const Rows& rows, const float2* factors,
    int columns, float (&squares)[2]
) {
    int pair = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < 8; group++) {
        float4 of_columns[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            of_columns[j] = *reinterpret_cast<const float4*>(
                factors + 32 * group + 8 * j + 2 * pair);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 (&x)[4] = residual[group][half];
            if (RESIDUAL) transpose(x);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float4 c = of_columns[j];
                int i = 16 * group + 4 * j + 2 * half;
                float2 y = {fmaf(acc[i] * rows.scale[half], c.x, c.y),
                            fmaf(acc[i + 1] * rows.scale[half], c.z, c.w)};
                if (RESIDUAL) {
                    float2 add = pair_of(x[j], BF16);
                    y.x += add.x, y.y += add.y;
                }
                if (SQUARES) squares[half] = fmaf(y.x, y.x, fmaf(y.y, y.y, squares[half]));
                x[j] = packed_pair(y, BF16);
            }
            transpose(x);
            if (rows.inside[half] && 32 * group + 8 * pair < columns)
                *reinterpret_cast<uint4*>(rows.out[half] + 32 * group) =
                    make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

// Of tiles that are whole across. Each has a place of its own: the sums are the same every time.
__device__ __forceinline__ void store_squares(
    const float (&squares)[2], const Tile& tile, const Operands& o
) {
    long long part = (long long)tile.sample * tiles_across(o) + tile.column / TILE_N;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = squares[half];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        int row = tile.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
        if (threadIdx.x % 4 == 0 && row < o.length) o.squares[part * o.length + row] = sum;
    }
}

template <bool RESIDUAL, bool SQUARES>
__device__ __forceinline__ void multiply_tiles(Shared& shared, const Operands& o) {
    int lane = threadIdx.x % 32;
    Ring<STAGES> ring;
    Ring<2> factors;
    for (int index = first_pair(); index < pairs(o); index += pairs_at_once(), factors.next()) {
        Tile tile = tile_of(index, o);
        Rows rows = rows_of(tile, o);
        int acc[128];           // [64, TILE_N] of a warpgroup
        u32 residual[8][2][4];  // the same tile, pairs of 16 bits
        int columns = o.n - tile.column;
        multiply(shared, acc, ring, o.k);
        if (RESIDUAL) load_residual(residual, rows, columns);
        mma_wait<0>();
        hold(acc);
        if (lane == 0) release(&shared.empty[(ring.stage + STAGES - 1) % STAGES]);
        barrier_wait(&shared.known[factors.stage], factors.parity);
        float squares[2] = {};
        const float2* of_columns = shared.columns[factors.stage];
        store<RESIDUAL, SQUARES>(acc, residual, rows, of_columns, columns, squares);
        if (SQUARES) store_squares(squares, tile, o);
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.used[factors.stage]);
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) int8_linear(
    const __grid_constant__ Operands o
) {
    extern __shared__ char memory[];
    Shared& shared = *static_cast<Shared*>(aligned_for_swizzle(memory));
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], 2 * CONSUMER_WARPS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&shared.known[i], 1);
            barrier_init(&shared.used[i], CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet();
    int warp = threadIdx.x / 32;
    // All registers of the program: 256 threads with 232 and 128 with 40.
    if (warp >= CONSUMER_WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 32 * CONSUMER_WARPS) copy_stages(shared, o);
        if (warp == CONSUMER_WARPS + 1) prepare_columns(shared, o);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        if (o.residual)
            multiply_tiles<true, false>(shared, o);
        else if (o.squares)
            multiply_tiles<false, true>(shared, o);
        else
            multiply_tiles<false, false>(shared, o);
    }
    __syncwarp();
    meet();  // a program's memory is there as long as the other one writes to it
}
