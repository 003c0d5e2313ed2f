// Attention to a short text by mma.sync: up to KEYS keys, of which the last may stand for many.
//
// A program keeps the keys and values of one head at a time, all that there are. Its warps take 16
// queries after another and do not wait for one another: while some wait for memory, others multiply.
// All scores of a query are there before its weights, so a maximum is never raised.

// Defined are WARPS, and BF16, whether q, k and v are bfloat16, else float16.

#include "rows.cuh"

constexpr int HEAD_DIM = 128;
constexpr int KEYS = 128;
constexpr int ROWS = 16;  // queries of a warp
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = HEAD_DIM / 8;      // of 16 bytes, of a row
constexpr float NO_KEY = -3e38f;  // the score of what is no key

struct Operands {
    const u16* q;         // [B, L, H, D]
    const u16* k;         // [B, T, H, D]
    const u16* v;         // [B, T, H, D]
    const float* weight;  // [H D] or null, of q's norm: keys are multiplied with it
    const float* norms;   // [B, L] or null: scores are
    u16* out;             // [B, L, H, D]
    int length, heads, keys, all_heads;  // of all samples
    int programs, even;  // see `next_share`
    int q_b, q_l, q_h, k_b, k_t, k_h, v_b, v_t, v_h;
    int last_bias, scale;  // bits of floats: added to the last key's scores; times all, to base 2
};

// Tiles of WARPS * ROWS queries of a head, every `step`th.
struct Share {
    int sample, head, tile, end, step;
    int next;  // where the program's next share begins, see `next_share`
};

struct Shared {
    i8 keys[KEYS * HEAD_DIM * 2];    // [KEYS, HEAD_DIM] of 16 bits, swizzled by `key_place`
    i8 values[KEYS * HEAD_DIM * 2];  // the same, by `value_place`
    float bias[KEYS];                // of scores
    Share share;                     // as registers have no room for it
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

// What a thread holds of its warp's 16 queries, as products take and leave it. Of each 32 channels it
// has eight that follow one another, of keys too: so are the summands of two products ordered.
typedef u32 Queries[HEAD_DIM / 16][4];
typedef float Scores[KEYS / 8][4];
typedef u32 Weights[KEYS / 16][4];

// Where a chunk of a row lies: of two keys four chunks, as eight threads read them, meet all banks.
__device__ __forceinline__ int key_place(int row, int chunk) {
    return (row * CHUNKS + (chunk ^ row % 2 * 4)) * 16;
}

// The same of eight values, as ldmatrix reads them.
__device__ __forceinline__ int value_place(int row, int chunk) {
    return (row * CHUNKS + (chunk ^ row % 8)) * 16;
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (BF16)
        mma_bf16(d, a, b0, b1);
    else
        mma_fp16(d, a, b0, b1);
}

// Eight channels of a key times the weights of q's norm.
__device__ __forceinline__ uint4 weighted(const uint4& packed, const float* weight) {
    float x[8];
    unpack(x, packed, BF16);
    u32 y[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        y[i] = packed_pair({x[2 * i] * weight[2 * i], x[2 * i + 1] * weight[2 * i + 1]}, BF16);
    return make_uint4(y[0], y[1], y[2], y[3]);
}

// The head's keys and values, zeros where there are none, and what is added to scores.
__device__ __forceinline__ void load_text(
    Shared& shared, const Operands& o, int sample, int head
) {
    const u16* k = o.k + sample * (long long)o.k_b + head * (long long)o.k_h;
    const u16* v = o.v + sample * (long long)o.v_b + head * (long long)o.v_h;
    const float* weight = o.weight + head * HEAD_DIM;
#pragma unroll 1
    for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        uint4 key = make_uint4(0, 0, 0, 0), value = key;
        if (row < o.keys) {
            key = *reinterpret_cast<const uint4*>(k + row * (long long)o.k_t + 8 * chunk);
            value = *reinterpret_cast<const uint4*>(v + row * (long long)o.v_t + 8 * chunk);
            if (o.weight) key = weighted(key, weight + 8 * chunk);
        }
        *reinterpret_cast<uint4*>(shared.keys + key_place(row, chunk)) = key;
        // Of 32 channels a thread's products then leave it eight that follow one another.
        const u32 pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            *reinterpret_cast<u32*>(
                shared.values + value_place(row, chunk / 4 * 4 + j) + chunk % 4 * 4) = pairs[j];
    }
    for (int i = threadIdx.x; i < KEYS; i += THREADS) {
        float last = i + 1 == o.keys ? __int_as_float(o.last_bias) : 0;
        shared.bias[i] = i < o.keys ? last : NO_KEY;
    }
    __syncthreads();
}

// And what their rows' scores are multiplied with.
__device__ __forceinline__ void load_queries(
    Queries& queries, float (&scales)[2], const Shared& shared, const Operands& o, int row
) {
    int sample = shared.share.sample;
    const u16* q = o.q + sample * (long long)o.q_b + shared.share.head * (long long)o.q_h;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int own = min(row + 8 * half, o.length - 1);
        const u16* from = q + own * (long long)o.q_l + threadIdx.x % 4 * 8;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 32; i++) {
            uint4 x = *reinterpret_cast<const uint4*>(from + 32 * i);
            queries[2 * i][half] = x.x, queries[2 * i][half + 2] = x.y;
            queries[2 * i + 1][half] = x.z, queries[2 * i + 1][half + 2] = x.w;
        }
        scales[half] = __int_as_float(o.scale);
        if (o.norms) scales[half] *= o.norms[sample * (long long)o.length + own];
    }
}

__device__ __forceinline__ void multiply_keys(
    Scores& scores, const Queries& queries, const Shared& shared
) {
    constexpr int MANY = 4;  // sums side by side
    int lane = threadIdx.x % 32, even = key_place(lane / 4, lane % 4);
    const i8 *own = shared.keys + even, *other = shared.keys + (even ^ 64);
#pragma unroll
    for (int first = 0; first < KEYS / 8; first += MANY)
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 32; i++) {
            uint4 k[MANY];
#pragma unroll
            for (int j = 0; j < MANY; j++)
                k[j] = *reinterpret_cast<const uint4*>(
                    (i % 2 ? other : own) + (first + j) * 8 * CHUNKS * 16 + i / 2 * 128);
#pragma unroll
            for (int j = 0; j < MANY; j++)
                multiply(scores[first + j], queries[2 * i], k[j].x, k[j].y);
#pragma unroll
            for (int j = 0; j < MANY; j++)
                multiply(scores[first + j], queries[2 * i + 1], k[j].z, k[j].w);
        }
}

// Of the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

// Scores to weights, as products with values take them, and 1 / the sums of the thread's two rows.
__device__ __forceinline__ void weigh(
    Weights& weights, float (&inverse)[2], Scores& scores, const float (&scales)[2],
    const Shared& shared
) {
    float most[2] = {NO_KEY, NO_KEY}, sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
        float2 bias = *reinterpret_cast<const float2*>(&shared.bias[8 * j + threadIdx.x % 4 * 2]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[j][i] = fmaf(scores[j][i], scales[i / 2], i % 2 ? bias.y : bias.x);
            most[i / 2] = fmaxf(most[i / 2], scores[j][i]);
        }
    }
    most[0] = row_max(most[0]), most[1] = row_max(most[1]);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float* own = scores[j] + 2 * half;
            float2 y = {exp2_fast(own[0] - most[half]), exp2_fast(own[1] - most[half])};
            sum[half] += y.x + y.y;
            weights[j / 2][j % 2 * 2 + half] = packed_pair(y, BF16);
        }
    inverse[0] = 1 / row_sum(sum[0]), inverse[1] = 1 / row_sum(sum[1]);
}

// Their products with the values, 32 channels at a time.
__device__ __forceinline__ void attend(
    const Weights& weights, const float (&inverse)[2], const Shared& shared, const Operands& o,
    int row
) {
    int lane = threadIdx.x % 32;
    u32 values = shared_address(shared.values) + value_place(lane % 16, lane / 16);
    long long width = (long long)o.heads * HEAD_DIM;
    u16* out = o.out + shared.share.sample * o.length * width + shared.share.head * HEAD_DIM;
#pragma unroll 1
    for (int channels = 0; channels < HEAD_DIM; channels += 32) {
        float sums[4][4] = {};
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                u32 v[4];
                load_matrices_transposed(
                    v, (values ^ (channels / 8 + j) * 16) + i * 16 * CHUNKS * 16);
                multiply(sums[j], weights[i], v[0], v[1]);
                multiply(sums[j + 1], weights[i], v[2], v[3]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 y[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* own = sums[j] + 2 * half;
                y[j] = packed_pair({own[0] * inverse[half], own[1] * inverse[half]}, BF16);
            }
            if (row + 8 * half < o.length)
                store_16(out + (row + 8 * half) * width + channels + lane % 4 * 8, y);
        }
    }
}

__device__ __forceinline__ int tiles_of_head(const Operands& o) {
    return (o.length + WARPS * ROWS - 1) / (WARPS * ROWS);
}

// Of a head the first `even` tiles are shared by `programs`. What is left of all heads, one after
// the other, is shared by the programs behind those: of it one has the tiles from `bound` 0 to 1.
__device__ __forceinline__ int bound(const Operands& o, int which) {
    int own = blockIdx.x - o.programs * o.all_heads;
    int others = gridDim.x - o.programs * o.all_heads;
    return own < 0 ? which : (own + which) * o.all_heads * (tiles_of_head(o) - o.even) / others;
}

__device__ __forceinline__ Share next_share(const Operands& o, int first) {
    int head = blockIdx.x % o.all_heads, tile = blockIdx.x / o.all_heads;
    // All heads of some rows run side by side: together they read whole rows.
    if (tile < o.programs) return {head / o.heads, head % o.heads, tile, o.even, o.programs, 1};
    int left = tiles_of_head(o) - o.even, many = min(left - first % left, bound(o, 1) - first);
    head = first / left, tile = o.even + first % left;
    return {head / o.heads, head % o.heads, tile, tile + many, 1, first + many};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) text_attention(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(256) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
#pragma unroll 1
    for (int first = bound(o, 0); first < bound(o, 1); first = shared.share.next) {
        Share share = next_share(o, first);
        __syncthreads();  // all warps are done with the head before
        if (threadIdx.x == 0) shared.share = share;
        load_text(shared, o, share.sample, share.head);
        int row = (share.tile * WARPS + threadIdx.x / 32) * ROWS + threadIdx.x % 32 / 4;
        Queries queries;
        float scales[2];
        load_queries(queries, scales, shared, o, row);
#pragma unroll 1
        while (row - threadIdx.x % 32 / 4 < min(shared.share.end * WARPS * ROWS, o.length)) {
            Scores scores = {};
            multiply_keys(scores, queries, shared);
            Weights weights;
            float inverse[2];
            weigh(weights, inverse, scores, scales, shared);
            int now = row;
            row += shared.share.step * WARPS * ROWS;
            load_queries(queries, scales, shared, o, row);
            attend(weights, inverse, shared, o, now);
        }
    }
}
