// Online softmax of one consumer warpgroup: each thread follows two rows, eight apart (see <rtk/wgmma.cuh> for the
// layout).
//
// Scores stay in their own units; scale * log2(e) is folded into the one FMA before ex2. The row sum is kept per thread
// and added over the four threads of a row only once, at the end (FlashAttention-2, section 3.1).
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

RTK_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
RTK_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

struct OnlineSoftmax {
    float scale_log2;
    float row_max[2];
    float row_sum[2];

    RTK_DEVICE void reset() {
        row_max[0] = row_max[1] = negative_infinity();
        row_sum[0] = row_sum[1] = 0.0f;
    }

    // Turns scores into exp(score - running maximum) in place. Afterwards what was accumulated before, O included,
    // counts `correction[row]` times; the row sums are corrected here already.
    template <int COUNT>
    RTK_DEVICE void update(float (&scores)[COUNT], float (&correction)[2]) {
        float offset[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float tile_max = fmaxf(scores[2 * row], scores[2 * row + 1]);
#pragma unroll
            for (int i = 4; i < COUNT; i += 4) {
                tile_max = fmaxf(tile_max, fmaxf(scores[i + 2 * row], scores[i + 2 * row + 1]));
            }
            const float previous = row_max[row];
            row_max[row] = fmaxf(previous, quad_max(tile_max));
            // A row that has seen no key yet has maximum -inf: subtracting it would make NaN of its zeros.
            const float finite_max = row_max[row] == negative_infinity() ? 0.0f : row_max[row];
            offset[row] = finite_max * scale_log2;
            // Exactly 1 where the maximum stays: the rounded offset would leave a little of one sign for each tile, and
            // over a thousand tiles that is seen (lse off by 1e-3 at seqlen 131072 with scores near 50).
            correction[row] = exp2_approx((previous - finite_max) * scale_log2);
            row_sum[row] *= correction[row];
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = (i / 2) % 2;
            scores[i] = exp2_approx(scores[i] * scale_log2 - offset[row]);
            row_sum[row] += scores[i];
        }
    }

    // Factor that turns an accumulated row of O into the answer, and the row's natural-log sum of exponentials.
    RTK_DEVICE void finish(float (&normalizer)[2], float (&lse)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float sum = quad_sum(row_sum[row]);
            const bool empty = sum == 0.0f;
            normalizer[row] = empty ? 0.0f : reciprocal_approx(sum);
            lse[row] = empty ? negative_infinity() : (row_max[row] * scale_log2 + log2_approx(sum)) * LN_2;
        }
    }
};

// Packs a tile of 16-bit probabilities: the A operand of the product with V.
template <class Element, int COUNT>
RTK_DEVICE void pack_pairs(const float (&values)[COUNT], u32 (&packed)[COUNT / 2]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) packed[i] = Element::pack(values[2 * i], values[2 * i + 1]);
}

}  // namespace rtk
