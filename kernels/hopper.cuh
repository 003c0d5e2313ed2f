// What the Hopper kernels share: barriers and products in the tensor cores.

#include "arithmetic.cuh"

// ---- barriers in shared memory ----

__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ bool barrier_passed(u64* barrier, u32 parity) {
    return barrier_passed(shared_address(barrier), parity);
}

// Swizzled tiles start at multiples of 1024 bytes, which dynamic shared memory need not.
constexpr int SWIZZLE_ALIGNMENT = 1024;

__device__ __forceinline__ void* aligned_for_swizzle(char* memory) {
    return memory + (-shared_address(memory) & SWIZZLE_ALIGNMENT - 1);
}

// Places in a ring of SIZE, and the parity of the barriers' phases there.
template <int SIZE> struct Ring {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == SIZE) stage = 0, parity ^= 1;
    }
};

// ---- tensor cores ----

// Descriptor of rows of 128 or 64 bytes, swizzled over their whole width.
__device__ __forceinline__ u64 matrix_descriptor(u32 tile, int row_bytes) {
    u64 layout = row_bytes == 128 ? 1 : 2;
    u64 eight_rows = (row_bytes * 8) >> 4;
    return (tile & 0x3FFFF) >> 4 | 1ull << 16 | eight_rows << 32 | layout << 62;
}
__device__ __forceinline__ u64 matrix_descriptor(const void* tile, int row_bytes) {
    return matrix_descriptor(shared_address(tile), row_bytes);
}

__device__ __forceinline__ void mma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from moving reads and writes of registers across an asynchronous product.
template <int N> __device__ __forceinline__ void hold(int (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// Operands of a product: registers of integers and of floats.
#define R4(x, i) "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3])
#define R16(x, i) R4(x, i), R4(x, i + 4), R4(x, i + 8), R4(x, i + 12)
#define R64(x, i) R16(x, i), R16(x, i + 16), R16(x, i + 32), R16(x, i + 48)
#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
