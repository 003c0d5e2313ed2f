// Nothing but products of the tensor cores, in registers: how many of one kind they take at best.
// PRODUCT is the place of the instruction in ceilings.py's PRODUCTS.

#if PRODUCT == 0
#define INSTRUCTION "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
#elif PRODUCT == 1
#define INSTRUCTION "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#elif PRODUCT == 2
#define INSTRUCTION "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"
#elif PRODUCT == 3
#define INSTRUCTION "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
#elif PRODUCT == 4
#define INSTRUCTION "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16"
#endif

constexpr int THREADS = 256;
// Products that do not wait for each other: more than a warp needs to hide one's latency.
constexpr int CHAINS = 8;
// 16 x 8 sums of a warp: two of 16 bits share a register.
constexpr int SUMS = PRODUCT == 2 || PRODUCT == 4 ? 2 : 4;

struct Operands {
    unsigned* out;  // [1], hardly ever written
    int rounds;
};
static_assert(OPERANDS_BYTES == sizeof(Operands) && SHARED_BYTES == 0);

__device__ void multiply(unsigned (&d)[SUMS], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if PRODUCT == 2 || PRODUCT == 4
    asm volatile(INSTRUCTION " {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
                 : "+r"(d[0]), "+r"(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) products(const __grid_constant__ Operands o) {
    // Few bits are set: power, which limits what has data to multiply, does not limit this.
    const unsigned a[4] = {threadIdx.x, 3 * threadIdx.x, 7, 9}, b[2] = {5 * threadIdx.x, 11};
    unsigned sums[CHAINS][SUMS] = {};
    for (int round = 0; round < o.rounds; round++)
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) multiply(sums[chain], a, b);
    unsigned all = 0;
    for (auto& chain : sums)
        for (unsigned sum : chain) all ^= sum;
    if (all == 0x7a31c5e9) *o.out = all;  // so that the products are not left out
}
