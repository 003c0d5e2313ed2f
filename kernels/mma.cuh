// What the kernels for mma.sync share (sm_80 and newer): copies, products, arithmetic.

#include "arithmetic.cuh"

// ---- shared memory ----

// Starts a copy of 16 bytes, past the first level of cache.
__device__ __forceinline__ void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same of the first `bytes` of them, 0 to 16; the others become 0. 128 bytes come from memory
// into L2, of which the rest is copied soon.
__device__ __forceinline__ void copy_16(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The same 16 bytes, or zeros, and then nothing is read. FETCHED bytes come into L2, 128 or 256.
template <int FETCHED>
__device__ __forceinline__ void copy_16_or_zeros(u32 to, const void* from, bool zeros) {
    if (FETCHED == 128)
        asm volatile("{.reg .pred zeros; setp.ne.b32 zeros, %2, 0;\n"
                     "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, zeros;}"
                     ::"r"(to), "l"(from), "r"(int(zeros)) : "memory");
    else
        asm volatile("{.reg .pred zeros; setp.ne.b32 zeros, %2, 0;\n"
                     "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, zeros;}"
                     ::"r"(to), "l"(from), "r"(int(zeros)) : "memory");
}

// Starts a copy of 8 bytes.
__device__ __forceinline__ void copy_8(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

// Starts a copy of 4 bytes.
__device__ __forceinline__ void copy_4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Starts to fetch a line of 128 bytes into L2.
__device__ __forceinline__ void fetch_line(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all groups of this thread's copies but the last PENDING are there.
template <int PENDING> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- barriers in shared memory, by their addresses ----

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}"
                 ::"r"(barrier) : "memory");
}

// Arrives when all copies that this thread has started are there.
__device__ __forceinline__ void barrier_arrive_behind_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    while (!barrier_passed(barrier, parity));
}

// Four matrices of eight rows of 16 bytes: lane l names row l % 8 of matrix l / 8, and gets of
// matrix i in x[i] the bytes 4 (l % 4) + {0 .. 3} of row l / 4.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}

// The same of matrices of 16 bits, transposed: lane l gets rows 2 (l % 4) + {0, 1} of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}

// ---- tensor cores: d = a b + c ----
// Of a [16 rows, 32 bytes] a thread holds in a[0] row lane / 4, bytes 4 (lane % 4) + {0 .. 3}, in
// a[1] row lane / 4 + 8, in a[2] and a[3] the same 16 bytes further; of b [32 bytes, 8 columns] in
// b0 and b1 column lane / 4. Of the sums [16, 8] it has columns 2 (lane % 4) + {0, 1}, first of row
// lane / 4, then of row lane / 4 + 8.

__device__ __forceinline__ void mma_int8(
    int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&c)[4]
) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1),
          "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of float32 less their last 13 bits, eight along k: bytes as above.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sums in float16, two in a register.
__device__ __forceinline__ void mma_fp16_short(
    u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[2]
) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %9};"
        : "=r"(d[0]), "=r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));
}

// sm_89 and newer, PTX 8.7.
__device__ __forceinline__ void mma_fp8_short(
    u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[2]
) {
    asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 "
        "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %9};"
        : "=r"(d[0]), "=r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));
}

// The multiprocessor's clock.
__device__ __forceinline__ u32 cycles() {
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now) :: "memory");
    return now;
}

// ---- arithmetic ----

// The larger of both, NaN where one is: one instruction, like the fmaxf that ignores NaN.
__device__ __forceinline__ float max_or_nan(float x, float y) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
}

// The larger of two pairs of bfloat16 or float16, NaN where one is.
__device__ __forceinline__ u32 max_of_pairs(u32 x, u32 y, bool bf16) {
    u32 larger;
    if (bf16)
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
    else
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
    return larger;
}

// The smaller of two pairs, likewise.
__device__ __forceinline__ u32 min_of_pairs(u32 x, u32 y, bool bf16) {
    u32 smaller;
    if (bf16)
        asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(smaller) : "r"(x), "r"(y));
    else
        asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(smaller) : "r"(x), "r"(y));
    return smaller;
}

// The sum of two pairs of float16, one by one.
__device__ __forceinline__ u32 sum_of_pairs(u32 x, u32 y) {
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
    return sum;
}

// Four numbers as e4m3, the first in the lowest byte; sm_89 and newer.
__device__ __forceinline__ u32 packed_fp8(float a, float b, float c, float d) {
    u32 packed;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(packed) : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed;
}
