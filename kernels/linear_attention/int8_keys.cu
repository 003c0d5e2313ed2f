// Sums over keys in int8 by mma.sync: softmax(k)^T v, softmax(k), and the largest |v|; beside them v
// in fp8 or float16, as attention reads it.
//
// A program takes some rows of one head, TILE of them after another: while copies of the next are
// on their way, it takes the softmax of one tile's keys, eight lanes each, and multiplies the
// weights of the one before with v. For that a warp has 32 of k's channels and 64 of v's. A key is
// made of its block's scale and the head's center.

// Defined are BF16, whether v is bfloat16, else float16; FP8, whether values are e4m3, else float16;
// VALUE_LIMIT, the largest value.

#include "keys.cuh"

constexpr int HEAD_DIM = 128;
constexpr int TILE = 32;
constexpr int BLOCK = 64;  // keys that share a scale, and values that lie together
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = 2 * HEAD_DIM;
constexpr int CHUNKS = ROW_BYTES / 16;   // of a row
constexpr int WARP_K = 32, WARP_V = 64;  // channels of a warp's products
constexpr int VALUE_BYTES = BLOCK * HEAD_DIM * (FP8 ? 1 : 2);
constexpr int OWN = FP8 ? 1 : 2;  // channels of v that a lane looks at
static_assert(HEAD_DIM / WARP_K * (HEAD_DIM / WARP_V) == WARPS);
static_assert(TILE == 4 * WARPS && TILE * CHUNKS == 2 * THREADS && BLOCK == 2 * TILE);

typedef u16 Tile[TILE * HEAD_DIM];  // [TILE, HEAD_DIM], swizzled
typedef float Sums[WARP_K / 16][WARP_V / 8][4];
typedef float Totals[4];  // of the weights of 16 channels, in each of 8 columns

struct Shared {
    i8 k[2][TILE * HEAD_DIM];  // [TILE, HEAD_DIM], swizzled as in memory
    Tile v[2];
    Tile phi[2];  // the softmax of keys
    float4 center[4][8];  // log2(e) times it: of 16 channels of each of eight lanes
    float farthest;       // of the center
};

struct Operands {
    const i8* k;           // [B, K_HEADS, N BLOCK, D], swizzled
    const float* k_scale;  // [B, K_HEADS, N]
    const u16* center;     // [B, K_HEADS, D]
    i8* values;            // [B, K_HEADS, N, D, BLOCK] e4m3 or float16, swizzled
    const float* bound;    // [B, H, D], what becomes VALUE_LIMIT
    const u16* v;       // [B, L, H, D]
    float* state;       // [splits, B, H, D (of k), D (of v)]
    float* normalizer;  // [splits, B, H, D]
    float* maxima;      // [splits, B, H, D]
    int length, heads, heads_in_all, rows;  // rows of a program
    int k_heads, k_blocks;  // N
    int v_b, v_l, v_h;
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

// Where a row's chunk lies: eight rows of the same chunk, or two of each eight, meet all banks.
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ row % 8 ^ row / 8 % 4 * 2) * 16;
}

// The place of a chunk `n` further, whose bits that one's number does not have.
__device__ __forceinline__ u32 chunks_on(u32 place, int n) { return place ^ n * 16; }

// The same place for 8 or 16 rows further, whose bits that one's number does not have.
__device__ __forceinline__ u32 rows_on(u32 place, int n) {
    return chunks_on(place, n / 8 * 2) + n * ROW_BYTES;
}

__device__ __forceinline__ uint4& chunk_at(Tile& tile, u32 place) {
    return *reinterpret_cast<uint4*>(reinterpret_cast<i8*>(tile) + place);
}

// ---- copies, by all threads ----

// What of a head a thread copies next, and where the values of a block go.
struct Head {
    const i8* k;
    const float* scale;
    i8* values;
    const u16* v;
};

__device__ __forceinline__ void copy_keys(Shared& shared, int slot, Head& head) {
    static_assert(sizeof(Shared::k[0]) == 16 * THREADS);
    copy_16(shared_address(shared.k[slot]) + 16 * threadIdx.x, head.k);
    head.k += TILE * HEAD_DIM;
}

// Rows of v, of which `left` are left; the others become zeros. A thread copies a chunk of two rows.
__device__ __forceinline__ void copy_values(
    Shared& shared, int slot, Head& head, int left, int step
) {
    int row = threadIdx.x / CHUNKS;
    u32 place = shared_address(shared.v[slot]) + swizzled(row, threadIdx.x % CHUNKS);
    copy_16(place, head.v, row < left ? 16 : 0);
    copy_16(rows_on(place, 16), head.v + 16 * (long long)step, row + 16 < left ? 16 : 0);
    head.v += TILE * (long long)step;
}

// ---- weights ----

// The channel of k whose weight lies at this place of a row: lane i of eight has channels 16 i and
// on, and leaves 8 in each half.
__device__ __forceinline__ int channel_at(int place) {
    return place / 8 % 8 * 16 + place / 64 * 8 + place % 8;
}

// The softmax of this lane's key, of which it takes an eighth. A key past the end weighs nothing.
__device__ __forceinline__ void weigh(
    Shared& shared, int slot, float scale, int row, int eighth, bool inside
) {
    float x[16];
    const i8* from = shared.k[slot] + row * HEAD_DIM + (eighth ^ row % 8) * 16;
    uint4 raw = *reinterpret_cast<const uint4*>(from);
    exponents(x, {raw.x, raw.y, raw.z, raw.w}, shared.center, scale, eighth);
    weigh_key(x, are_far(scale, shared.farthest), inside);
    u32 place = swizzled(row, eighth);
    chunk_at(shared.phi[slot], place) = packed_chunk(x);
    chunk_at(shared.phi[slot], chunks_on(place, 8)) = packed_chunk(x + 8);
}

// ---- products ----

__device__ __forceinline__ void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (BF16)
        mma_bf16(sum, a, b0, b1);
    else
        mma_fp16(sum, a, b0, b1);
}

// sums += phi^T v of a tile. Both lie by keys, products want them by channels. Of two warps with
// the same channels of k each adds up the weights of 16.
__device__ __forceinline__ void multiply(
    Sums& sums, Totals& totals, const Tile& phi, const Tile& v, int warp, int lane
) {
    const u32 ones = BF16 ? 0x3f803f80 : 0x3c003c00;
    int k_chunk = warp / 2 * (WARP_K / 8) + lane / 8 % 2, k_row = lane / 16 * 8 + lane % 8;
    int v_chunk = warp % 2 * (WARP_V / 8) + lane / 16, v_row = lane / 8 % 2 * 8 + lane % 8;
    u32 phi_at = shared_address(phi) + swizzled(k_row, k_chunk);
    u32 v_at = shared_address(v) + swizzled(v_row, v_chunk);
#pragma unroll
    for (int key = 0; key < TILE; key += 16) {
        u32 a[WARP_K / 16][4], half[4];
#pragma unroll
        for (int m = 0; m < WARP_K / 16; m++)
            load_matrices_transposed(a[m], rows_on(chunks_on(phi_at, 2 * m), key));
#pragma unroll
        for (int i = 0; i < 4; i++) half[i] = warp % 2 ? a[1][i] : a[0][i];
        mma(totals, half, ones, ones);
#pragma unroll
        for (int n = 0; n < WARP_V / 8; n += 2) {
            u32 b[4];
            load_matrices_transposed(b, rows_on(chunks_on(v_at, n), key));
#pragma unroll
            for (int m = 0; m < WARP_K / 16; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) mma(sums[m][n + i], a[m], b[2 * i], b[2 * i + 1]);
        }
    }
}

__device__ __forceinline__ void store_state(const Sums& sums, float* state, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < WARP_K / 16; m++)
#pragma unroll
        for (int n = 0; n < WARP_V / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = channel_at(warp / 2 * WARP_K + 16 * m + 8 * half + lane / 4);
                int column = warp % 2 * WARP_V + 8 * n + 2 * (lane % 4);
                *reinterpret_cast<float2*>(state + row * HEAD_DIM + column) =
                    make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
            }
}

__device__ __forceinline__ void store_totals(
    const Totals& totals, float* normalizer, int warp, int lane
) {
    int place = warp / 2 * WARP_K + warp % 2 * 16 + lane / 4;
    if (lane % 4) return;
    normalizer[channel_at(place)] = totals[0];
    normalizer[channel_at(place + 8)] = totals[2];
}

// ---- values ----

// What a lane knows of its own channels of v.
struct Channels {
    u32 maxima[OWN];  // of |v|, of even and of odd keys
    float factor[OWN];  // that makes values of v
    u32 high[OWN];      // two of the largest: of v itself before it becomes e4m3, else of values
};

__device__ __forceinline__ int own_channel(int i, int warp, int lane) {
    int chunk = FP8 ? warp / 2 * 4 + warp % 2 + lane % 4 / 2 * 2 : 2 * warp + i;
    return 8 * chunk + lane / 4;
}

// Of a tile of v the warp's 16 channels. A lane gets, in pairs, 8 keys side by side of each of its
// two channels, or of its only one 16 in the order of e4m3: two of the first eight and two of the
// last.
__device__ __forceinline__ void load_own(u32 (&pairs)[2][4], const Tile& v, int warp, int lane) {
    int row = lane / 8 * 2 + lane % 2;
    if (FP8) {
        int chunk = warp / 2 * 4 + warp % 2 + lane / 4 % 2 * 2;
        u32 from = shared_address(v) + swizzled(row + lane / 2 % 2 * 16, chunk);
        load_matrices_transposed(pairs[0], from);
        load_matrices_transposed(pairs[1], rows_on(from, 8));
    } else {
        u32 from = shared_address(v) + swizzled(row + lane % 8 / 2 * 8, 2 * warp);
        load_matrices_transposed(pairs[0], from);
        load_matrices_transposed(pairs[1], chunks_on(from, 1));
    }
}

__device__ __forceinline__ void raise_maxima(Channels& own, const u32 (&pairs)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32& maxima = own.maxima[FP8 ? 0 : i];
            maxima = max_of_pairs(maxima, pairs[i][j] & 0x7fff7fff, BF16);
        }
}

// Of what two or four lanes know.
__device__ __forceinline__ void store_maxima(
    const Channels& own, float* maxima, int warp, int lane
) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        float2 both = pair_of(own.maxima[i], BF16);
        float highest = max_or_nan(both.x, both.y);
        highest = max_or_nan(highest, __shfl_xor_sync(0xffffffff, highest, 1));
        if (!FP8) highest = max_or_nan(highest, __shfl_xor_sync(0xffffffff, highest, 2));
        maxima[own_channel(i, warp, lane)] = highest;
    }
}

__device__ __forceinline__ void set_limits(
    Channels& own, const float* bounds, int warp, int lane
) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        float bound = bounds[own_channel(i, warp, lane)], high = FP8 ? bound : VALUE_LIMIT;
        own.factor[i] = __fdiv_rn(1.0f, bound) * VALUE_LIMIT;
        own.high[i] = packed_pair({high, high}, FP8 && BF16);
    }
}

// Pairs that are at most `high` and at least minus it.
__device__ __forceinline__ u32 limited(u32 pair, u32 high, bool bf16) {
    return max_of_pairs(min_of_pairs(pair, high, bf16), high ^ 0x80008000, bf16);
}

// Of a tile, the first or the second half of a block's keys.
__device__ __forceinline__ void store_values(
    const Channels& own, const u32 (&pairs)[2][4], i8* block, int half, int warp, int lane
) {
    u32 x[4];
#if FP8
    float factor = own.factor[0];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 first = pair_of(limited(pairs[0][j], own.high[0], BF16), BF16);
        float2 last = pair_of(limited(pairs[1][j], own.high[0], BF16), BF16);
        x[j] = packed_fp8(first.x * factor, first.y * factor, last.x * factor, last.y * factor);
    }
    int channel = own_channel(0, warp, lane);
    u32 to = channel * BLOCK + (lane % 2 ^ channel / 2 % 4) * 16;
    store_16(block + chunks_on(to, 2 * half), x);
#else
#pragma unroll
    for (int i = 0; i < OWN; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 both = pair_of(pairs[i][j], BF16);
            u32 scaled = packed_pair({both.x * own.factor[i], both.y * own.factor[i]}, false);
            x[j] = limited(scaled, own.high[i], false);
        }
        int channel = own_channel(i, warp, lane);
        u32 to = channel * (2 * BLOCK) + (lane % 4 ^ channel % 8) * 16;
        store_16(block + chunks_on(to, 4 * half), x);
    }
#endif
}

// ---- the kernel ----

__device__ __forceinline__ Head head_of(const Operands& o, int sample, int number, int row) {
    Head head;
    long long k_head = sample * (long long)o.k_heads + number;
    long long block = k_head * o.k_blocks + row / BLOCK;
    head.k = o.k + block * (BLOCK * HEAD_DIM) + 16 * threadIdx.x;
    head.scale = o.k_scale + block;
    head.values = o.values + block * VALUE_BYTES;
    const u16* v = o.v + sample * (long long)o.v_b + number * o.v_h;
    v += row * (long long)o.v_l;
    head.v = v + threadIdx.x / CHUNKS * (long long)o.v_l + 8 * (threadIdx.x % CHUNKS);
    return head;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) key_value_state(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(256) char memory[];  // for chunks_on
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = 4 * warp + lane / 8;
    // All heads of some rows run side by side: together they read whole rows.
    int whole_head = blockIdx.x % o.heads_in_all, sample = whole_head / o.heads;
    int begin = blockIdx.x / o.heads_in_all * o.rows;
    int left = min(o.rows, o.length - begin);  // rows of this and all later tiles
    Head head = head_of(o, sample, whole_head % o.heads, begin);
    copy_keys(shared, 0, head);
    copy_values(shared, 0, head, left, o.v_l);
    copy_keys(shared, 1, head);
    copy_commit();
    Channels own = {};
    int k_head = sample * o.k_heads + whole_head % o.heads;
    if (warp == 0) {
        const u16* four = o.center + k_head * HEAD_DIM + 16 * (lane % 8) + 4 * (lane / 8);
        shared.farthest = load_center(shared.center, *reinterpret_cast<const uint2*>(four));
    }
    set_limits(own, o.bound + whole_head * HEAD_DIM, warp, lane);
    Sums sums = {};
    Totals totals = {};
    copy_wait<0>();
    __syncthreads();
    float scale = LOG2E * *head.scale;
    weigh(shared, 0, scale, row, lane % 8, row < left);
#pragma unroll 1
    for (; left > 0; left -= BLOCK) {
        float next_scale = left > BLOCK ? LOG2E * *++head.scale : scale;
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            int later = left - (slot + 1) * TILE;  // rows of later tiles
            bool another = slot == 0 || left > BLOCK;  // in whole blocks
            copy_wait<0>();
            __syncthreads();  // this tile's weights and v are there, and the next one's keys
            if (another) copy_values(shared, slot ^ 1, head, later, o.v_l);
            if (left > BLOCK) copy_keys(shared, slot, head);
            copy_commit();
            if (slot == 1) scale = next_scale;
            if (another) weigh(shared, slot ^ 1, scale, row, lane % 8, row < later);
            u32 pairs[2][4];
            load_own(pairs, shared.v[slot], warp, lane);
            raise_maxima(own, pairs);
            store_values(own, pairs, head.values, slot, warp, lane);
            multiply(sums, totals, shared.phi[slot], shared.v[slot], warp, lane);
        }
        head.values += VALUE_BYTES;
    }
    long long at = (long long)blockIdx.x * HEAD_DIM;
    store_state(sums, o.state + at * HEAD_DIM, warp, lane);
    store_totals(totals, o.normalizer + at, warp, lane);
    store_maxima(own, o.maxima + at, warp, lane);
}
