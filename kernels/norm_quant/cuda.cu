// LayerNorm and INT8 of rows: a scale for each row.
//
// A program takes rows of one sample. SIDES warps share a row, EACH times SPAN channels each, and
// go on to another one; TEAMS of them do not wait for one another. What weight, bias, scale and shift
// come to waits in shared memory. What a thread has turned into fp32 makes room for the same
// channels of the next row, which arrive meanwhile.

// Defined are SIDES, 1 or 2; EACH; TEAMS; BF16, whether rows are bfloat16, else float16.

#include "rows.cuh"

constexpr int THREADS = 32 * SIDES * TEAMS;
constexpr int SPAN = 256;  // channels that a warp takes at once
constexpr int SPANS = SIDES * EACH;
constexpr int CHANNELS = SPAN * SPANS;

struct Operands {
    const u16* x;         // [B, L, C]
    const float* weight;  // [C] or null
    const float* bias;    // [C] or null
    const float* scale;   // [B, C] or null
    const float* shift;   // [B, C] or null
    i8* q;                // [B, L, C]
    float* q_scale;       // [B, L]
    int length, programs;  // programs of a sample
    int x_b, x_l, scale_b, shift_b;
    int eps;  // its bits
};

struct Shared {
    // y = normalized factor + offset; by spans of channels, then halves of a thread's eight.
    float4 factors[SPANS][2][32];
    float4 offsets[SPANS][2][32];
    float2 moments[TEAMS][SIDES];  // of a warp's channels: mean, and squares about it
    float amax[TEAMS][SIDES];
};

static_assert(SHARED_BYTES == sizeof(Shared));
static_assert(OPERANDS_BYTES == sizeof(Operands));

// The warps of a row.
__device__ __forceinline__ void meet(int team) {
    if (SIDES == 1)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(32 * SIDES) : "memory");
}

__device__ __forceinline__ float4 four_of(const float* from, int at, float otherwise) {
    if (!from) return make_float4(otherwise, otherwise, otherwise, otherwise);
    return *reinterpret_cast<const float4*>(from + at);
}

// (y weight + bias) (1 + scale) + shift as y factor + offset.
__device__ __forceinline__ void prepare_channels(Shared& shared, const Operands& o, int sample) {
    const float* scales = o.scale ? o.scale + (long long)sample * o.scale_b : nullptr;
    const float* shifts = o.shift ? o.shift + (long long)sample * o.shift_b : nullptr;
    for (int i = threadIdx.x; i < CHANNELS / 4; i += THREADS) {
        float4 w = four_of(o.weight, 4 * i, 1), b = four_of(o.bias, 4 * i, 0);
        float4 s = four_of(scales, 4 * i, 0), t = four_of(shifts, 4 * i, 0);
        s.x += 1, s.y += 1, s.z += 1, s.w += 1;
        shared.factors[i / 64][i % 2][i / 2 % 32] =
            make_float4(w.x * s.x, w.y * s.y, w.z * s.z, w.w * s.w);
        shared.offsets[i / 64][i % 2][i / 2 % 32] = make_float4(
            fmaf(b.x, s.x, t.x), fmaf(b.y, s.y, t.y), fmaf(b.z, s.z, t.z), fmaf(b.w, s.w, t.w));
    }
}

// Four channels, normalized, in their place; their largest |y|.
__device__ __forceinline__ float modulate(float* y, float4 factor, float4 offset) {
    y[0] = fmaf(y[0], factor.x, offset.x), y[1] = fmaf(y[1], factor.y, offset.y);
    y[2] = fmaf(y[2], factor.z, offset.z), y[3] = fmaf(y[3], factor.w, offset.w);
    float a = max_or_nan(fabsf(y[0]), fabsf(y[1])), b = max_or_nan(fabsf(y[2]), fabsf(y[3]));
    return max_or_nan(a, b);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) layer_norm_quant(
    const __grid_constant__ Operands o
) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int team = threadIdx.x / (32 * SIDES), side = threadIdx.x / 32 % SIDES, lane = threadIdx.x % 32;
    int sample = blockIdx.x / o.programs, step = o.programs * TEAMS;
    int row = blockIdx.x % o.programs * TEAMS + team, first_span = side * EACH;
    prepare_channels(shared, o, sample);
    __syncthreads();
    if (row >= o.length) return;
    const u16* x = o.x + (long long)sample * o.x_b + 8 * (32 * first_span + lane);
    uint4 raw[EACH];
    const uint4* from = reinterpret_cast<const uint4*>(x + (long long)row * o.x_l);
#pragma unroll
    for (int i = 0; i < EACH; i++) raw[i] = read_once(from + 32 * i);
    float eps = __int_as_float(o.eps);
#pragma unroll 1
    for (; row < o.length; row += step) {
        long long next = min(row + step, o.length - 1);
        from = reinterpret_cast<const uint4*>(x + next * o.x_l);
        float y[8 * EACH], sum = 0, others = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            unpack(y + 8 * i, raw[i], BF16);
            raw[i] = read_once(from + 32 * i);
            const float* own = y + 8 * i;
            sum += (own[0] + own[1]) + (own[2] + own[3]) + ((own[4] + own[5]) + (own[6] + own[7]));
        }
        float mean = warp_sum(sum) * (1.0f / (CHANNELS / SIDES));
#pragma unroll
        for (int j = 0; j < 8 * EACH; j += 2) {
            y[j] -= mean, y[j + 1] -= mean;
            squares = fmaf(y[j], y[j], squares), others = fmaf(y[j + 1], y[j + 1], others);
        }
        squares = warp_sum(squares + others);
        float of_row = mean;
        if (SIDES == 2) {
            if (lane == 0) shared.moments[team][side] = make_float2(mean, squares);
            meet(team);
            float2 a = shared.moments[team][0], b = shared.moments[team][SIDES - 1];
            // Chan, Golub, LeVeque 1979: as exact as if all were about the row's mean.
            float apart = a.x - b.x;
            squares = fmaf(apart * apart, CHANNELS / 4, a.y + b.y);
            of_row = 0.5f * (a.x + b.x);
        }
        float inverse = rsqrtf(squares * (1.0f / CHANNELS) + eps);
        float off = (mean - of_row) * inverse, amax = 1e-8f;
#pragma unroll
        for (int i = 0; i < 2 * EACH; i++) {
            int span = first_span + i / 2;
#pragma unroll
            for (int j = 4 * i; j < 4 * i + 4; j++) y[j] = fmaf(y[j], inverse, off);
            float4 factor = shared.factors[span][i % 2][lane];
            amax = max_or_nan(amax, modulate(y + 4 * i, factor, shared.offsets[span][i % 2][lane]));
        }
        amax = warp_max(amax);
        if (SIDES == 2) {
            if (lane == 0) shared.amax[team][side] = amax;
            meet(team);
            amax = max_or_nan(shared.amax[team][0], shared.amax[team][SIDES - 1]);
        }
        float by = __fdiv_rn(128.0f, amax);
        long long place = (long long)sample * o.length + row;
        uint2* to = reinterpret_cast<uint2*>(o.q + place * CHANNELS) + 32 * first_span + lane;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            to[32 * i] = make_uint2(int8_of(y + 8 * i, by), int8_of(y + 8 * i + 4, by));
        if (side == 0 && lane == 0) o.q_scale[place] = amax * (1.0f / 128);
    }
}
