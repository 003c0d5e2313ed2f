// Convolutions of frames for Hopper: pixels x [F, H, W, C] times each tap's weights [N, C].
//
// A persistent program takes one patch of pixels of one frame after the other. One thread copies
// the patch as a tap sees it, 96 channels at a time and zeros beyond the sides, and the tap's
// weights into a ring of stages; two warpgroups multiply. The next patch's first stages arrive
// while they finish.

// Defined are BF16, whether all is bfloat16, else float16, and COLUMNS, the output channels of a
// tile: 96 or 192.

#include "hopper.cuh"

constexpr int ACROSS = 16;              // pixels of a patch in a row
constexpr int MATRICES = 192 / COLUMNS;  // of 64 pixels, that a warpgroup multiplies
constexpr int ROWS = 8 * MATRICES;      // of a patch
constexpr int PIXELS = ROWS * ACROSS;
constexpr int STAGES = 3;
constexpr int DEPTH = 96;  // channels of a stage: 64, as wide as a swizzle, and 32 more
constexpr int CONSUMER_WARPS = 8;
constexpr int THREADS = 32 * (CONSUMER_WARPS + 4);

struct Stage {
    u16 x[PIXELS * 64];  // [PIXELS, 64], swizzled
    u16 x_more[PIXELS * 32];
    u16 w[COLUMNS * 64];  // [COLUMNS, 64], swizzled
    u16 w_more[COLUMNS * 32];
};

struct Shared {
    Stage stages[STAGES];
    u64 full[STAGES];
    u64 empty[STAGES];
};

struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Of 64 channels at a time, and of 32 more.
struct Operands {
    TensorMap before_map, before_more_map;  // of the first frames [F, H, W, C], if in parts
    TensorMap x_map, x_more_map;            // of those between, or of all
    TensorMap after_map, after_more_map;    // of the last
    TensorMap w_map, w_more_map;            // of w [taps N, C]
    const u16* bias;                        // [N] or null
    const u16* residual;                    // [B, T, H, W, N] or null
    u16* y;                                 // [B, T, H, W, N]
    int apart;  // of a sample's frames so many are the last ones, and at most the first; 0: none
    int batch, frames, height, width, channels, columns;
    int taps_t, taps_h, taps_w;
    int residual_b, residual_t, residual_h, residual_w;
};

static_assert(SHARED_BYTES == SWIZZLE_ALIGNMENT + sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

// ---- tiles ----

struct Tile {
    int sample, frame, row, across, column;
};

__device__ __forceinline__ int patches_across(const Operands& o) {
    return (o.width + ACROSS - 1) / ACROSS;
}
__device__ __forceinline__ int tiles(const Operands& o) {
    int patches = patches_across(o) * ((o.height + ROWS - 1) / ROWS);
    return o.batch * patches * o.frames * (o.columns / COLUMNS);
}

// All channels of all frames of a patch follow each other: they read the same pixels.
__device__ __forceinline__ Tile tile_of(int index, const Operands& o) {
    Tile tile;
    int columns = o.columns / COLUMNS, patches = patches_across(o);
    tile.column = index % columns * COLUMNS, index /= columns;
    tile.frame = index % o.frames, index /= o.frames;
    tile.across = index % patches * ACROSS, index /= patches;
    int rows = (o.height + ROWS - 1) / ROWS;
    tile.row = index % rows * ROWS, tile.sample = index / rows;
    return tile;
}

// ---- the copying thread ----

__device__ __forceinline__ void copy_x(
    void* to, const TensorMap& map, int channel, int across, int row, int frame, u64* barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];"
        ::"r"(shared_address(to)), "l"(&map), "r"(channel), "r"(across), "r"(row), "r"(frame),
        "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void copy_w(
    void* to, const TensorMap& map, int channel, int row, u64* barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(to)), "l"(&map), "r"(channel), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// Where a frame of a sample's input is.
struct Place {
    const TensorMap &map, &more;
    int frame;
};

__device__ __forceinline__ Place place_of(int sample, int frame, const Operands& o) {
    int apart = o.apart;
    if (!apart) return {o.x_map, o.x_more_map, sample * (o.frames + o.taps_t - 1) + frame};
    if (frame >= o.frames)
        return {o.after_map, o.after_more_map, sample * apart + frame - o.frames};
    if (frame < apart)
        return {o.before_map, o.before_more_map, sample * min(apart, o.frames) + frame};
    return {o.x_map, o.x_more_map, sample * (o.frames - apart) + frame - apart};
}

__device__ __forceinline__ void copy_stages(Shared& shared, const Operands& o) {
    Ring<STAGES> ring;
    int taps = o.taps_t * o.taps_h * o.taps_w;
    for (int index = blockIdx.x; index < tiles(o); index += gridDim.x) {
        Tile tile = tile_of(index, o);
#pragma unroll 1
        for (int tap = 0; tap < taps; tap++) {
            Place x = place_of(tile.sample, tile.frame + tap / (o.taps_h * o.taps_w), o);
            int row = tile.row + tap / o.taps_w % o.taps_h - o.taps_h / 2;
            int across = tile.across + tap % o.taps_w - o.taps_w / 2;
            int columns = tap * o.columns + tile.column;
#pragma unroll 1
            for (int c = 0; c < o.channels; c += DEPTH, ring.next()) {
                barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
                u64* full = &shared.full[ring.stage];
                Stage& stage = shared.stages[ring.stage];
                barrier_expect(full, sizeof(Stage));
                copy_x(stage.x, x.map, c, across, row, x.frame, full);
                copy_x(stage.x_more, x.more, c + 64, across, row, x.frame, full);
                copy_w(stage.w, o.w_map, c, columns, full);
                copy_w(stage.w_more, o.w_more_map, c + 64, columns, full);
            }
        }
    }
}

// ---- the multiplying warpgroups ----

#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

#if COLUMNS == 96
// acc [64 pixels, 96 channels] (+)= x [64, 16] w^T, both in shared memory
__device__ __forceinline__ void mma(float (&acc)[48], u64 x, u64 w, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPE "." TYPE " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "%48, %49, p, 1, 1, 0, 0;\n"
        "}\n"
        : F16(acc, 0), F16(acc, 16), F16(acc, 32)
        : "l"(x), "l"(w), "r"(add));
}
#else
// acc [64 pixels, 192 channels] (+)= x [64, 16] w^T, both in shared memory
__device__ __forceinline__ void mma(float (&acc)[96], u64 x, u64 w, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, p, 1, 1, 0, 0;\n"
        "}\n"
        : F16(acc, 0), F16(acc, 16), F16(acc, 32), F16(acc, 48), F16(acc, 64), F16(acc, 80)
        : "l"(x), "l"(w), "r"(add));
}
#endif

constexpr int PARTS = COLUMNS / 2;  // of 64 x COLUMNS sums, that a thread has

// All of a tile's products but the last ones are done on return, those are under way.
__device__ __forceinline__ void multiply(
    Shared& shared, float (&acc)[MATRICES][PARTS], Ring<STAGES>& ring, int steps
) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 128 * 64 * MATRICES, before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++, ring.next()) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        const Stage& stage = shared.stages[ring.stage];
        u64 w = matrix_descriptor(stage.w, 128), w_more = matrix_descriptor(stage.w_more, 64);
#pragma unroll
        for (int i = 0; i < MATRICES; i++) hold(acc[i]);
        mma_begin();
#pragma unroll
        for (int i = 0; i < MATRICES; i++) {
            int pixel = first + 64 * i;
            u64 x = matrix_descriptor(stage.x + pixel * 64, 128);
            u64 x_more = matrix_descriptor(stage.x_more + pixel * 32, 64);
#pragma unroll
            for (int k = 0; k < 4; k++) mma(acc[i], x + 2 * k, w + 2 * k, step + k);
#pragma unroll
            for (int k = 0; k < 2; k++) mma(acc[i], x_more + 2 * k, w_more + 2 * k, 1);
        }
        mma_commit();
#pragma unroll
        for (int i = 0; i < MATRICES; i++) hold(acc[i]);
        if (step) {
            mma_wait<1>();
            if (lane == 0) barrier_arrive(&shared.empty[before]);
        }
        before = ring.stage;
    }
}

__device__ __forceinline__ float2 rounded(float2 x) {
    return pair_of(packed_pair(x, BF16), BF16);
}

// One pixel's channels, a quarter of them in each of four threads: rounded, and again after each of
// bias and residual is added.
__device__ __forceinline__ void store(
    const float (&acc)[PARTS], int half, const u16* bias, const u16* residual, u16* y, bool inside
) {
    int quarter = threadIdx.x % 4;
    u32 x[COLUMNS / 32][4];
    if (residual)
#pragma unroll
        for (int group = 0; group < COLUMNS / 32; group++) {
            uint4 loaded = {0, 0, 0, 0};
            if (inside)
                loaded = *reinterpret_cast<const uint4*>(residual + 32 * group + 8 * quarter);
            x[group][0] = loaded.x, x[group][1] = loaded.y;
            x[group][2] = loaded.z, x[group][3] = loaded.w;
        }
#pragma unroll
    for (int group = 0; group < COLUMNS / 32; group++) {
        if (residual) transpose(x[group]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i = 16 * group + 4 * j + 2 * half;
            float2 sum = rounded({acc[i], acc[i + 1]});
            if (bias) {
                const u16* from = bias + 32 * group + 8 * j + 2 * quarter;
                float2 add = pair_of(*reinterpret_cast<const u32*>(from), BF16);
                sum = rounded({sum.x + add.x, sum.y + add.y});
            }
            if (residual) {
                float2 add = pair_of(x[group][j], BF16);
                sum.x += add.x, sum.y += add.y;
            }
            x[group][j] = packed_pair(sum, BF16);
        }
        transpose(x[group]);
        if (inside)
            *reinterpret_cast<uint4*>(y + 32 * group + 8 * quarter) =
                make_uint4(x[group][0], x[group][1], x[group][2], x[group][3]);
    }
}

__device__ __forceinline__ void store_tile(
    const float (&acc)[MATRICES][PARTS], const Tile& tile, const Operands& o
) {
    const u16* bias = o.bias ? o.bias + tile.column : nullptr;
    long long frame = (long long)tile.sample * o.frames + tile.frame;
    long long before = (long long)tile.sample * o.residual_b + (long long)tile.frame * o.residual_t;
#pragma unroll
    for (int i = 0; i < MATRICES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int warp = threadIdx.x / 32, pixel_row = warp / 4 * 4 * MATRICES + 4 * i + warp % 4;
            int h = tile.row + pixel_row, w = tile.across + threadIdx.x % 32 / 4 + 8 * half;
            const u16* residual = nullptr;
            if (o.residual)
                residual = o.residual + before + (long long)h * o.residual_h
                    + (long long)w * o.residual_w + tile.column;
            u16* y = o.y + ((frame * o.height + h) * o.width + w) * o.columns + tile.column;
            store(acc[i], half, bias, residual, y, h < o.height && w < o.width);
        }
}

__device__ __forceinline__ void multiply_tiles(Shared& shared, const Operands& o) {
    int steps = o.taps_t * o.taps_h * o.taps_w * (o.channels / DEPTH);
    Ring<STAGES> ring;
    for (int index = blockIdx.x; index < tiles(o); index += gridDim.x) {
        float acc[MATRICES][PARTS];
        multiply(shared, acc, ring, steps);
        mma_wait<0>();
#pragma unroll
        for (int i = 0; i < MATRICES; i++) hold(acc[i]);
        if (threadIdx.x % 32 == 0)
            barrier_arrive(&shared.empty[(ring.stage + STAGES - 1) % STAGES]);
        store_tile(acc, tile_of(index, o), o);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) frames_conv(
    const __grid_constant__ Operands o
) {
    extern __shared__ char memory[];
    Shared& shared = *static_cast<Shared*>(aligned_for_swizzle(memory));
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // All registers of the program: 256 threads with 232 and 128 with 40.
    if (threadIdx.x >= 32 * CONSUMER_WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 32 * CONSUMER_WARPS) copy_stages(shared, o);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_tiles(shared, o);
    }
}
