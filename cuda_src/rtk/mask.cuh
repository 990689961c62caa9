// Which keys a query may see, which KV tiles a block of queries therefore visits, and which of those need masking.
//
// Query row i sees key j when i + diagonal_left <= j <= i + diagonal_right and 0 <= j < seqlen_k. Causal masks, sliding
// windows and either alignment are all of this form; the two diagonals are computed on the host.
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

// Everything the kernel knows of one sequence pair.
struct SequenceExtent {
    int seqlen_q;
    int seqlen_k;
    int diagonal_left;   // used when Config::MASK_LEFT
    int diagonal_right;  // used when Config::MASK_RIGHT
};

// KV tiles [begin, end) are visited from right to left. Tiles in [clear_begin, clear_end) need no mask for any row of
// the block.
struct KvTiles {
    int begin;
    int end;
    int clear_begin;
    int clear_end;
};

template <class Config>
RTK_DEVICE KvTiles visible_kv_tiles(const SequenceExtent& extent, int first_row) {
    constexpr int M = Config::BLOCK_M;
    constexpr int N = Config::BLOCK_N;
    const int last_row = min(first_row + M, extent.seqlen_q) - 1;
    KvTiles tiles;
    int visible = extent.seqlen_k;    // keys that the last row may see
    int clear = extent.seqlen_k / N;  // tiles that the first row sees whole, on the right
    tiles.begin = tiles.clear_begin = 0;
    if constexpr (Config::MASK_RIGHT) {
        visible = max(0, min(visible, last_row + extent.diagonal_right + 1));
        clear = min(clear, max(0, first_row + extent.diagonal_right + 1) / N);
    }
    tiles.end = ceil_div_rt(visible, N);
    tiles.clear_end = clear;
    if constexpr (Config::MASK_LEFT) {
        tiles.begin = max(0, first_row + extent.diagonal_left) / N;
        tiles.clear_begin = ceil_div_rt(max(0, last_row + extent.diagonal_left), N);
    }
    return tiles;
}

// Sets the scores of invisible keys to -inf. `row` is the thread's first row, `column` its first column of the tile.
template <class Config, int COUNT>
RTK_DEVICE void mask_scores(float (&scores)[COUNT], const SequenceExtent& extent, int row, int column) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Limits relative to `column`, so that the comparisons below are with constants.
        int last = extent.seqlen_k - 1 - column;
        if constexpr (Config::MASK_RIGHT) last = min(last, row + 8 * r + extent.diagonal_right - column);
        const int first = Config::MASK_LEFT ? row + 8 * r + extent.diagonal_left - column : 0;
#pragma unroll
        for (int j = 0; j < COUNT / 4; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int offset = 8 * j + c;
                const bool visible = offset <= last && (!Config::MASK_LEFT || offset >= first);
                if (!visible) scores[4 * j + 2 * r + c] = negative_infinity();
            }
        }
    }
}

}  // namespace rtk
