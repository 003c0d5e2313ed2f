// The key blocks whose scores are best: a warp a row of scores, which its registers hold.

#include "arithmetic.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int PROGRAMS = 4;      // of a multiprocessor, by registers
constexpr u32 ALL = 0xffffffff;  // lanes of a warp
constexpr int LOWEST = -2147483647 - 1;
constexpr int OCTAVE = 1 << 23;  // between the integers of a score and of half of it

struct Operands {
    const float* scores;  // [rows, n_keys]
    int* block_map;       // [rows, count], ascending
    int rows, n_keys, count;
};

static_assert(SHARED_BYTES == 0);
static_assert(OPERANDS_BYTES == sizeof(Operands));

// Integers in the order of the scores; both zeros get the same one.
__device__ __forceinline__ int ordered(float score) {
    int bits = score == 0 ? 0 : __float_as_int(score);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// How many of a warp's integers are above `threshold`, which a NaN's may be.
template <int EACH> __device__ __forceinline__ int above(const int (&keys)[EACH], int threshold) {
    int found = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) found += keys[i] > threshold;
    return __reduce_add_sync(ALL, found);
}

// A lane holds every 32nd score of a row, at most EACH.
template <int EACH>
__device__ __forceinline__ void select_row(const float* scores, int* chosen, int n_keys, int count) {
    int lane = threadIdx.x % 32, keys[EACH], highest = LOWEST;
    float own[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        own[i] = lane + 32 * i < n_keys ? scores[lane + 32 * i] : 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        // No threshold below is as low as the filling.
        keys[i] = lane + 32 * i < n_keys ? ordered(own[i]) : LOWEST;
        highest = max(highest, keys[i]);
    }
    // The largest threshold that `count` scores reach, or any that just as many do. It is looked for
    // a factor of 2 below the best score, then of 8, and so on; then by halves.
    long long low = LOWEST, high = __reduce_max_sync(ALL, highest), step = OCTAVE;
    int reached = n_keys;
    while (low < high && reached != count) {
        long long middle = max((low + high + 1) >> 1, high - step);
        step *= 2;
        int found = above(keys, static_cast<int>(middle - 1));
        if (found >= count)
            low = middle, reached = found;
        else
            high = middle - 1;
    }
    // Of what ties at the threshold the first are taken, or all.
    int best = static_cast<int>(low), ties = n_keys;
    if (reached != count) ties = count - above(keys, best);
    u32 before = (1u << lane) - 1;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        bool tie = lane + 32 * i < n_keys && keys[i] == best;
        u32 tied = __ballot_sync(ALL, tie);
        bool taken = keys[i] > best || tie && __popc(tied & before) < ties;
        ties -= __popc(tied);
        u32 all_taken = __ballot_sync(ALL, taken);
        if (taken) chosen[__popc(all_taken & before)] = lane + 32 * i;
        chosen += __popc(all_taken);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) select_blocks(
    const __grid_constant__ Operands o
) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= o.rows) return;
    const float* scores = o.scores + (long long)row * o.n_keys;
    int* chosen = o.block_map + (long long)row * o.count;
    if (o.n_keys <= 1280)
        select_row<40>(scores, chosen, o.n_keys, o.count);
    else
        select_row<64>(scores, chosen, o.n_keys, o.count);
}
