// Which keys a query may see, which KV tiles a block of queries therefore visits, and which of those need masking.
//
// Query row i sees key j when i + diagonal_left <= j <= i + diagonal_right and first_key <= j < end_key. Causal masks,
// sliding windows and either alignment are all of this form; the two diagonals are computed on the host. The range of
// keys is that of the array, or with Config::KV_RANGES each sequence's own, read from device memory.
#pragma once
#include <rtk/ptx.cuh>

namespace rtk {

// Everything the kernel knows of one sequence pair.
struct SequenceExtent {
    int seqlen_q;
    int first_key;  // used when Config::KV_RANGES; otherwise 0
    int end_key;
    int diagonal_left;   // used when Config::MASK_LEFT
    int diagonal_right;  // used when Config::MASK_RIGHT
};

// The extent of one sequence of the batch, whose keys lie at kv_first[batch] to kv_end[batch] of the arrays; null is the
// arrays' own bound. What lies outside the arrays is not in the range whatever the numbers say.
template <class Config>
RTK_DEVICE SequenceExtent sequence_extent(const SequenceExtent& arrays, const int* kv_first, const int* kv_end,
                                          int batch) {
    SequenceExtent extent = arrays;
    if constexpr (Config::KV_RANGES) {
        if (kv_first != nullptr) extent.first_key = min(max(0, load_read_only(kv_first + batch)), arrays.end_key);
        if (kv_end != nullptr) extent.end_key = min(max(0, load_read_only(kv_end + batch)), arrays.end_key);
    }
    return extent;
}

// Whether some row of a tile may begin to see keys right of the tile's first one.
template <class Config>
constexpr bool masked_on_the_left = Config::MASK_LEFT || Config::KV_RANGES;

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
    int visible = extent.end_key;    // keys that the last row may see
    int clear = extent.end_key / N;  // tiles that the first row sees whole, on the right
    tiles.begin = tiles.clear_begin = 0;
    if constexpr (Config::MASK_RIGHT) {
        visible = max(0, min(visible, last_row + extent.diagonal_right + 1));
        clear = min(clear, max(0, first_row + extent.diagonal_right + 1) / N);
    }
    tiles.end = ceil_div_rt(visible, N);
    tiles.clear_end = clear;
    if constexpr (masked_on_the_left<Config>) {
        int first_visible = extent.first_key, first_clear = extent.first_key;  // to the first row, to the last
        if constexpr (Config::MASK_LEFT) {
            first_visible = max(first_visible, first_row + extent.diagonal_left);
            first_clear = max(first_clear, last_row + extent.diagonal_left);
        }
        tiles.begin = first_visible / N;
        tiles.clear_begin = ceil_div_rt(first_clear, N);
    }
    return tiles;
}

// Sets the scores of invisible keys to -inf. `row` is the thread's first row, `column` its first column of the tile.
template <class Config, int COUNT>
RTK_DEVICE void mask_scores(float (&scores)[COUNT], const SequenceExtent& extent, int row, int column) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Limits relative to `column`, so that the comparisons below are with constants.
        int last = extent.end_key - 1 - column;
        if constexpr (Config::MASK_RIGHT) last = min(last, row + 8 * r + extent.diagonal_right - column);
        int first = row + 8 * r + extent.diagonal_left - column;
        if constexpr (Config::KV_RANGES) first = max(Config::MASK_LEFT ? first : 0, extent.first_key - column);
#pragma unroll
        for (int j = 0; j < COUNT / 4; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int offset = 8 * j + c;
                const bool visible = offset <= last && (!masked_on_the_left<Config> || offset >= first);
                if (!visible) scores[4 * j + 2 * r + c] = negative_infinity();
            }
        }
    }
}

}  // namespace rtk
