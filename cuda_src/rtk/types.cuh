// Fixed-width integers and the two 16-bit element types, without a single include: a translation unit with no headers
// compiles fastest under NVRTC and needs no include paths.
#pragma once

#define RTK_DEVICE __device__ __forceinline__

namespace rtk {

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int WARP_SIZE = 32;
constexpr int WARPGROUP_SIZE = 128;
constexpr int CONSUMER_ROWS = 64;  // of a consumer warpgroup: what one wgmma multiplies

constexpr int min_ct(int a, int b) {
    return a < b ? a : b;
}

template <int A, int B>
constexpr int ceil_div = (A + B - 1) / B;

RTK_DEVICE int ceil_div_rt(int a, int b) {
    return (a + b - 1) / b;
}

// Element types are tags: tiles live in shared memory as bytes, and registers hold either float or packed pairs.
struct Half {
    // Two floats, rounded to nearest even, `lo` in the low half.
    static RTK_DEVICE u32 pack(float lo, float hi) {
        u32 packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
        return packed;
    }
};

struct BFloat16 {
    static RTK_DEVICE u32 pack(float lo, float hi) {
        u32 packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
        return packed;
    }
};

template <bool BF16>
struct ElementOf {
    using type = Half;
};
template <>
struct ElementOf<true> {
    using type = BFloat16;
};

constexpr int ELEMENT_BYTES = 2;

}  // namespace rtk
