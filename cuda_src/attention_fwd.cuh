// Attention forward: O = softmax(scale * Q K^T) V for one pass over the keys (FlashAttention-3, arXiv:2407.08608).
//
// A persistent block has one producer thread and two or three consumer warpgroups of 64 query rows each. The producer
// brings the block's Q tile and the visible K and V tiles, right to left, into shared memory by TMA. Each consumer
// multiplies S = Q K^T, turns S into probabilities P and accumulates O += P V, where the product of one tile runs under
// the softmax of the next (section 3.2), and the consumers take turns at the tensor cores (section 3.1).
#pragma once
#include <rtk/epilogue.cuh>
#include <rtk/mask.cuh>
#include <rtk/pipeline.cuh>
#include <rtk/scheduler.cuh>
#include <rtk/softmax.cuh>
#include <rtk/tma.cuh>
#include <rtk/wgmma.cuh>

namespace rtk {

struct AttentionFwdParams {
    TensorMap q, k, v;
    unsigned char* o;
    float* lse;           // (batch, heads, seqlen_q), or null
    u32* tile_counter;    // zero before the launch and after it; Scheduler::DYNAMIC only
    const int* kv_first;  // (batch,) or null, where the keys of each sequence begin, and where they end;
    const int* kv_end;    // Config::KV_RANGES only
    i64 o_batch_bytes, o_head_bytes, o_row_bytes;
    TileSchedule schedule;
    SequenceExtent extent;  // of the arrays
    int heads_per_kv;       // query heads that share one head of K and V
    float scale;            // softmax_scale
    float scale_log2;       // what the softmax multiplies scores by, times log2(e)
    float softcap;
};

// Constants that follow from a configuration.
template <class Config>
struct AttentionFwdTraits {
    using Element = typename ElementOf<Config::BF16>::type;
    static constexpr int CONSUMERS = Config::NUM_CONSUMER_WARPGROUPS;
    static constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP_SIZE;
    static constexpr int HEAD_DIM = ceil_div<Config::HEAD_DIM, 16> * 16;  // as the instructions see it
    static constexpr int HEAD_DIM_V = ceil_div<Config::HEAD_DIM_V, 16> * 16;
    // Registers a thread: 64 K of them, what the producer gives up the consumers take.
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;

    using QTile = TileLayout<Config::BLOCK_M, HEAD_DIM, Config::SLAB_QK>;
    using KTile = TileLayout<Config::BLOCK_N, HEAD_DIM, Config::SLAB_QK>;
    using VTile = TileLayout<Config::BLOCK_N, HEAD_DIM_V, Config::SLAB_V>;

    static_assert(Config::BLOCK_M == 64 * CONSUMERS, "each consumer warpgroup owns 64 query rows");
    static_assert(Config::BLOCK_N % 16 == 0 && Config::BLOCK_N <= 256, "BLOCK_N is a multiple of 16 up to 256");
    static_assert(Config::HEAD_DIM % 8 == 0 && Config::HEAD_DIM <= 256, "HEAD_DIM is a multiple of 8 up to 256");
    static_assert(Config::HEAD_DIM_V % 8 == 0 && Config::HEAD_DIM_V <= 256, "HEAD_DIM_V is a multiple of 8 up to 256");
    static_assert(HEAD_DIM % Config::SLAB_QK == 0 || Config::SLAB_QK == 64, "narrow slabs must divide the head");
    static_assert(HEAD_DIM_V % Config::SLAB_V == 0 || Config::SLAB_V == 64, "narrow slabs must divide the head");
    static_assert(!Config::PINGPONG || CONSUMERS > 1, "ping-pong needs two consumer warpgroups");
};

constexpr int align_to_swizzle(int bytes) {
    return (bytes + 1023) / 1024 * 1024;
}

template <class Config>
struct AttentionFwdShared {
    using T = AttentionFwdTraits<Config>;
    static constexpr int K_BYTES = align_to_swizzle(T::KTile::BYTES);
    static constexpr int V_BYTES = align_to_swizzle(T::VTile::BYTES);

    unsigned char q[align_to_swizzle(T::QTile::BYTES)];
    unsigned char k[Config::STAGES][K_BYTES];
    unsigned char v[Config::STAGES][V_BYTES];
    RingBarriers<1> q_ring;
    RingBarriers<Config::STAGES> k_ring;
    RingBarriers<Config::STAGES> v_ring;
    TileRing tile_ring;
};

// --- producer --------------------------------------------------------------------------------------------------------

template <class Config>
struct AttentionFwdProducer {
    using T = AttentionFwdTraits<Config>;
    const AttentionFwdParams& params;
    AttentionFwdShared<Config>& shared;
    RingPosition<1> q;
    RingPosition<Config::STAGES> k, v;

    RTK_DEVICE void load_q(const OutputTile& tile) {
        wait_empty(shared.q_ring, q, "q empty");
        tma_load_tile<typename T::QTile, Config::SLAB_QK>(shared.q, params.q, shared.q_ring.full[0],
                                                          tile.m_block * Config::BLOCK_M, tile.head, tile.batch);
        q.advance();
    }
    RTK_DEVICE void load_k(int n_block, int kv_head, int batch) {
        wait_empty(shared.k_ring, k, "k empty");
        tma_load_tile<typename T::KTile, Config::SLAB_QK>(shared.k[k.stage], params.k, shared.k_ring.full[k.stage],
                                                          n_block * Config::BLOCK_N, kv_head, batch);
        k.advance();
    }
    RTK_DEVICE void load_v(int n_block, int kv_head, int batch) {
        wait_empty(shared.v_ring, v, "v empty");
        tma_load_tile<typename T::VTile, Config::SLAB_V>(shared.v[v.stage], params.v, shared.v_ring.full[v.stage],
                                                         n_block * Config::BLOCK_N, kv_head, batch);
        v.advance();
    }

    RTK_DEVICE void run_tile(const OutputTile& tile) {
        const SequenceExtent extent =
            sequence_extent<Config>(params.extent, params.kv_first, params.kv_end, tile.batch);
        const KvTiles tiles = visible_kv_tiles<Config>(extent, tile.m_block * Config::BLOCK_M);
        if (tiles.begin >= tiles.end) return;
        const int kv_head = tile.head / params.heads_per_kv;
        int n_block = tiles.end - 1;
        load_q(tile);
        load_k(n_block, kv_head, tile.batch);
        // K runs one tile ahead of V, as the consumers do.
        for (; n_block > tiles.begin; --n_block) {
            load_k(n_block - 1, kv_head, tile.batch);
            load_v(n_block, kv_head, tile.batch);
        }
        load_v(n_block, kv_head, tile.batch);
    }
};

// --- consumer --------------------------------------------------------------------------------------------------------

template <class Config>
struct AttentionFwdConsumer {
    using T = AttentionFwdTraits<Config>;
    using Element = typename T::Element;
    static constexpr int S_COUNT = Config::BLOCK_N / 2;
    static constexpr int O_COUNT = T::HEAD_DIM_V / 2;

    const AttentionFwdParams& params;
    AttentionFwdShared<Config>& shared;
    const int warpgroup;
    const int row_in_block;  // the first of this thread's two rows
    const int column;        // its first column in a tile of scores
    RingPosition<1> q;
    RingPosition<Config::STAGES> k, v;
    SequenceExtent extent;  // of the tile in hand
    OnlineSoftmax softmax;
    float o[O_COUNT];
    u32 p[S_COUNT / 2];

    RTK_DEVICE AttentionFwdConsumer(const AttentionFwdParams& params, AttentionFwdShared<Config>& shared, int warpgroup)
        : params(params),
          shared(shared),
          warpgroup(warpgroup),
          row_in_block(warpgroup * 64 + threadIdx.x % WARPGROUP_SIZE / WARP_SIZE * 16 + threadIdx.x % WARP_SIZE / 4),
          column(threadIdx.x % 4 * 2) {
        softmax.scale_log2 = params.scale_log2;
    }

    // Taking turns: a warpgroup issues its products, then lets the next one issue while its own softmax runs.
    RTK_DEVICE void wait_turn() {
        if constexpr (Config::PINGPONG) {
            random_delay();
            named_barrier_sync(1 + warpgroup, 2 * WARPGROUP_SIZE);
        }
    }
    RTK_DEVICE void pass_turn() {
        if constexpr (Config::PINGPONG) {
            named_barrier_arrive(1 + (warpgroup + 1 == T::CONSUMERS ? 0 : warpgroup + 1), 2 * WARPGROUP_SIZE);
        }
    }

    // Issues S = Q K^T.
    RTK_DEVICE void multiply_qk(float (&s)[S_COUNT]) {
        const Descriptor q_tile =
            SlabDescriptor<Config::SLAB_QK>::k_major(shared_address(shared.q) + warpgroup * 64 * T::QTile::ROW_BYTES);
        const Descriptor k_tile = SlabDescriptor<Config::SLAB_QK>::k_major(shared_address(shared.k[k.stage]));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < T::HEAD_DIM / 16; ++step) {
            const int slab = step * 16 / Config::SLAB_QK;
            const int within = step * 16 % Config::SLAB_QK * ELEMENT_BYTES;
            Wgmma<Element, Config::BLOCK_N>::ss(s, q_tile.at(slab * T::QTile::SLAB_BYTES + within),
                                                k_tile.at(slab * T::KTile::SLAB_BYTES + within), step > 0);
        }
        wgmma_commit();
    }

    // Issues O += P V.
    RTK_DEVICE void multiply_pv() {
        const Descriptor v_tile =
            SlabDescriptor<Config::SLAB_V>::mn_major(shared_address(shared.v[v.stage]), T::VTile::SLAB_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Config::BLOCK_N / 16; ++step) {
            Wgmma<Element, T::HEAD_DIM_V>::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                              v_tile.at(step * 16 * T::VTile::ROW_BYTES));
        }
        wgmma_commit();
    }

    // The one place where a score is touched between the two products.
    template <bool MASKED>
    RTK_DEVICE void modify_scores(float (&s)[S_COUNT], const OutputTile& tile, int n_block) {
        if constexpr (Config::SOFTCAP) {
            // cap * tanh(scale * s / cap), with tanh(x) = 1 - 2 / (1 + exp(2x)): tanh.approx is too coarse for fp16.
            const float inner = params.scale / params.softcap * 2.0f * LOG2_E;
#pragma unroll
            for (int i = 0; i < S_COUNT; ++i) {
                s[i] = params.softcap - 2.0f * params.softcap * reciprocal_approx(1.0f + exp2_approx(s[i] * inner));
            }
        } else if constexpr (Config::PRESCALE) {
            // A scale of zero or less would turn the maximum around.
#pragma unroll
            for (int i = 0; i < S_COUNT; ++i) s[i] *= params.scale;
        }
        if constexpr (MASKED) {
            mask_scores<Config>(s, extent, tile.m_block * Config::BLOCK_M + row_in_block,
                                n_block * Config::BLOCK_N + column);
        }
    }

    // The first tile of a row block: scores only, its product with V is issued with the next tile's.
    RTK_DEVICE void first_tile(const OutputTile& tile, int n_block, bool masked) {
        float s[S_COUNT], correction[2];
        wait_full(shared.k_ring, k, "k full");
        multiply_qk(s);
        wgmma_wait<0>();
        pin_registers(s);
        release(shared.k_ring, k);
        k.advance();
        if (masked) {
            modify_scores<true>(s, tile, n_block);
        } else {
            modify_scores<false>(s, tile, n_block);
        }
        softmax.update(s, correction);
        pack_pairs<Element>(s, p);
    }

    // S of this tile and O of the previous one run together; this tile's softmax runs under the latter.
    template <bool MASKED>
    RTK_DEVICE void next_tile(const OutputTile& tile, int n_block) {
        float s[S_COUNT], correction[2];
        wait_full(shared.k_ring, k, "k full");
        wait_turn();
        multiply_qk(s);
        wait_full(shared.v_ring, v, "v full");
        multiply_pv();
        pass_turn();
        wgmma_wait<1>();
        pin_registers(s);
        release(shared.k_ring, k);
        k.advance();
        modify_scores<MASKED>(s, tile, n_block);
        softmax.update(s, correction);
        wgmma_wait<0>();
        pin_registers(o);
        pin_registers(p);
        release(shared.v_ring, v);
        v.advance();
        pack_pairs<Element>(s, p);
        rescale(correction);
    }

    RTK_DEVICE void last_product() {
        wait_full(shared.v_ring, v, "v full");
        multiply_pv();
        wgmma_wait<0>();
        pin_registers(o);
        release(shared.v_ring, v);
        v.advance();
    }

    RTK_DEVICE void rescale(const float (&correction)[2]) {
#pragma unroll
        for (int i = 0; i < O_COUNT; ++i) o[i] *= correction[(i / 2) % 2];
    }

    RTK_DEVICE void run_tile(const OutputTile& tile) {
        extent = sequence_extent<Config>(params.extent, params.kv_first, params.kv_end, tile.batch);
        const KvTiles tiles = visible_kv_tiles<Config>(extent, tile.m_block * Config::BLOCK_M);
        softmax.reset();
#pragma unroll
        for (int i = 0; i < O_COUNT; ++i) o[i] = 0.0f;
        if (tiles.begin < tiles.end) {
            int n_block = tiles.end - 1;
            wait_full(shared.q_ring, q, "q full");
            first_tile(tile, n_block, n_block >= tiles.clear_end || n_block < tiles.clear_begin);
            --n_block;
            if constexpr (Config::MASK_RIGHT) {
                for (; n_block >= max(tiles.begin, tiles.clear_end); --n_block) next_tile<true>(tile, n_block);
            }
            for (; n_block >= max(tiles.begin, tiles.clear_begin); --n_block) next_tile<false>(tile, n_block);
            if constexpr (masked_on_the_left<Config>) {
                for (; n_block >= tiles.begin; --n_block) next_tile<true>(tile, n_block);
            }
            release(shared.q_ring, q);
            q.advance();
            last_product();
        }
        store(tile);
    }

    RTK_DEVICE void store(const OutputTile& tile) {
        float normalizer[2], lse[2];
        softmax.finish(normalizer, lse);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = tile.m_block * Config::BLOCK_M + row_in_block + 8 * r;
            const bool in_range = row < params.extent.seqlen_q;
            unsigned char* o_row = params.o + tile.batch * params.o_batch_bytes + tile.head * params.o_head_bytes +
                                   row * params.o_row_bytes;
            store_row<Element, Config::HEAD_DIM_V>(o, r, normalizer[r], o_row, in_range);
            if (params.lse != nullptr && in_range && threadIdx.x % 4 == 0) {
                const i64 head = static_cast<i64>(tile.batch) * params.schedule.num_heads + tile.head;
                params.lse[head * params.extent.seqlen_q + row] = lse[r];
            }
        }
    }
};

// --- kernel ----------------------------------------------------------------------------------------------------------

template <class Config, int SHARED_BYTES>
RTK_DEVICE void attention_fwd(const AttentionFwdParams& params) {
    using T = AttentionFwdTraits<Config>;
    static_assert(sizeof(AttentionFwdShared<Config>) == SHARED_BYTES, "host and device disagree on shared memory");
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    auto& shared = *reinterpret_cast<AttentionFwdShared<Config>*>(shared_memory);

    if (threadIdx.x == 0) {
        prefetch_tensor_map(params.q);
        prefetch_tensor_map(params.k);
        prefetch_tensor_map(params.v);
        constexpr int CONSUMER_WARPS = T::CONSUMERS * WARPGROUP_SIZE / WARP_SIZE;
        shared.q_ring.init(CONSUMER_WARPS);
        shared.k_ring.init(CONSUMER_WARPS);
        shared.v_ring.init(CONSUMER_WARPS);
        shared.tile_ring.barriers.init(CONSUMER_WARPS);
        fence_barrier_init();
    }
    __syncthreads();

    const int num_tiles = params.schedule.num_tiles();
    const int warpgroup = warp_uniform(threadIdx.x / WARPGROUP_SIZE);
    if (warpgroup == 0) {
        release_registers<T::PRODUCER_REGISTERS>();
        if (warp_uniform(threadIdx.x / WARP_SIZE) == 0 && elect_one()) {
            AttentionFwdProducer<Config> producer{params, shared};
            TileProducer<Config::SCHEDULER>{shared.tile_ring, params.tile_counter}.for_each(
                num_tiles, [&](int tile) { producer.run_tile(params.schedule[tile]); });
        }
    } else {
        claim_registers<T::CONSUMER_REGISTERS>();
        AttentionFwdConsumer<Config> consumer(params, shared, warpgroup - 1);
        if (warpgroup == T::CONSUMERS) consumer.pass_turn();
        TileConsumer<Config::SCHEDULER>{shared.tile_ring}.for_each(
            num_tiles, [&](int tile) { consumer.run_tile(params.schedule[tile]); });
        if (warpgroup == 1) consumer.wait_turn();  // takes back the turn that was left over
    }
}

}  // namespace rtk
