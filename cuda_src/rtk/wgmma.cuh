// Warpgroup matrix multiply-accumulate: D[64 x N] (+)= A[64 x 16] * B[16 x N], fp32 accumulators in registers.
//
// Accumulator layout (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"): thread t of the warpgroup holds, for
// every eight columns j, d[4j + 0..1] at row 16 * (t / 32) + (t % 32) / 4 and columns 8j + 2 * (t % 4) + 0..1, and
// d[4j + 2..3] eight rows below. Packed to 16 bits, d[8k .. 8k + 7] is the A operand of step k of a following product.
//
// The operand lists below are plain text that the preprocessor glues together, because asm takes no arrays.
#pragma once
#include <rtk/ptx.cuh>

// clang-format off
#define RTK_REGS_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define RTK_REGS_32 RTK_REGS_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define RTK_REGS_48 RTK_REGS_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define RTK_REGS_64 RTK_REGS_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define RTK_REGS_80 RTK_REGS_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define RTK_REGS_96 RTK_REGS_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define RTK_REGS_112 RTK_REGS_96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define RTK_REGS_128 RTK_REGS_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define RTK_REGS_144 RTK_REGS_128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define RTK_REGS_160 RTK_REGS_144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define RTK_REGS_176 RTK_REGS_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define RTK_REGS_192 RTK_REGS_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define RTK_REGS_208 RTK_REGS_192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define RTK_REGS_224 RTK_REGS_208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define RTK_REGS_240 RTK_REGS_224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define RTK_REGS_256 RTK_REGS_240 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define RTK_OPERANDS_16 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define RTK_OPERANDS_32 RTK_OPERANDS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define RTK_OPERANDS_48 RTK_OPERANDS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define RTK_OPERANDS_64 RTK_OPERANDS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define RTK_OPERANDS_80 RTK_OPERANDS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define RTK_OPERANDS_96 RTK_OPERANDS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define RTK_OPERANDS_112 RTK_OPERANDS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define RTK_OPERANDS_128 RTK_OPERANDS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define RTK_OPERANDS_144 RTK_OPERANDS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define RTK_OPERANDS_160 RTK_OPERANDS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define RTK_OPERANDS_176 RTK_OPERANDS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define RTK_OPERANDS_192 RTK_OPERANDS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define RTK_OPERANDS_208 RTK_OPERANDS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define RTK_OPERANDS_224 RTK_OPERANDS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define RTK_OPERANDS_240 RTK_OPERANDS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define RTK_OPERANDS_256 RTK_OPERANDS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// clang-format on

namespace rtk {

// Orders earlier register and shared-memory accesses before the wgmmas that follow.
RTK_DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
RTK_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING committed groups are still running.
template <int PENDING>
RTK_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// ptxas moves a wait for wgmma upwards past arithmetic, and what should run under the product then runs after it. These
// two tell it otherwise by instructions that are never executed, because `value` is never negative: a wait that follows
// the first stays below the computation of `value`, and what uses `later` stays below whatever precedes the second.
RTK_DEVICE void keep_wait_below(float value, u32 anywhere_in_shared) {
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0; }" ::"f"(value),
                 "r"(anywhere_in_shared)
                 : "memory");
}
RTK_DEVICE void keep_below(float& later, float value, u32 anywhere_in_shared) {
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %1, 0f00000000; @p ld.shared.f32 %0, [%2]; }"
                 : "+f"(later)
                 : "f"(value), "r"(anywhere_in_shared)
                 : "memory");
}

// Tells the compiler that a wgmma in flight reads or writes these registers: no use of them moves across this line.
template <int COUNT>
RTK_DEVICE void pin_registers(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int COUNT>
RTK_DEVICE void pin_registers(u32 (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// A shared-memory matrix descriptor (PTX ISA, "Matrix Descriptor Format") of a slab as <rtk/tma.cuh> writes it. The start
// address is in the lowest 14 bits, in units of 16 bytes; addresses of all of shared memory fit, so that a step through a
// tile is one 64-bit addition of the uniform pipe. It is one only where both words are variables: the high word of a
// constant is moved anew for every wgmma, so it has the address's two highest bits, which are zero, in it.
// (Worth 5 % of a step's instructions at head_dim 64, 9 % at 256.)
struct Descriptor {
    u32 low;
    u32 high;

    RTK_DEVICE u64 at(u32 offset_bytes) const {
        u64 descriptor;
        asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(high));
        return descriptor + (offset_bytes >> 4);
    }
};

template <int SLAB>
struct SlabDescriptor {
    static constexpr u32 SWIZZLE = SLAB == 64 ? 1 : SLAB == 32 ? 2 : 3;
    static constexpr u32 EIGHT_ROWS_BYTES = 8 * SLAB * 2;
    static constexpr u32 HIGH = (SWIZZLE << 30) | (EIGHT_ROWS_BYTES >> 4);

    static RTK_DEVICE Descriptor of(u32 address, u32 stride_bytes) {
        return {((stride_bytes >> 4) << 16) | (address >> 4), HIGH | (address >> 30)};
    }
    // Rows of the slab are rows of the operand; the contiguous dimension is the one summed over.
    static RTK_DEVICE Descriptor k_major(u32 address) { return of(address, 16); }
    // Rows of the slab are steps of the sum; the operand's columns run over slabs slab_bytes apart.
    static RTK_DEVICE Descriptor mn_major(u32 address, u32 slab_bytes) { return of(address, slab_bytes); }
};

template <class Element, int N>
struct Wgmma;

// clang-format off
#define RTK_WGMMA_TEXT(TYPE, N, A, B, SCALE, TRANSPOSE)                                                       \
    "{ .reg .pred p; setp.ne.b32 p, %" #SCALE ", 0;\n"                                                       \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" RTK_REGS_##N "}, " A ", %" #B ", p," \
    " 1, 1, " TRANSPOSE "; }"
// clang-format on

// ss: D = A * B, or += with `accumulate`; A and B (both K-major) from shared memory.
// rs: D += A * B; A from registers, B MN-major from shared memory.
#define RTK_WGMMA_STRUCT(ELEMENT, TYPE, N, R0, R1, R2, R3, R4, R5, R6)                                 \
    template <>                                                                                        \
    struct Wgmma<ELEMENT, N> {                                                                         \
        static RTK_DEVICE void ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) {                   \
            asm volatile(RTK_WGMMA_TEXT(TYPE, N, "%" #R0, R1, R2, "0, 0")                              \
                         : RTK_OPERANDS_##N                                                            \
                         : "l"(a), "l"(b), "r"(accumulate));                                           \
        }                                                                                              \
        static RTK_DEVICE void rs(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {          \
            asm volatile(RTK_WGMMA_TEXT(TYPE, N, "{%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}", R4, R5, "1") \
                         : RTK_OPERANDS_##N                                                            \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(1));                        \
        }                                                                                              \
    };
#define RTK_WGMMA_SHAPE(...) RTK_WGMMA_STRUCT(Half, "f16", __VA_ARGS__) RTK_WGMMA_STRUCT(BFloat16, "bf16", __VA_ARGS__)

// clang-format off
// N, then the operand numbers that follow its N / 2 accumulators
RTK_WGMMA_SHAPE(16, 8, 9, 10, 11, 12, 13, 14)
RTK_WGMMA_SHAPE(32, 16, 17, 18, 19, 20, 21, 22)
RTK_WGMMA_SHAPE(48, 24, 25, 26, 27, 28, 29, 30)
RTK_WGMMA_SHAPE(64, 32, 33, 34, 35, 36, 37, 38)
RTK_WGMMA_SHAPE(80, 40, 41, 42, 43, 44, 45, 46)
RTK_WGMMA_SHAPE(96, 48, 49, 50, 51, 52, 53, 54)
RTK_WGMMA_SHAPE(112, 56, 57, 58, 59, 60, 61, 62)
RTK_WGMMA_SHAPE(128, 64, 65, 66, 67, 68, 69, 70)
RTK_WGMMA_SHAPE(144, 72, 73, 74, 75, 76, 77, 78)
RTK_WGMMA_SHAPE(160, 80, 81, 82, 83, 84, 85, 86)
RTK_WGMMA_SHAPE(176, 88, 89, 90, 91, 92, 93, 94)
RTK_WGMMA_SHAPE(192, 96, 97, 98, 99, 100, 101, 102)
RTK_WGMMA_SHAPE(208, 104, 105, 106, 107, 108, 109, 110)
RTK_WGMMA_SHAPE(224, 112, 113, 114, 115, 116, 117, 118)
RTK_WGMMA_SHAPE(240, 120, 121, 122, 123, 124, 125, 126)
RTK_WGMMA_SHAPE(256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

#undef RTK_WGMMA_SHAPE
#undef RTK_WGMMA_STRUCT
#undef RTK_WGMMA_TEXT

}  // namespace rtk
