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

// The largest of a row's scores as an integer of its bits, right if it is not negative: such floats are ordered as their
// bits are, and any float with a sign is below them. (Three-way integer maxima take half the instructions of fmaxf.)
template <int COUNT>
RTK_DEVICE int largest_bits(const float (&scores)[COUNT], int row) {
    int largest = max(__float_as_int(scores[2 * row]), __float_as_int(scores[2 * row + 1]));
#pragma unroll
    for (int i = 4; i < COUNT; i += 4) {
        largest = max(max(largest, __float_as_int(scores[i + 2 * row])), __float_as_int(scores[i + 2 * row + 1]));
    }
    return largest;
}

// A maximum is left as it is until a probability would exceed 2^TOLERANCE_LOG2, so that mostly there is nothing to correct,
// and no maximum to be found: only whether some row of the warp has a score beyond its limit. The result is as exact: the
// true sum is kept. Where a limit is negative, or there is none yet, the maxima are found for every tile; a maximum that is
// at most 2^SLACK_LOG2 too low for a limit of zero is therefore taken as the one of that limit.
template <int TOLERANCE_LOG2, int SLACK_LOG2>
struct OnlineSoftmax {
    float scale_log2;
    float row_max[2];
    float row_sum[2];
    float offset[2];      // of the exponents
    int limit[2];         // bits of the largest score that leaves the maximum as it is; INT_MIN where that is negative
    bool raised;          // whether a maximum of the warp's rows was raised, and if so
    float correction[2];  // how much of itself what was accumulated before still counts

    RTK_DEVICE void reset() {
        row_max[0] = row_max[1] = negative_infinity();
        row_sum[0] = row_sum[1] = 0.0f;
    }

    // A row's scores are turned into exp(score - maximum) in two steps. After the first, what was accumulated before, O
    // included, counts `correction` times; the row sum is corrected here already.
    template <int COUNT>
    RTK_DEVICE void raise_maximum(const float (&scores)[COUNT], int row) {
        float tile_max = fmaxf(scores[2 * row], scores[2 * row + 1]);
#pragma unroll
        for (int i = 4; i < COUNT; i += 4) {
            tile_max = fmaxf(tile_max, fmaxf(scores[i + 2 * row], scores[i + 2 * row + 1]));
        }
        const float tolerance = TOLERANCE_LOG2 * reciprocal_approx(scale_log2);
        const float previous = row_max[row];
        const float larger = fmaxf(previous, quad_max(tile_max));
        const float lowest_of_zero = -tolerance;
        const bool near_zero = larger >= lowest_of_zero - SLACK_LOG2 * reciprocal_approx(scale_log2);
        const float taken = near_zero ? fmaxf(larger, lowest_of_zero) : larger;
        row_max[row] = larger > previous + tolerance ? taken : previous;
        const float beyond = row_max[row] + tolerance;
        limit[row] = beyond >= 0.0f ? __float_as_int(beyond) : 0x80000000;
        // A row that has seen no key yet has maximum -inf: subtracting it would make NaN of its zeros.
        const float finite_max = row_max[row] == negative_infinity() ? 0.0f : row_max[row];
        offset[row] = finite_max * scale_log2;
        // Exactly 1 where the maximum stays, which a rounded offset would not give: what other rows do changes no bit.
        correction[row] = exp2_approx((previous - finite_max) * scale_log2);
        row_sum[row] *= correction[row];
    }
    // The same for both rows: of the first tile, and of any other where need be.
    template <int COUNT>
    RTK_DEVICE void find_maxima(const float (&scores)[COUNT]) {
        raise_maximum(scores, 0);
        raise_maximum(scores, 1);
    }
    template <int COUNT>
    RTK_DEVICE void raise_maxima(const float (&scores)[COUNT]) {
        const bool beyond = (largest_bits(scores, 0) > limit[0]) | (largest_bits(scores, 1) > limit[1]);
        raised = __any_sync(0xffffffffu, beyond);
        if (raised) find_maxima(scores);
    }
    template <int COUNT>
    RTK_DEVICE void exponentiate(float (&scores)[COUNT], int row) {
#pragma unroll
        for (int i = 2 * row; i < COUNT; i += 4) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                scores[i + c] = exp2_approx(scores[i + c] * scale_log2 - offset[row]);
                row_sum[row] += scores[i + c];
            }
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
