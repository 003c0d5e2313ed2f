// RMSNorm, RoPE, block means, and for q also int8 blocks and the linear branch, in one pass; for k
// int8 blocks around a center in place of the rows.
//
// A program takes ROWS rows of several heads, whose weights wait in shared memory, as the rows leave
// the cache no room for them. So do cosines and sines, but on cards that have too little of it. A
// warp takes 16 rows. Of its rows lane / 4 and lane / 4 + 8 a thread holds the channels
// 32 m + 8 (lane % 4) + {0 .. 7}, m = 0 .. 3. Products of 16 channels take them four by four, so the
// other factor comes in the matching order, see `order` in cuda.py.

// Defined are ROWS, 64 or 128; BLOCK, rows of a block, at most ROWS; QUANTIZE, whether to make int8
// blocks; LINEAR, whether `out` gets the linear branch in place of the rows; CENTERED, whether there
// are int8 blocks of rows less a center and nothing else, swizzled; HOPPER, whether cosines and sines
// wait in shared memory, and warpgroups multiply; BF16, whether rows are bfloat16, else float16.

#include "hopper.cuh"
#include "mma.cuh"

constexpr int HEAD_DIM = 128;
constexpr int WARPS = ROWS / 16;
constexpr int THREADS = 32 * WARPS;
// What warps tell one another of a head: twice, so that they meet once a head, not twice.
constexpr int HEADS_TOLD = LINEAR && !HOPPER ? 1 : 2;
constexpr int MOST_HEADS = 8;    // of a program
// Where nothing but int8 is made of rows, registers hold a program's cosines and sines for all of its
// heads: on Hopper they wait in shared memory anyway.
constexpr bool KEPT = CENTERED && !HOPPER;
constexpr int PROGRAMS = (KEPT ? 384 : 512) / THREADS;  // of a multiprocessor
constexpr int SUMS_STRIDE = 34;  // of 32 channels: keeps what a warp writes in different banks
#if LINEAR
constexpr int MIX_STRIDE = HEAD_DIM + 8;  // in 16 bits: keeps rows in different banks
constexpr int HALF_ROWS = HEAD_DIM + 8;   // of either half of the mix, on Hopper
constexpr int HALF_BYTES = HALF_ROWS * 128;
#endif

struct Shared {
#if HOPPER
    // Cosine and sine of a pair side by side, of four pairs in 32 bytes; in odd rows their halves
    // trade places, so that two rows lie in different banks.
    float turns[ROWS][HEAD_DIM];
#endif
    float weight[MOST_HEADS][HEAD_DIM];  // of the program's heads
    float bias[HEAD_DIM];
#if CENTERED
    u16 center[MOST_HEADS][HEAD_DIM];
#endif
#if LINEAR
    // In the order of products. On Hopper two halves of the channels in [2, HALF_ROWS, 64], swizzled,
    // from the first multiple of 1024 bytes on: of 64 channels out, of the normalizer eight times, its
    // bits in twos, and of the other channels out.
#if HOPPER
    u16 mix[2 * HALF_ROWS * 64 + SWIZZLE_ALIGNMENT / 2];
    u64 mix_there;
#else
    u16 mix[HEAD_DIM * MIX_STRIDE];  // [channel out, channel in]
    float normalizer[HEAD_DIM];
#endif
#endif
    float norms[ROWS];
    float sums[HEADS_TOLD][WARPS][4 * SUMS_STRIDE];  // of a warp's rows
    float amax[HEADS_TOLD][WARPS];                   // of a warp's rows
};

struct Operands {
    const u16* x;             // [B, L, H, D], rows of 16 bits
    const float* norms;       // [B, L], 1 / root mean square of each row over all heads
    const float* weight;      // [H D]
    const float* cos;         // [B, L, D / 2]
    const float* sin;
    u16* out;                 // [B, L, H, D]
    float* means;             // [B, H, N, D]
    i8* integers;             // [B, H, N BLOCK, D]
    float* scales;            // [B, H, N]
    const u16* mix;           // [B, H] as Shared's, but for MIX_STRIDE
    const float* normalizer;  // [B, H, D]; not on Hopper
    const float* bias;        // [D]
    const u16* center;        // [B, H, D]
    int x_b, x_l, x_h, cos_b, cos_l, sin_b, sin_l;
    int length, heads, blocks, heads_each;
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

__device__ __forceinline__ float2 unpack(u32 x) { return pair_of(x, BF16); }
__device__ __forceinline__ u32 pack(float x, float y) { return packed_pair({x, y}, BF16); }
__device__ __forceinline__ float2 rounded(float x, float y) { return unpack(pack(x, y)); }

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
#if BF16
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Over the four threads of a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Half of 2 MANY values goes to the thread `distance` lanes away, whose values the other half gets.
template <int MANY>
__device__ __forceinline__ void add_half(float (&x)[16], bool upper, int distance) {
#pragma unroll
    for (int i = 0; i < MANY; i++) {
        float send = upper ? x[i] : x[MANY + i], keep = upper ? x[MANY + i] : x[i];
        x[i] = keep + __shfl_xor_sync(0xffffffff, send, distance);
    }
}

// Rows beyond the end are read as zeros.
__device__ __forceinline__ void load_rows(
    uint4 (&tile)[2][4], const uint4* x, long long stride, int row, int pair, int inside
) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < 4; m++) {
            tile[half][m] = make_uint4(0, 0, 0, 0);
            if (row + 8 * half < inside)
                tile[half][m] = x[(row + 8 * half) * stride + 4 * m + pair];
        }
}

// The cosines and sines of a sample's rows from the program's first one on.
struct Angles {
    const float* cos;
    const float* sin;
    int cos_stride, sin_stride;
};

// Cosines and sines of a row's channels 32 m + 8 pair + {0 .. 7}, for each two side by side.
__device__ __forceinline__ void load_turn(
    float2 (&turn)[4], const Shared& shared, const Angles& angles, int row, int m, int pair,
    int inside
) {
#if HOPPER
    const float4* both = reinterpret_cast<const float4*>(&shared.turns[row][32 * m + 8 * pair]);
    float4 low = both[row & 1], high = both[~row & 1];
    turn[0] = {low.x, low.y}, turn[1] = {low.z, low.w};
    turn[2] = {high.x, high.y}, turn[3] = {high.z, high.w};
#else
    long long last = min(row, inside - 1);
    float4 c = __ldg(reinterpret_cast<const float4*>(angles.cos + last * angles.cos_stride)
                     + pair + 4 * m);
    float4 s = __ldg(reinterpret_cast<const float4*>(angles.sin + last * angles.sin_stride)
                     + pair + 4 * m);
    turn[0] = {c.x, s.x}, turn[1] = {c.y, s.y}, turn[2] = {c.z, s.z}, turn[3] = {c.w, s.w};
#endif
}

typedef float2 Turns[2][4][4];  // of a thread's two rows

__device__ __forceinline__ void load_kept_turns(
    Turns& turns, const Shared& shared, const Angles& angles, int row, int pair, int inside
) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < 4; m++)
            load_turn(turns[half][m], shared, angles, row + 8 * half, m, pair, inside);
}

// Normalize, round, rotate, round: packed[half][4 m + i] holds the channels
// 32 m + 8 pair + 2 i + {0, 1}. Those `kept` are there already if KEPT.
__device__ __forceinline__ void rotate(
    u32 (&packed)[2][16], const uint4 (&tile)[2][4], const Shared& shared, const Angles& angles,
    const Turns& kept, const float* weight, int row, int pair, int inside
) {
#pragma unroll
    for (int m = 0; m < 4; m++) {
        int first = 32 * m + 8 * pair;
        float4 w[2] = {*reinterpret_cast<const float4*>(weight + first),
                       *reinterpret_cast<const float4*>(weight + first + 4)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float norm = shared.norms[row + 8 * half];
            float2 own[4];
            if (!KEPT) load_turn(own, shared, angles, row + 8 * half, m, pair, inside);
            const float2* turn = KEPT ? kept[half][m] : own;
            const u32* raw = reinterpret_cast<const u32*>(&tile[half][m]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = unpack(raw[i]);
                float wa = i % 2 ? w[i / 2].z : w[i / 2].x, wb = i % 2 ? w[i / 2].w : w[i / 2].y;
                float2 n = rounded(x.x * norm * wa, x.y * norm * wb);
                float c = turn[i].x, s = turn[i].y;
                packed[half][4 * m + i] = pack(n.x * c - n.y * s, n.x * s + n.y * c);
            }
        }
    }
}

__device__ __forceinline__ void store_rows(
    u16* out, const u32 (&packed)[2][16], long long stride, int row, int pair, int inside
) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const u32* p = &packed[half][4 * m];
            u16* to = out + (row + 8 * half) * stride + 32 * m + 8 * pair;
            if (row + 8 * half < inside)
                store_16(to, p);
        }
}

// This warp's part of the sums over a block's rows. The tensor cores turn rows to columns: the unit
// matrix times their transpose.
__device__ __forceinline__ void add_up(
    Shared& shared, const u32 (&packed)[2][16], int told, int warp, int lane
) {
    int row = lane / 4, pair = lane % 4;
    u32 one = BF16 ? 0x3f80 : 0x3c00;
    u32 diagonal = row / 2 != pair ? 0 : row % 2 ? one << 16 : one;
    const u32 unit[4] = {diagonal, 0, 0, diagonal};
    float sums[16];  // of rows 2 pair and 2 pair + 1 of either half
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float d[4] = {};
        mma(d, unit, packed[0][2 * i], packed[0][2 * i + 1]);
        mma(d, unit, packed[1][2 * i], packed[1][2 * i + 1]);
        sums[2 * i] = d[0] + d[1];
        sums[2 * i + 1] = d[2] + d[3];
    }
    add_half<8>(sums, lane & 2, 2);
    add_half<4>(sums, lane & 1, 1);
    // Of the channels 32 pair + 8 (row / 2) + row % 2 + {0, 2, 4, 6}.
    float* to = &shared.sums[told][warp][SUMS_STRIDE * pair + row / 2 * 8 + row % 2];
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = sums[i];
}

// The largest |x| of this warp's rows, NaN where one is; `highs` get each row's largest pair.
__device__ __forceinline__ float largest(u32 (&highs)[2], const u32 (&packed)[2][16]) {
    u32 lows[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        highs[half] = lows[half] = packed[half][0];
#pragma unroll
        for (int i = 1; i < 16; i++) {
            highs[half] = max_of_pairs(highs[half], packed[half][i], BF16);
            lows[half] = min_of_pairs(lows[half], packed[half][i], BF16);
        }
    }
    u32 high = max_of_pairs(highs[0], highs[1], BF16), low = min_of_pairs(lows[0], lows[1], BF16);
    high = max_of_pairs(high, low ^ 0x80008000, BF16) & 0x7fff7fff;
    // What has no sign is in the order of its bits, NaN the largest.
    return unpack(__reduce_max_sync(0xffffffff, max(high & 0xffff, high >> 16))).x;
}

#if CENTERED
// x less the center if there is a row, else 0.
__device__ __forceinline__ u32 less(u32 x, u32 center, u32 minus_one_or_zero) {
    u32 d;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(center), "r"(minus_one_or_zero), "r"(x));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(center), "r"(minus_one_or_zero), "r"(x));
#endif
    return d;
}

__device__ __forceinline__ void subtract(
    u32 (&packed)[2][16], const u16* center, int row, int pair, int inside
) {
    constexpr u32 MINUS_ONE = BF16 ? 0xbf80bf80 : 0xbc00bc00;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        uint4 quad = *reinterpret_cast<const uint4*>(center + 32 * m + 8 * pair);
        const u32 centers[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                packed[half][4 * m + i] = less(packed[half][4 * m + i], centers[i],
                                               row + 8 * half < inside ? MINUS_ONE : 0);
    }
}
#endif

// Where channels 32 m + 8 pair + {0 .. 7} of a row of integers lie.
__device__ __forceinline__ int place_of(int row, int m, int pair) {
#if CENTERED
    return row * HEAD_DIM + (2 * m + pair / 2 ^ row % 8) * 16 + pair % 2 * 8;
#else
    return row * HEAD_DIM + 32 * m + 8 * pair;
#endif
}

__device__ __forceinline__ void store_integers(
    i8* integers, const u32 (&packed)[2][16], float factor, int row, int pair
) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < 4; m++) {
            u32 bytes[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 a = unpack(packed[half][4 * m + 2 * i]);
                float2 b = unpack(packed[half][4 * m + 2 * i + 1]);
                // Adding 1.5 * 2^23 rounds half to even, and leaves the integer in the low byte. Not
                // fused: amax / 2 would be 63.5 and a little, not a tie as in the reference.
                u32 n[4] = {__float_as_uint(__fadd_rn(__fmul_rn(a.x, factor), 12582912.0f)),
                            __float_as_uint(__fadd_rn(__fmul_rn(a.y, factor), 12582912.0f)),
                            __float_as_uint(__fadd_rn(__fmul_rn(b.x, factor), 12582912.0f)),
                            __float_as_uint(__fadd_rn(__fmul_rn(b.y, factor), 12582912.0f))};
                bytes[i] = __byte_perm(__byte_perm(n[0], n[1], 0x0040),
                                       __byte_perm(n[2], n[3], 0x0040), 0x5410);
            }
            *reinterpret_cast<uint2*>(integers + place_of(row + 8 * half, m, pair)) =
                make_uint2(bytes[0], bytes[1]);
        }
}

#if LINEAR
constexpr float LOG2E = 1.4426950408889634f;

#if HOPPER
// e^x of the row less its maximum, of which `highs` are the pairs, in place.
__device__ __forceinline__ void weigh(u32 (&packed)[16], u32 highs) {
    float2 high = unpack(highs);
    float shift = -row_max(fmaxf(high.x, high.y)) * LOG2E;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float2 x = unpack(packed[i]);
        packed[i] = pack(exp2_fast(fmaf(x.x, LOG2E, shift)), exp2_fast(fmaf(x.y, LOG2E, shift)));
    }
}

__device__ __forceinline__ u32 mix_address(const Shared& shared) {
    return (shared_address(shared.mix) + SWIZZLE_ALIGNMENT - 1) & -SWIZZLE_ALIGNMENT;
}

// Starts the copy of a head's mix, by one thread.
__device__ __forceinline__ void load_mix(Shared& shared, const u16* mix) {
    barrier_expect(&shared.mix_there, 2 * HALF_BYTES);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(mix_address(shared)), "l"(mix), "n"(2 * HALF_BYTES),
        "r"(shared_address(&shared.mix_there)) : "memory");
}

static_assert(BF16);  // see `unfit` in cuda.py

// sums [64 rows of a warpgroup, 72 or 64 columns] (+)= weights [64, 16] mix^T, which is in shared
// memory
__device__ __forceinline__ void mma_mix(float (&sums)[36], const u32 (&a)[4], u64 mix, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %41, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35}, {%36, %37, %38, %39}, %40, p, 1, 1, 0;\n"
        "}\n"
        : F16(sums, 0), F16(sums, 16), F4(sums, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(mix), "r"(add));
}

__device__ __forceinline__ void mma_mix(float (&sums)[32], const u32 (&a)[4], u64 mix, int add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
        "}\n"
        : F16(sums, 0), F16(sums, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(mix), "r"(add));
}
#else
// e^x of the row less its maximum, times the normalizer, in place; the factor of the row's product.
// Both count in `unit`s.
__device__ __forceinline__ float weigh(
    u32 (&packed)[16], u32 highs, const float* normalizer, float unit, int pair
) {
    float2 high = unpack(highs);
    float shift = -row_max(fmaxf(high.x, high.y)) * LOG2E, plain = 0, total = 0;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const float4* z = reinterpret_cast<const float4*>(normalizer + 32 * m + 8 * pair);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 x = unpack(packed[4 * m + i]);
            float a = exp2_fast(fmaf(x.x, LOG2E, shift)), b = exp2_fast(fmaf(x.y, LOG2E, shift));
            float4 both = z[i / 2];
            float wa = a * (i % 2 ? both.z : both.x), wb = b * (i % 2 ? both.w : both.y);
            plain += a + b;
            total += wa + wb;
            packed[4 * m + i] = pack(wa, wb);
        }
    }
    // phi is e^x / plain: phi z / (1e-5 + sum of phi z) = e^x z / (1e-5 plain + total)
    return 1.0f / fmaf(1e-5f * unit, row_sum(plain), row_sum(total));
}

// Starts the copies of a head's mix.
__device__ __forceinline__ void load_mix(
    Shared& shared, const u16* mix, float normalizer, float unit
) {
#pragma unroll 1
    for (int i = threadIdx.x; i < HEAD_DIM * HEAD_DIM / 8; i += THREADS) {
        int row = i / 16, chunk = i % 16;
        copy_16(shared_address(shared.mix + row * MIX_STRIDE + chunk * 8), mix + 8 * i);
    }
    if (threadIdx.x < HEAD_DIM) shared.normalizer[threadIdx.x] = normalizer * unit;
}
#endif

// What product i of 16 summands each takes of a thread's two rows.
__device__ __forceinline__ void operand(u32 (&a)[4], const u32 (&weights)[2][16], int i) {
    a[0] = weights[0][2 * i], a[1] = weights[1][2 * i];
    a[2] = weights[0][2 * i + 1], a[3] = weights[1][2 * i + 1];
}

// Of 32 channels the thread's 8, which are columns of four products, of its two rows.
__device__ __forceinline__ void store_mixed_channels(
    u16* out, const float* sums, const float (&factor)[2], const float* bias, long long stride,
    int row, int channel, int inside
) {
    const float2* add = reinterpret_cast<const float2*>(bias + channel);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 mixed[4];
#pragma unroll
        for (int n = 0; n < 4; n++)
            mixed[n] = pack(fmaf(sums[4 * n + 2 * half], factor[half], add[n].x),
                            fmaf(sums[4 * n + 2 * half + 1], factor[half], add[n].y));
        if (row + 8 * half < inside)
            store_16(out + (row + 8 * half) * stride + channel, mixed);
    }
}

#if HOPPER
__device__ __forceinline__ void store_half(
    u16* out, const float* sums, const float (&factor)[2], const float* bias, long long stride,
    int row, int channel, int inside
) {
    store_mixed_channels(out, sums, factor, bias, stride, row, channel, inside);
    store_mixed_channels(out, sums + 16, factor, bias, stride, row, channel + 32, inside);
}

// sums [64 rows of a warpgroup, 72 or 64 columns] = weights [64, 128] mix^T, from a row of it on.
template <int N>
__device__ __forceinline__ void multiply(float (&sums)[N], const u32 (&weights)[2][16], u32 mix) {
    hold(sums);
    mma_begin();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
        u32 a[4];
        operand(a, weights, i);
        mma_mix(sums, a, matrix_descriptor(mix + i / 4 * HALF_BYTES, 128) + i % 4 * 2, i);
    }
    mma_commit();
    mma_wait<0>();
    hold(sums);
}

__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(x, 1e-30f)));
    return y;
}
#else
// The mixed rows of this warp: weights [16, 128] times mix [128, 128]. Of 32 channels a thread's
// columns of four products are 8 pair + {0 .. 7}, see `order` in cuda.py: 16 bytes of a row. Their
// four sums grow side by side, as a product waits for the last one of its sum.
__device__ __forceinline__ void store_mixed(
    const Shared& shared, u16* out, const u32 (&weights)[2][16], const float (&factor)[2],
    const float* bias, long long stride, int row, int lane, int inside
) {
#pragma unroll
    for (int group = 0; group < 4; group++) {
        u32 from =
            shared_address(shared.mix + (32 * group + lane % 8) * MIX_STRIDE + lane / 8 * 8);
        float sums[4][4] = {};
#pragma unroll
        for (int m = 0; m < 4; m++) {
            u32 low[4], high[4], mix[4][4];
            operand(low, weights, 2 * m);
            operand(high, weights, 2 * m + 1);
#pragma unroll
            for (int n = 0; n < 4; n++)
                load_matrices(mix[n], from + 2 * (8 * n * MIX_STRIDE + 32 * m));
#pragma unroll
            for (int n = 0; n < 4; n++) mma(sums[n], low, mix[n][0], mix[n][1]);
#pragma unroll
            for (int n = 0; n < 4; n++) mma(sums[n], high, mix[n][2], mix[n][3]);
        }
        store_mixed_channels(out, &sums[0][0], factor, bias, stride, row,
                             32 * group + 8 * (lane % 4), inside);
    }
}
#endif
#endif

// Cosines and sines of the rows, and their norms.
__device__ __forceinline__ void load_turns(
    Shared& shared, const float* norms, const Angles& angles, int inside
) {
#if HOPPER
    // Half of them at a time: one by one each would wait for memory. A thread takes four pairs.
    constexpr int QUADS = HEAD_DIM / 8, EACH = ROWS * QUADS / THREADS / 2;
#pragma unroll 1
    for (int part = 0; part < 2; part++) {
        int first = part * EACH * THREADS + threadIdx.x;
        float4 cosines[EACH], sines[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int row = (first + i * THREADS) / QUADS, quad = threadIdx.x % QUADS;
            long long last = min(row, inside - 1);  // rows beyond the end are zeros all the same
            const float* cos = angles.cos + last * angles.cos_stride;
            const float* sin = angles.sin + last * angles.sin_stride;
            cosines[i] = __ldg(reinterpret_cast<const float4*>(cos) + quad);
            sines[i] = __ldg(reinterpret_cast<const float4*>(sin) + quad);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int row = (first + i * THREADS) / QUADS, quad = threadIdx.x % QUADS;
            float4* to = reinterpret_cast<float4*>(&shared.turns[row][8 * quad]);
            to[row & 1] = make_float4(cosines[i].x, sines[i].x, cosines[i].y, sines[i].y);
            to[~row & 1] = make_float4(cosines[i].z, sines[i].z, cosines[i].w, sines[i].w);
        }
    }
#endif
    if (threadIdx.x < ROWS)
        shared.norms[threadIdx.x] = threadIdx.x < inside ? norms[threadIdx.x] : 0;
}

// Those of the program's heads, their centers, and the bias.
__device__ __forceinline__ void load_weights(
    Shared& shared, const Operands& o, int first_head, int many, int sample
) {
    if (threadIdx.x < many * HEAD_DIM / 4)
        copy_16(shared_address(shared.weight) + 16 * threadIdx.x,
                o.weight + first_head * HEAD_DIM + 4 * threadIdx.x);
#if LINEAR
    if (threadIdx.x < HEAD_DIM / 4)
        copy_16(shared_address(shared.bias) + 16 * threadIdx.x, o.bias + 4 * threadIdx.x);
#endif
#if CENTERED
    if (threadIdx.x < many * HEAD_DIM / 8)
        copy_16(shared_address(shared.center) + 16 * threadIdx.x,
                o.center + (sample * (long long)o.heads + first_head) * HEAD_DIM + 8 * threadIdx.x);
#endif
    asm volatile("cp.async.wait_all;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) prepare(
    const __grid_constant__ Operands o
) {
    // Read once: in the loop the compiler would read them again behind every barrier.
    int length = o.length, heads = o.heads, blocks = o.blocks, x_l = o.x_l, x_h = o.x_h;
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % 4;
    int row = 16 * warp + lane / 4, tiles = (length + ROWS - 1) / ROWS;
    int groups = (heads + o.heads_each - 1) / o.heads_each;
    int group = blockIdx.x % groups, tile = blockIdx.x / groups % tiles;
    int sample = blockIdx.x / (groups * tiles);
    long long first = (long long)tile * ROWS;
    int inside = min(ROWS, (int)(length - first));
    Angles angles = {o.cos + sample * (long long)o.cos_b + first * o.cos_l,
                     o.sin + sample * (long long)o.sin_b + first * o.sin_l, o.cos_l, o.sin_l};
    const u16* rows = o.x + sample * (long long)o.x_b + first * x_l;
    u16* out_rows = o.out + (sample * (long long)length + first) * heads * HEAD_DIM;
    int last = min(heads, (group + 1) * o.heads_each);
    uint4 raw[2][4];  // [ROWS, HEAD_DIM] as read, in 16 bits
    int first_head = group * o.heads_each, head = first_head;
    const uint4* head_rows = reinterpret_cast<const uint4*>(rows + (long long)head * x_h);
    load_rows(raw, head_rows, x_l / 8, row, pair, inside);
    load_weights(shared, o, head, last - head, sample);
    load_turns(shared, o.norms + sample * (long long)length + first, angles, inside);
#if LINEAR && HOPPER
    u32 parity = 0;
    if (threadIdx.x == 0) {
        barrier_init(&shared.mix_there, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#elif LINEAR
    // Keeps the normalizers, sums over all keys, in the range of float16.
    float unit = 32768.0f / max(32768, length);
    float normalizer = 0;  // of the next head
    if (threadIdx.x < HEAD_DIM)
        normalizer = o.normalizer[(sample * (long long)heads + head) * HEAD_DIM + threadIdx.x];
#endif
    __syncthreads();
    Turns kept;
    if (KEPT) load_kept_turns(kept, shared, angles, row, pair, inside);
    for (; head < last; head++) {
        u32 packed[2][16];  // [ROWS, HEAD_DIM] normalized and rotated, in 16 bits
        int told = head % HEADS_TOLD;
        long long whole_head = sample * (long long)heads + head;
#if LINEAR && !HOPPER
        load_mix(shared, o.mix + whole_head * HEAD_DIM * HEAD_DIM, normalizer, unit);
        if (head + 1 < last && threadIdx.x < HEAD_DIM)
            normalizer = o.normalizer[(whole_head + 1) * HEAD_DIM + threadIdx.x];
#endif
        const float* weight = shared.weight[head - first_head];
        rotate(packed, raw, shared, angles, kept, weight, row, pair, inside);
        head_rows += x_h / 8;
        int next_inside = head + 1 < last ? inside : 0;
#if LINEAR && HOPPER
        // Registers for the next rows are free after the products; meanwhile they come into L2.
        if (threadIdx.x / 2 < next_inside)
            fetch_line(head_rows + threadIdx.x / 2 * (long long)(x_l / 8) + threadIdx.x % 2 * 8);
#else
        load_rows(raw, head_rows, x_l / 8, row, pair, next_inside);
#endif
        add_up(shared, packed, told, warp, lane);
#if CENTERED
        subtract(packed, shared.center[head - first_head], row, pair, inside);
#endif
#if QUANTIZE || LINEAR
        u32 highs[2];
        float amax_of_warp = largest(highs, packed);
        if (lane == 0) shared.amax[told][warp] = amax_of_warp;
#endif
#if LINEAR && !HOPPER
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
        __syncthreads();
#if LINEAR && HOPPER
        // All warps are done with the last head's.
        if (threadIdx.x == 0) load_mix(shared, o.mix + whole_head * 2 * HALF_ROWS * 64);
#endif
#pragma unroll
        for (int part = 0; part < ROWS / BLOCK; part++) {
            int block = tile * (ROWS / BLOCK) + part;
            int many = min(BLOCK, inside - part * BLOCK);
            if (many > 0 && threadIdx.x < HEAD_DIM) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < BLOCK / 16; i++)
                    sum += shared.sums[told][part * (BLOCK / 16) + i]
                                      [threadIdx.x / 32 * SUMS_STRIDE + lane];
                float mean = sum / many;
#if CENTERED
                u32 center = shared.center[head - first_head][threadIdx.x];
                mean -= unpack(center).x;
#endif
                o.means[(whole_head * blocks + block) * HEAD_DIM + threadIdx.x] = mean;
            }
        }
#if QUANTIZE
        {
            int part = 16 * warp / BLOCK, block = tile * (ROWS / BLOCK) + part;
            float amax = 1e-8f;
#pragma unroll
            for (int i = 0; i < BLOCK / 16; i++)
                amax = max_or_nan(amax, shared.amax[told][part * (BLOCK / 16) + i]);
            if (part * BLOCK < inside) {
                long long at = whole_head * blocks + block;
                store_integers(o.integers + at * BLOCK * HEAD_DIM - part * BLOCK * HEAD_DIM, packed,
                               __fdiv_rn(127.0f, amax), row, pair);
                if (threadIdx.x % (2 * BLOCK) == 0) o.scales[at] = __fdiv_rn(amax, 127.0f);
            }
        }
#endif
#if LINEAR
        u16* to = out_rows + head * HEAD_DIM;
        const float* bias = shared.bias;
        long long stride = (long long)heads * HEAD_DIM;
#if HOPPER
        weigh(packed[0], highs[0]);
        weigh(packed[1], highs[1]);
        barrier_wait(&shared.mix_there, parity);
        parity ^= 1;
        u32 mix = mix_address(shared);
        float lower[36], upper[32];  // 64 channels each, and first sums with the normalizer
        multiply(lower, packed, mix);
        float factor[2] = {inverse(lower[32] + lower[33]), inverse(lower[34] + lower[35])};
        store_half(to, lower, factor, bias, stride, row, 8 * pair, inside);
        multiply(upper, packed, mix + (HALF_ROWS - 64) * 128);
        load_rows(raw, head_rows, x_l / 8, row, pair, next_inside);
        store_half(to, upper, factor, bias, stride, row, 64 + 8 * pair, inside);
#else
        float factor[2] = {weigh(packed[0], highs[0], shared.normalizer, unit, pair),
                           weigh(packed[1], highs[1], shared.normalizer, unit, pair)};
        store_mixed(shared, to, packed, factor, bias, stride, row, lane, inside);
#endif
#elif !CENTERED
        store_rows(out_rows + head * HEAD_DIM, packed, (long long)heads * HEAD_DIM, row, pair,
                   inside);
#endif
        if (HEADS_TOLD == 1) __syncthreads();
    }
}
