// INT8 linear by mma.sync: x [B, L, K] times the transpose of w [N, K], and what follows it.
//
// A persistent program takes one tile of TILE_L x TILE_N after another, a warp WARP_L x WARP_N of
// it. Steps of STEP bytes of k are copied some steps ahead, across the ends of tiles: the next tile's
// first steps arrive while this one is finished. So the loop over steps runs in parts, that copy this
// tile's and that copy the next one's, and does not ask at each step. What comes next is read from
// shared memory while products are under way, and copies are started behind it: it must not wait for
// them.
//
// With a scale for each row of both the sums stay integers over all of k. A warp keeps its w of 32
// bytes of k in registers and takes 16 rows of x at a time, back and forth along w, so neighbours
// share an operand: from registers alone that takes 4 % less power. With a scale for each block of
// 128 x 128 (BLOCKS) a step is a block; a warp keeps its x, and the sums of sixteen columns at a time
// join float32 sums. No other warp reads its rows of x: it copies them itself, a step ahead, as soon as
// it has read the ones before. w lies in STAGES places, each with two barriers: all of it is there, all
// warps have read it. So a warp need not wait for one that is a step behind, and all meet once a tile.

// Defined are WARPS_L and WARPS_N, warps along L and N; WARP_L and WARP_N, a warp's rows and
// columns; STEP; STAGES; PROGRAMS, how many share a multiprocessor; BLOCKS; RESIDUAL and SQUARES,
// whether there are any, but if BLOCKS, where the operands tell; BF16, whether bias, residual and out
// are bfloat16, else float16.

#include "mma.cuh"

constexpr int TILE_L = WARPS_L * WARP_L;
constexpr int TILE_N = WARPS_N * WARP_N;
constexpr int THREADS = 32 * WARPS_L * WARPS_N;
constexpr int TALL = 8;     // tiles along L that share weights before N moves on
constexpr int BLOCK = 128;  // rows and columns that share a scale if BLOCKS
// All threads copy 16 bytes each, this many rows.
constexpr int CHUNKS = STEP / 16;
constexpr int COPY_ROWS = THREADS / CHUNKS;
constexpr int X_COPIES = TILE_L / COPY_ROWS;
constexpr int W_COPIES = TILE_N / COPY_ROWS;
constexpr int DEPTHS = STEP / 32;  // products along a step
constexpr int ROWS = WARP_L / 16;  // products along a warp's rows
// Whether w's columns are copied in the order that `store` wants, or threads trade them there. That
// costs a tile's end, but the assembler orders the loops over k better: by measurement, each is the
// faster one where it is. So it is with the bytes of a row that come into L2 at a time.
constexpr bool IN_ORDER = BLOCKS || !SQUARES;
constexpr int FETCHED = BLOCKS || RESIDUAL ? 128 : 256;
// Programs that begin at once end their tiles at once, all asking memory for what they add and write.
// With a scale for each row they begin within so many cycles.
constexpr u32 APART = BLOCKS ? 0 : 8000;
// sm_80 converts integers slowly, where it takes exponentials. There the sums of a block add up on
// top of the bits of 1.5 * 2^23: as float32 they are 1.5 * 2^23 + sum.
constexpr bool CONVERTS = __CUDA_ARCH__ >= 860;
constexpr int SUM_ZERO = CONVERTS ? 0 : 0x4B400000;
constexpr float SUM_ZERO_VALUE = 12582912.0f;
static_assert(128 * 128 * BLOCK < 1 << 22);
static_assert(TILE_L % COPY_ROWS == 0 && TILE_N % COPY_ROWS == 0 && COPY_ROWS % 32 == 0);
static_assert(WARP_N % 32 == 0);  // for `store`
static_assert(!BLOCKS || (STEP == BLOCK && BLOCK % WARP_L == 0 && BLOCK % WARP_N == 0));
static_assert(!BLOCKS || WARPS_N == 1);

#if !BLOCKS
struct Stage {
    i8 x[TILE_L * STEP];  // [TILE_L, STEP], swizzled
    i8 w[TILE_N * STEP];  // [TILE_N, STEP], swizzled, its rows in the order of `column_of`
};
#endif

struct Tile {
    int sample, row, column;
};

struct Shared {
#if BLOCKS
    i8 x[TILE_L * STEP];          // [TILE_L, STEP], swizzled
    i8 w[STAGES][TILE_N * STEP];  // [TILE_N, STEP], swizzled, its rows in the order of `column_of`
    u64 full[STAGES], empty[STAGES];
#else
    Stage stages[STAGES];
#endif
    float gate[TILE_N];  // of the tile
    u16 bias[TILE_N];
    // Scales of the tile's columns and rows, unless BLOCKS.
    float column_scale[BLOCKS ? 1 : TILE_N];
    float row_scale[BLOCKS ? 1 : TILE_L];
    Tile tiles[3];  // the one before, this and the next, in turns
};

struct Operands {
    const i8* x;           // [B, L, K]
    const float* x_scale;  // [B, L], or [B, L / BLOCK, K / BLOCK]
    const i8* w;           // [N, K]
    const float* w_scale;  // [N], or [N / BLOCK, K / BLOCK]
    const u16* bias;       // [N] or null
    const float* gate;     // [B, N] or null
    const u16* residual;   // [B, L, N] or null
    u16* out;              // [B, L, N]
    float* squares;        // [B, N / WARP_N, L] or null: sums of each row's squares, a warp's each
    int batch, length, n, k;
    int x_b, x_l, w_n, gate_b, residual_b, residual_l, out_b, out_l;
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

// ---- tiles ----

constexpr __device__ __forceinline__ int parts(int size, int part) {
    return (size + part - 1) / part;
}

__device__ __forceinline__ int tiles(const Operands& o) {
    return o.batch * parts(o.n, TILE_N) * parts(o.length, TILE_L);
}

// Beyond the last tile it is that one again: it is copied and nothing else.
__device__ __forceinline__ Tile tile_of(int index, const Operands& o) {
    index = min(index, tiles(o) - 1);
    int across = parts(o.n, TILE_N), down = parts(o.length, TILE_L), each = across * down;
    int of_group = TALL * across, in_sample = index % each, in_group = in_sample % of_group;
    int first = in_sample / of_group * TALL, many = min(TALL, down - first);
    return {index / each, (first + in_group % many) * TILE_L, in_group / many * TILE_N};
}

// The steps of a tile. So many at least that copies are never two tiles ahead.
__device__ __forceinline__ int steps(const Operands& o) {
    return max(parts(o.k, STEP), STAGES + 1);
}

// ---- copies ----

// Where 16 bytes of a row lie in a stage: eight rows of the same chunk meet all banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * STEP + (chunk ^ row / (128 / STEP) % CHUNKS) * 16;
}

// The column that row `row` of a stage's w is. A product leaves a thread two columns of eight. Of
// four products it gets eight that follow one another if IN_ORDER, 16 bytes of a row.
__device__ __forceinline__ int column_of(int row) {
    return IN_ORDER ? row / 32 * 32 + row % 8 / 2 * 8 + row / 8 % 4 * 2 + row % 2 : row;
}

// Rows from one of those that a thread copies of x to the next. If BLOCKS they are its warp's.
constexpr int X_APART = BLOCKS ? 4 : COPY_ROWS;

// What a thread copies of x and w: a chunk of some rows.
struct Copies {
    u32 to_x, to_w;     // places in a stage
    const i8 *x, *w;    // of its first row and column, at the step that is copied next
    int rows, columns;  // from these to the last
    int k_x, k_w;       // from that step's chunk to the end; unless BLOCKS k_x is both
};

__device__ __forceinline__ int own_row() {
    return BLOCKS ? threadIdx.x / 32 * WARP_L + threadIdx.x % 32 / CHUNKS : threadIdx.x / CHUNKS;
}

// 32 bits hold the distance from a tensor's first byte, see `unfit` in mma.py. That of a row beyond the
// last may not fit, but is not read.
__device__ __forceinline__ void turn_x(Copies& copies, const Tile& tile, const Operands& o) {
    int k = threadIdx.x % CHUNKS * 16, row = tile.row + own_row();
    copies.x = o.x + (u32(tile.sample) * o.x_b + u32(row) * o.x_l + k);
    copies.rows = o.length - row, copies.k_x = o.k - k;
}

__device__ __forceinline__ void turn_w(Copies& copies, const Tile& tile, const Operands& o) {
    int k = threadIdx.x % CHUNKS * 16, column = tile.column + column_of(threadIdx.x / CHUNKS);
    copies.w = o.w + (u32(column) * o.w_n + k);
    copies.columns = o.n - column, copies.k_w = o.k - k;
}

// So many bytes on, from one address to the next: the compiler would multiply for each.
__device__ __forceinline__ const i8* further(const i8* from, u32 bytes) {
    from += bytes;
    asm("" : "+l"(from));
    return from;
}

// Part `part` of a step, all threads a chunk each; `from` goes on to the next. What lies beyond the last
// row and k is 0. Four rows on, `swizzled` gives other banks.
__device__ __forceinline__ void copy_x(
    const Copies& copies, const i8*& from, u32 stage, int part, const Operands& o
) {
    u32 to = BLOCKS && part % 2 ? copies.to_x ^ 64 : copies.to_x;
    copy_16_or_zeros<FETCHED>(stage + to + part * X_APART * STEP, from,
                              !(copies.k_x > 0 && copies.rows > X_APART * part));
    from = further(from, X_APART * u32(o.x_l));
}

__device__ __forceinline__ void copy_w(
    const Copies& copies, const i8*& from, u32 stage, int part, const Operands& o
) {
    int k = BLOCKS ? copies.k_w : copies.k_x;
    copy_16_or_zeros<FETCHED>(stage + copies.to_w + part * COPY_ROWS * STEP, from,
                              !(k > 0 && copies.columns > COPY_ROWS * part));
    from = further(from, COPY_ROWS * u32(o.w_n));
}

__device__ __forceinline__ void next_x(Copies& copies) { copies.x += STEP, copies.k_x -= STEP; }
__device__ __forceinline__ void next_w(Copies& copies) { copies.w += STEP, copies.k_w -= STEP; }

// What `store` needs of the tile's rows and columns.
__device__ __forceinline__ void copy_factors(Shared& shared, const Tile& tile, const Operands& o) {
    static_assert(THREADS >= TILE_L && THREADS >= TILE_N / 2);
    int at = 2 * threadIdx.x, column = min(tile.column + at, o.n - 2);
    if (at < TILE_N) {
        const float* gate = o.gate + (long long)tile.sample * o.gate_b;
        if (!BLOCKS) copy_8(shared_address(&shared.column_scale[at]), o.w_scale + column);
        if (o.bias) copy_4(shared_address(&shared.bias[at]), o.bias + column);
        if (o.gate) copy_8(shared_address(&shared.gate[at]), gate + column);
    }
    if (!BLOCKS && threadIdx.x < TILE_L) {
        int row = min(tile.row + int(threadIdx.x), o.length - 1);
        copy_4(shared_address(&shared.row_scale[threadIdx.x]),
               o.x_scale + (long long)tile.sample * o.length + row);
    }
}

// Starts to fetch the tile's residual into L2, by lines of 128 bytes.
__device__ __forceinline__ void fetch_residual(const Tile& tile, const Operands& o) {
    constexpr int lines = TILE_N / 64;  // of a row
    static_assert(TILE_L * lines % THREADS == 0);
    const u16* residual = o.residual + (long long)tile.sample * o.residual_b;
#pragma unroll
    for (int first = 0; first < TILE_L * lines; first += THREADS) {
        int line = first + threadIdx.x;
        int row = tile.row + line / lines, column = tile.column + line % lines * 64;
        if (o.residual && row < o.length && column < o.n)
            fetch_line(residual + (long long)row * o.residual_l + column);
    }
}

// ---- products ----

__device__ __forceinline__ int next_turn(int turn) { return turn == 2 ? 0 : turn + 1; }

// Where this lane reads its warp's rows of x and w, in a stage.
struct Places {
    u32 x, w;
};

// x by 16 rows of 32 bytes; w too, but if BLOCKS by 8 rows of 64 bytes.
__device__ __forceinline__ Places places() {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int x_row = warp / WARPS_N * WARP_L, w_row = warp % WARPS_N * WARP_N;
    u32 x = swizzled(x_row + lane % 16, lane / 16);
    u32 w = BLOCKS ? swizzled(w_row + lane % 8, lane / 8)
                   : swizzled(w_row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    return {x, (BLOCKS ? 0 : TILE_L * STEP) + w};
}

// Rows 16 m .. 16 m + 15 of the warp's x, at a depth of 32 bytes.
__device__ __forceinline__ void load_x(
    u32 (&x)[4], u32 stage, const Places& at, int m, int depth
) {
    load_matrices(x, stage + (at.x ^ 32 * depth) + m * 16 * STEP);
}

#if BLOCKS

constexpr int COLUMNS = 16;  // of w that a warp takes at once
constexpr int GROUPS = WARP_N / COLUMNS;
constexpr int AHEAD = 3;  // steps that w is copied ahead
static_assert(AHEAD < STAGES);
// Before which groups of columns a step of x and one of w are copied. x's place is free when all of
// it is in registers.
constexpr int GROUP_X = 2, GROUP_W = 3;

typedef float Sums[ROWS][WARP_N / 8][4];

// Half a step of sixteen of the warp's columns.
__device__ __forceinline__ void load_w(
    u32 (&w)[2][4], u32 stage, const Places& at, int group, int half
) {
#pragma unroll
    for (int n = 0; n < 2; n++)
        load_matrices(w[n], stage + (at.w ^ 64 * half) + (2 * group + n) * 8 * STEP);
}

__device__ __forceinline__ void start(Shared& shared, Copies& copies, const Operands& o) {
    const i8* from = copies.x;
#pragma unroll
    for (int part = 0; part < X_COPIES; part++)
        copy_x(copies, from, shared_address(shared.x), part, o);
    copy_commit();
    next_x(copies);
#pragma unroll
    for (int place = 0; place < AHEAD; place++) {
        from = copies.w;
#pragma unroll
        for (int part = 0; part < W_COPIES; part++)
            copy_w(copies, from, shared_address(shared.w[place]), part, o);
        next_w(copies);
        barrier_arrive_behind_copies(shared_address(&shared.full[place]));
    }
    copy_wait<0>();
    barrier_wait(shared_address(&shared.full[0]), 0);
    __syncwarp();
}

__device__ __forceinline__ void multiply_depth(
    int (&sum)[4], const u32 (&x)[4], const u32 (&w)[4], int depth, bool first
) {
    const int zero[4] = {SUM_ZERO, SUM_ZERO, SUM_ZERO, SUM_ZERO};
    u32 low = w[depth % 2 * 2], high = w[depth % 2 * 2 + 1];
    if (first)
        mma_int8(sum, x, low, high, zero);
    else
        mma_int8(sum, x, low, high, sum);
}

__device__ __forceinline__ float value_of(int sum) {
    return CONVERTS ? float(sum) : __int_as_float(sum) - SUM_ZERO_VALUE;
}

__device__ __forceinline__ void add_scaled(
    Sums& sums, const int (&sum)[ROWS][2][4], int group, float scale
) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int m = 0; m < ROWS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& to = sums[m][2 * group + n][i];
                to = fmaf(value_of(sum[m][n][i]), scale, to);
            }
}

// What the sums of the warp's blocks are multiplied with, of 32 steps from `first` on: a lane's each.
__device__ __forceinline__ float load_scales(const Tile& tile, int first, const Operands& o) {
    int k_blocks = parts(o.k, BLOCK), down = parts(o.length, BLOCK);
    int row = min(tile.row + int(threadIdx.x) / 32 * WARP_L, o.length - 1) / BLOCK;
    int step = min(first + int(threadIdx.x % 32), k_blocks - 1);
    float x = o.x_scale[(long long)(row + tile.sample * down) * k_blocks + step];
    int column = min(tile.column / BLOCK, (o.n - 1) / BLOCK);
    return x * o.w_scale[(long long)column * k_blocks + step];
}

// Never called. The assembler moves nothing across the place of a call: it orders the loop over k better
// in pieces. Where they end was found by measuring.
__device__ __noinline__ void cut(const Operands& o) { o.out[threadIdx.x] = 0; }

// The place of w that a warp reads, and the parity of its turn around all of them.
struct Turn {
    int place, parity;
};

// All of a tile's products. The loop begins with a step's last columns.
__device__ __forceinline__ void multiply(
    Sums& sums, Shared& shared, Turn& now, Copies& copies, int turn, const Operands& o
) {
    constexpr int w_bytes = TILE_N * STEP;
    const Tile &tile = shared.tiles[turn], &next_tile = shared.tiles[next_turn(turn)];
    Places at = places();
    u32 all_x = shared_address(shared.x), all_w = shared_address(shared.w);
    u32 full = shared_address(shared.full), empty = shared_address(shared.empty);
    u32 stage = all_w + now.place * w_bytes, following = 0;
    float scale = 0, scales = load_scales(tile, 0, o);  // of this step, and of 32
    int step = 0;                                       // so many have begun
    u32 x[ROWS][DEPTHS][4], w[2][2][4];
    auto products = [&](int group, bool last) {
        u32 from = last ? following : stage;
        int next = (group + 1) % GROUPS, sum[ROWS][2][4];
        if (group != 0 && group != 3 && group != GROUPS - 1)
            if (step < -1) cut(o);
#pragma unroll
        for (int i = 0; i < DEPTHS; i++) {
            // The next x of the depth that comes first is read last: sums take its registers.
            int depth = last ? (i + DEPTHS - 1) % DEPTHS : i;
#pragma unroll
            for (int j = 0; j < 2 * ROWS; j++) {
                int m = i % 2 ? ROWS - 1 - j / 2 : j / 2, n = (i + j / 2 + j) % 2;
                multiply_depth(sum[m][n], x[m][depth], w[depth / 2][n], depth, i == 0);
            }
#pragma unroll
            for (int m = 0; last && i && m < ROWS; m++) load_x(x[m][depth], all_x, at, m, depth);
            if (i == (last ? 2 : 1)) load_w(w[0], from, at, next, 0);
            if (i == DEPTHS - 1) load_w(w[1], from, at, next, 1);
        }
#pragma unroll
        for (int m = 0; last && m < ROWS; m++)
            load_x(x[m][DEPTHS - 1], all_x, at, m, DEPTHS - 1);
        add_scaled(sums, sum, group, scale);
    };
    auto first_groups = [&] {
        scale = __shfl_sync(0xffffffff, scales, u32(step++) % 32);
        // Where w is copied to was read STAGES - AHEAD steps ago.
        int to = now.place + AHEAD >= STAGES ? now.place + AHEAD - STAGES : now.place + AHEAD;
        u32 read = now.parity ^ (now.place + AHEAD < STAGES);
#pragma unroll
        for (int group = 0; group + 1 < GROUPS; group++) {
            if (group == GROUP_X) {
                __syncwarp();
                const i8* from = copies.x;
#pragma unroll
                for (int part = 0; part < X_COPIES; part++) copy_x(copies, from, all_x, part, o);
                copy_commit();
            }
            if (group == GROUP_W) {
                barrier_wait(empty + 8 * to, read);
                const i8* from = copies.w;
#pragma unroll
                for (int part = 0; part < W_COPIES; part++)
                    copy_w(copies, from, all_w + to * w_bytes, part, o);
                barrier_arrive_behind_copies(full + 8 * to);
            }
            products(group, false);
        }
        next_x(copies);
        next_w(copies);
    };
    auto last_group = [&] {
        bool around = now.place + 1 == STAGES;
        Turn next = {around ? 0 : now.place + 1, now.parity ^ around};
        following = all_w + next.place * w_bytes;
        copy_wait<0>();
        __syncwarp();
        barrier_wait(full + 8 * next.place, next.parity);
        products(GROUPS - 1, true);
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * now.place);
        now = next;
        stage = following;
    };
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int depth = 0; depth < DEPTHS; depth++) load_x(x[m][depth], all_x, at, m, depth);
    load_w(w[0], stage, at, 0, 0), load_w(w[1], stage, at, 0, 1);
    first_groups();
    int all = steps(o), turns_x = all - 1, turns_w = all - AHEAD;
#pragma unroll 1
    while (step < all) {  // 32 steps at most, to where their copies turn
        if (step == turns_w) {
            copy_factors(shared, tile, o);
            fetch_residual(tile, o);
        }
        if (step == turns_x) turn_x(copies, next_tile, o);
        if (step == turns_w) turn_w(copies, next_tile, o);
        if (step % 32 == 0) scales = load_scales(tile, step, o);
        int until = min(step / 32 * 32 + 32, all);
        if (step < turns_x) until = min(until, turns_x);
        if (step < turns_w) until = min(until, turns_w);
#pragma unroll 1
        while (step < until) {
            last_group();
            first_groups();
        }
    }
    last_group();
}

#else

constexpr int PENDING = STAGES - 2;  // steps on their way when the next one is there

// Where a step's copies have come to.
struct From {
    const i8 *x, *w;
};

// MANY of the parts of a step's copies, from `first` on: those of x, then those of w.
template <int MANY>
__device__ __forceinline__ void copy_parts(
    const Copies& copies, From& from, u32 stage, int first, const Operands& o
) {
#pragma unroll
    for (int part = first; part < first + MANY; part++) {
        if (part < X_COPIES)
            copy_x(copies, from.x, stage, part, o);
        else if (part < X_COPIES + W_COPIES)
            copy_w(copies, from.w, stage, part - X_COPIES, o);
    }
}

__device__ __forceinline__ void next_step(Copies& copies) {
    next_x(copies);
    next_w(copies);
}

__device__ __forceinline__ int after(int slot) { return slot + 1 == STAGES ? 0 : slot + 1; }
__device__ __forceinline__ int before(int slot) { return slot ? slot - 1 : STAGES - 1; }

__device__ __forceinline__ u32 stage_address(const Shared& shared, int slot) {
    return shared_address(shared.stages) + slot * sizeof(Stage);
}

// The copies of this tile are all under way: those of the next follow, and what `store` needs.
__device__ __forceinline__ void turn_to_next(
    Copies& copies, Shared& shared, int turn, const Operands& o
) {
    turn_x(copies, shared.tiles[next_turn(turn)], o);
    turn_w(copies, shared.tiles[next_turn(turn)], o);
    copy_factors(shared, shared.tiles[turn], o);
    if (RESIDUAL) fetch_residual(shared.tiles[turn], o);
}

// Ends a step's copies, and waits until the next step is there and all have read this one.
__device__ __forceinline__ void end_step() {
    copy_commit();
    copy_wait<PENDING>();
    __syncthreads();
}

typedef int Sums[ROWS][WARP_N / 8][4];

// Sixteen of the warp's columns at a depth.
__device__ __forceinline__ void load_w(
    u32 (&w)[4], u32 stage, const Places& at, int pair, int depth
) {
    load_matrices(w, stage + (at.w ^ 32 * depth) + pair * 16 * STEP);
}

__device__ __forceinline__ void start(Shared& shared, Copies& copies, const Operands& o) {
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        From from = {copies.x, copies.w};
        copy_parts<X_COPIES + W_COPIES>(copies, from, stage_address(shared, step), 0, o);
        copy_commit();
        next_step(copies);
    }
}

// All of a tile's products.
__device__ __forceinline__ void multiply(
    Sums& sums, Shared& shared, int& slot, Copies& copies, int turn, const Operands& o
) {
    constexpr int turns = DEPTHS * ROWS, pairs = WARP_N / 16;
    constexpr int at_once = parts(X_COPIES + W_COPIES, DEPTHS);  // copies
    static_assert(turns % 2 == 0 && ROWS / 2 < ROWS - 2);  // copies before the step's end
    Places at = places();
    u32 stage = stage_address(shared, slot);
    u32 x[2][4], w[pairs][4];
#pragma unroll
    for (int pair = 0; pair < pairs; pair++) load_w(w[pair], stage, at, pair, 0);
    load_x(x[0], stage, at, 0, 0);
#pragma unroll 1
    for (int part = 0; part < 2; part++) {  // copies of this tile, then of the next
        int many = part ? STAGES - 1 : steps(o) - (STAGES - 1);
        if (part) turn_to_next(copies, shared, turn, o);
#pragma unroll 1
        for (int step = 0; step < many; step++) {
            u32 to = stage_address(shared, before(slot));
            From from = {copies.x, copies.w};
#pragma unroll
            for (int i = 0; i < turns; i++) {
                int depth = i / ROWS, m = i % ROWS;
                load_x(x[(i + 1) % 2], stage, at, (i + 1) % ROWS, (i + 1) / ROWS % DEPTHS);
                if (i + 2 == turns) {  // all of the step is in registers
                    end_step();
                    slot = after(slot);
                    stage = stage_address(shared, slot);
                }
                if (m == ROWS / 2) {
                    copy_parts<at_once>(copies, from, to, depth * at_once, o);
                    if (depth + 1 == DEPTHS) next_step(copies);
                }
#pragma unroll
                for (int j = 0; j < pairs; j++) {
                    int pair = m % 2 ? pairs - 1 - j : j;
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        int(&sum)[4] = sums[m][2 * pair + n];
                        mma_int8(sum, x[i % 2], w[pair][2 * n], w[pair][2 * n + 1], sum);
                    }
                    if (m + 1 == ROWS) load_w(w[pair], stage, at, pair, (depth + 1) % DEPTHS);
                }
            }
        }
    }
}

#endif

// ---- output ----

// (sum row_scale column_scale + bias) gate: what sum row_scale is multiplied with, what is added.
struct Factors {
    float2 times, plus;
};

__device__ __forceinline__ Factors factors_of(
    const Shared& shared, int column, const Operands& o
) {
    float2 scale = {1, 1}, gate = {1, 1}, bias = {0, 0};
    if (!BLOCKS) scale = *reinterpret_cast<const float2*>(&shared.column_scale[column]);
    if (o.gate) gate = *reinterpret_cast<const float2*>(&shared.gate[column]);
    if (o.bias) bias = pair_of(*reinterpret_cast<const u32*>(&shared.bias[column]), BF16);
    return {{scale.x * gate.x, scale.y * gate.y}, {bias.x * gate.x, bias.y * gate.y}};
}

// Four numbers of each thread, added over the four threads of a row: thread i gets the i-th sum.
__device__ __forceinline__ float sum_of_four(float (&x)[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 2; i++)
        x[i] = (upper ? x[2 + i] : x[i])
            + __shfl_xor_sync(0xffffffff, upper ? x[i] : x[2 + i], 2);
    return (odd ? x[1] : x[0]) + __shfl_xor_sync(0xffffffff, odd ? x[0] : x[1], 1);
}

// What the squares of the warp's rows add up to, of rows 32 i + lane / 4 + 8 (lane % 4) at i. Each
// has a place of its own: the sums are the same every time. Columns are whole warps' ones.
__device__ __forceinline__ void store_squares(
    const float (&squares)[ROWS / 2], const Tile& tile, const Operands& o
) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int part = tile.column / WARP_N + warp % WARPS_N, many = o.n / WARP_N;
    float* to = o.squares + ((long long)tile.sample * many + part) * o.length;
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) {
        int row = tile.row + warp / WARPS_N * WARP_L + 32 * i + lane / 4 + 8 * (lane % 4);
        if (row < o.length && part < many) to[row] = squares[i];
    }
}

// A tile's end is said in two ways: here each place by itself, or if BLOCKS as far as it is from the
// thread's first one, and below each from the one before. That takes a third less stalls, but with
// BLOCKS or SQUARES the assembler's loop over k gets slower by more, 5 % and 1.5 % (NVRTC 13.0,
// an H200 that plays these cards).
#if BLOCKS || SQUARES

// The squares are of what is not rounded yet.
template <bool WITH_RESIDUAL, bool WITH_SQUARES>
__device__ __forceinline__ void store(
    const Sums& sums, const Shared& shared, const Tile& tile, const Operands& o
) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % 4;
    int first_row = warp / WARPS_N * WARP_L + lane / 4;
    int first_column = warp % WARPS_N * WARP_N;
#if BLOCKS
    int own = first_column + 8 * pair;  // first column of those it stores
    const u16* residual = o.residual + (long long)tile.sample * o.residual_b + tile.column
        + (long long)(tile.row + first_row) * o.residual_l + own;
    u16* out = o.out + (long long)tile.sample * o.out_b + tile.column
        + (long long)(tile.row + first_row) * o.out_l + own;
#else
    u16* out = o.out + (long long)tile.sample * o.out_b + tile.column;
#endif
    float squares[ROWS / 2] = {};
#pragma unroll
    for (int group = 0; group < WARP_N / 32; group++) {
        Factors factors[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            factors[j] = factors_of(
                shared,
                first_column + 32 * group + (IN_ORDER ? 8 * pair + 2 * j : 8 * j + 2 * pair), o);
#if BLOCKS
        bool column_inside = tile.column + own + 32 * group < o.n;
#else
        int column = first_column + 32 * group + 8 * pair;
        bool column_inside = tile.column + column < o.n;
#endif
#pragma unroll
        for (int m = 0; m < ROWS; m += 2) {
            u32 y[4][4] = {};  // of rows 16 m + 8 half, pairs of 16 bits
            float own_squares[4] = {};
#if BLOCKS
#pragma unroll
            for (int half = 0; WITH_RESIDUAL && half < 4; half++) {
                int down = 16 * m + 8 * half;
                if (tile.row + first_row + down < o.length && column_inside)
                    *reinterpret_cast<uint4*>(y[half]) = *reinterpret_cast<const uint4*>(
                        residual + (long long)down * o.residual_l + 32 * group);
            }
#endif
#pragma unroll
            for (int half = 0; half < 4; half++) {
#if BLOCKS
                int down = 16 * m + 8 * half, in_tile = first_row + down;
#else
                int in_tile = first_row + 16 * m + 8 * half, row = tile.row + in_tile;
#endif
                float scale = BLOCKS ? 1.0f : shared.row_scale[in_tile];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    auto& sum = sums[m + half / 2][4 * group + j];
                    int i = half % 2 * 2;
                    float2 x = {fmaf(sum[i] * scale, factors[j].times.x, factors[j].plus.x),
                                fmaf(sum[i + 1] * scale, factors[j].times.y, factors[j].plus.y)};
                    if (WITH_RESIDUAL) {
                        float2 add = pair_of(y[half][j], BF16);
                        x.x += add.x, x.y += add.y;
                    }
                    if (WITH_SQUARES)
                        own_squares[half] = fmaf(x.x, x.x, fmaf(x.y, x.y, own_squares[half]));
                    y[half][j] = packed_pair(x, BF16);
                }
                if (!IN_ORDER) transpose(y[half]);
#if BLOCKS
                if (tile.row + first_row + down < o.length && column_inside)
                    store_16(out + (long long)down * o.out_l + 32 * group, y[half]);
#else
                if (row < o.length && column_inside)
                    *reinterpret_cast<uint4*>(out + (long long)row * o.out_l + column) =
                        make_uint4(y[half][0], y[half][1], y[half][2], y[half][3]);
#endif
            }
            if (WITH_SQUARES) squares[m / 2] += sum_of_four(own_squares);
        }
    }
    if (WITH_SQUARES) store_squares(squares, tile, o);
}

#else

template <bool WITH_RESIDUAL, bool>
__device__ __forceinline__ void store(
    const Sums& sums, const Shared& shared, const Tile& in_shared, const Operands& o
) {
    static_assert(IN_ORDER);
    constexpr int EACH = 2 * ROWS;  // rows of a thread, every eighth
    static_assert(EACH % 4 == 0);
    Tile tile = in_shared;          // read once: behind every store the compiler would read it again
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first_row = warp / WARPS_N * WARP_L + lane / 4;
    int first_column = warp % WARPS_N * WARP_N + 8 * (lane % 4);
    int row = tile.row + first_row, column = tile.column + first_column;
    int rows = o.length - row, columns = o.n - column;  // to the end
    const u16* residual = o.residual + (long long)tile.sample * o.residual_b
        + (long long)row * o.residual_l + column;
    u16* out = o.out + (long long)tile.sample * o.out_b + (long long)row * o.out_l + column;
#pragma unroll
    for (int group = 0; group < WARP_N / 32; group++) {
        Factors factors[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            factors[j] = factors_of(shared, first_column + 32 * group + 2 * j, o);
        bool column_inside = 32 * group < columns;
        const u16* from = residual + 32 * group;
        u16* to = out + 32 * group;
        uint4 added[4];  // of four rows, whose latencies are one
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int next = i; WITH_RESIDUAL && i % 4 == 0 && next < i + 4; next++) {
                added[next - i] = make_uint4(0, 0, 0, 0);
                if (8 * next < rows && column_inside)
                    added[next - i] = *reinterpret_cast<const uint4*>(from);
                from += 8ll * o.residual_l;
            }
            const u32* add = reinterpret_cast<const u32*>(&added[i % 4]);
            float scale = shared.row_scale[first_row + 8 * i];
            u32 y[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int* sum = &sums[i / 2][4 * group + j][i % 2 * 2];
                float2 x = {fmaf(sum[0] * scale, factors[j].times.x, factors[j].plus.x),
                            fmaf(sum[1] * scale, factors[j].times.y, factors[j].plus.y)};
                if (WITH_RESIDUAL) {
                    float2 pair = pair_of(add[j], BF16);
                    x.x += pair.x, x.y += pair.y;
                }
                y[j] = packed_pair(x, BF16);
            }
            if (8 * i < rows && column_inside) store_16(to, y);
            to += 8ll * o.out_l;
        }
    }
}

#endif

// Waits for this program's turn to begin; one round of tiles has no other end to wait for.
__device__ __forceinline__ void begin_apart(const Operands& o) {
    if (APART == 0 || tiles(o) <= gridDim.x) return;
    u32 wait = blockIdx.x * APART / gridDim.x, first = cycles();
    while (cycles() - first < wait);
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) int8_linear(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    begin_apart(o);
    if (threadIdx.x == 0) {
        shared.tiles[0] = tile_of(blockIdx.x, o);
#if BLOCKS
        shared.tiles[1] = tile_of(blockIdx.x + gridDim.x, o);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&shared.full[i], THREADS);
            barrier_init(&shared.empty[i], THREADS / 32);
        }
#endif
    }
    __syncthreads();
    Copies copies;
    int chunk = threadIdx.x % CHUNKS;
    copies.to_x = swizzled(own_row(), chunk);
    copies.to_w = (BLOCKS ? 0 : TILE_L * STEP) + swizzled(threadIdx.x / CHUNKS, chunk);
    turn_x(copies, shared.tiles[0], o);
    turn_w(copies, shared.tiles[0], o);
    start(shared, copies, o);
#if BLOCKS
    Turn slot = {0, 0};
#else
    copy_wait<PENDING>();
    __syncthreads();
    int slot = 0;
#endif
    int turn = 0;
    for (int index = blockIdx.x; index < tiles(o); index += gridDim.x) {
        int next = next_turn(turn);
        if (!BLOCKS && threadIdx.x == 0) shared.tiles[next] = tile_of(index + gridDim.x, o);
        Sums sums = {};
        multiply(sums, shared, slot, copies, turn, o);
#if BLOCKS
        // All meet: what `store` needs is there, and the tile after the next one.
        if (threadIdx.x == 0) shared.tiles[next_turn(next)] = tile_of(index + 2 * gridDim.x, o);
        __syncthreads();
#endif
        // A kernel of its own for each spills nothing; if BLOCKS it would spill more.
        if (BLOCKS ? o.residual != nullptr : RESIDUAL)
            store<true, false>(sums, shared, shared.tiles[turn], o);
        else if (BLOCKS ? o.squares != nullptr : SQUARES)
            store<false, true>(sums, shared, shared.tiles[turn], o);
        else
            store<false, false>(sums, shared, shared.tiles[turn], o);
        turn = next;
    }
#if BLOCKS
    // No copy and no arrival may come when the program is over.
    copy_commit();
    for (int i = 1; i < AHEAD; i++) {
        int place = slot.place + i, around = place >= STAGES;
        barrier_wait(shared_address(&shared.full[place - around * STAGES]), slot.parity ^ around);
    }
#endif
    copy_wait<0>();
}
