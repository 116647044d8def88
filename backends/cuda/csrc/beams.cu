// How searches go on: the best continuations of each one's beams, and what the step after this one
// needs to begin before the host has seen them.
//
// Each warp of a row's blocks lists what is best in its share, and adds up its exponentials. The last
// block of a search merges the lists of all its rows, by scores, and lets the beams go on.
#include "beams.h"
#include "ranking.cuh"

namespace lmi {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
static_assert(BEAM_PARTS * WARPS == BEAM_LISTS && BEAM_LISTS == 64, "a lane has two lists of a row");

// The sum of exp(logit - top) over what a lane has seen, of which `top` is the largest.
struct Exponentials {
  float top = -INFINITY, sum = 0;

  template <int N>
  __device__ void see(const float (&logits)[N]) {
    float highest = logits[0];
#pragma unroll
    for (int i = 1; i < N; ++i) highest = fmaxf(highest, logits[i]);
    if (highest > top) sum *= __expf(top - highest), top = highest;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += logits[i] == -INFINITY ? 0 : __expf(logits[i] - top);
  }

  // Over the whole warp, whose largest is `highest`.
  __device__ float of_warp(float highest) const {
    float whole = top == -INFINITY ? 0 : sum * __expf(top - highest);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) whole += __shfl_xor_sync(~0u, whole, offset);
    return whole;
  }
};

// A warp's share of a row.
struct Share {
  Ranking best;
  Exponentials exponentials;

  // One a lane, or none.
  template <typename T>
  __device__ void see_single(const T* logits, int at, bool there, int keep) {
    const float logit = there ? widen(logits[at]) : -INFINITY;
    const float logits_seen[1] = {logit};
    exponentials.see(logits_seen);
    best.take(there ? entry_of(key_of(logit), at) : 0, keep);
  }
};

// 16 bytes at a time, but for what lies before and behind whole ones.
template <typename T>
__device__ Share see_share(const T* logits, int vocab, int keep) {
  constexpr int EACH = 16 / sizeof(T), STRIDE = BEAM_PARTS * THREADS;
  const int place = blockIdx.x * THREADS + threadIdx.x, lane = threadIdx.x % 32;
  const int skipped = static_cast<int>(-reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int before = min(skipped, vocab), count = (vocab - before) / EACH;
  const int behind = before + count * EACH;
  const auto* whole = reinterpret_cast<const uint4*>(logits + before);
  Share share;
  if (place - lane == 0) share.see_single(logits, place, place < before, keep);
  uint4 raw{};
  if (place < count) raw = whole[place];
#pragma unroll 1
  for (int from = place; from - lane < count; from += STRIDE) {  // the same turns in all lanes
    const uint4 own = raw;
    if (from + STRIDE < count) raw = whole[from + STRIDE];  // on its way meanwhile
    const T* values = reinterpret_cast<const T*>(&own);
    float wide[EACH];
    uint32_t keys[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      wide[i] = from < count ? widen(values[i]) : -INFINITY;
      keys[i] = from < count ? key_of(wide[i]) : 0;
    }
    share.exponentials.see(wide);
    share.best.take(keys, before + from * EACH, keep);
  }
  if (place - lane == 0) {
    share.see_single(logits, behind + place, behind + place < vocab, keep);
  }
  return share;
}

// What the blocks of a search leave for its last one.
struct Work {
  Entry* lists;
  float* sums;

  __device__ explicit Work(const BeamParams& p) : lists(p.work) {
    sums = reinterpret_cast<float*>(lists + int64_t{1} * p.rows() * BEAM_LISTS * p.keep);
  }
};

// What one search's last block knows.
struct Search {
  Entry lists[WARPS][32];
  float top[MOST_BEAMS], log_sum[MOST_BEAMS], score[MOST_BEAMS];
  int parent[MOST_BEAMS], token[MOST_BEAMS];
  int columns[MOST_BEAMS][32];  // of the block table
  int unusable;
};

// Each row's softmax. As torch has it, a logit's log-probability is (logit - top) - log(sum).
__device__ void normalize(const BeamParams& p, const Work& work, int first, Search& search) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int beam = warp; beam < p.width; beam += WARPS) {
    const int64_t list = static_cast<int64_t>(first + beam) * BEAM_LISTS + lane;
    uint32_t keys[2];
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keys[i] = key_in(__ldcg(work.lists + (list + i * 32) * p.keep));
      sums[i] = __ldcg(work.sums + list + i * 32);
    }
    const uint32_t most = __reduce_max_sync(~0u, max(keys[0], keys[1]));
    const float top = number_of(most);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (sums[i] != 0) sum += sums[i] * __expf(number_of(keys[i]) - top);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) {
      search.top[beam] = top, search.log_sum[beam] = logf(sum);
      if (!is_usable(most)) search.unusable = 1;
    }
  }
}

// The best of all the search's lists, one a lane of the first warp; ids are beam * vocab + token.
__device__ Entry merge(const BeamParams& p, const Work& work, int first, Search& search) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int of_row = BEAM_LISTS * p.keep, count = p.width * of_row;
  const Entry* entries = work.lists + static_cast<int64_t>(first) * of_row;
  Ranking best;
  for (int from = warp * 32; from < count; from += THREADS) {
    const int at = from + lane;
    Entry entry = at < count ? __ldcg(entries + at) : 0;
    if (entry) {
      const int beam = at / of_row;
      const float log_prob = number_of(key_in(entry)) - search.top[beam] - search.log_sum[beam];
      const float score = log_prob + p.scores[first + beam];
      entry = entry_of(key_of(score), beam * p.vocab + id_in(entry));
    }
    best.take(entry, p.keep);
  }
  search.lists[warp][lane] = best.own;
  __syncthreads();
  if (warp > 0) return 0;
  best = {};
  for (int list = 0; list < WARPS; ++list) {
    best.take(lane < p.keep ? search.lists[list][lane] : 0, p.keep);
  }
  return best.own;
}

__device__ bool stops(const BeamParams& p, int first, int token) {
  const int* ids = p.stops + static_cast<int64_t>(first) * MOST_STOPS;
  bool found = false;
#pragma unroll
  for (int i = 0; i < MOST_STOPS; ++i) found |= ids[i] == token;
  return found;
}

// For the host the continuations; for the beams the best that do not stop. Beams for which there are
// none have a score of -inf. By the first warp.
__device__ void choose(const BeamParams& p, int first, Entry entry, int* record, Search& search) {
  const int lane = threadIdx.x % 32, keep = p.keep;
  const float score = number_of(key_in(entry));
  const int place = entry ? static_cast<int>(id_in(entry)) : 0;
  const int beam = place / p.vocab, token = place % p.vocab;
  if (lane < keep) {
    record[lane] = __float_as_int(score);
    record[keep + lane] = beam, record[2 * keep + lane] = token;
  }
  if (lane == 0) record[3 * keep] = !search.unusable;
  const bool goes = lane < keep && score > -INFINITY && !stops(p, first, token);
  const unsigned going = __ballot_sync(~0u, goes);
  const int count = __popc(going), rank = __popc(going & ((1u << lane) - 1));
  if (goes && rank < p.width) {
    search.parent[rank] = beam, search.token[rank] = token, search.score[rank] = score;
  }
  if (lane >= count && lane < p.width) {
    search.parent[lane] = lane, search.token[lane] = 0, search.score[lane] = -INFINITY;
  }
}

// Every beam takes over the blocks of the one that it continues. By the whole block.
__device__ void inherit(const BeamParams& p, int first, int used, Search& search) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* table = p.table + static_cast<int64_t>(first) * p.table_width;
  for (int start = 0; start < used; start += 32) {
    const int column = start + lane;
    for (int beam = warp; beam < p.width; beam += WARPS) {
      const int from = search.parent[beam] * p.table_width + column;
      if (column < used) search.columns[beam][lane] = table[from];
    }
    __syncthreads();
    for (int beam = warp; beam < p.width; beam += WARPS) {
      if (column < used) table[beam * p.table_width + column] = search.columns[beam][lane];
    }
    __syncthreads();
  }
}

__device__ int nth_bit(unsigned bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __ffs(bits) - 1;  // -1: there are not so many
}

// Where a beam writes its next token, and what is copied there before: the block that it has, unless
// a beam behind it has the same one; else one that no beam has. By the first warp, a beam a lane.
struct Written {
  int block, source;
};

__device__ Written place(const BeamParams& p, int row, int column, bool is_new) {
  const int lane = threadIdx.x % 32;
  const bool there = lane < p.width;
  const int64_t at = static_cast<int64_t>(row) * p.table_width + column;
  const int own = there ? p.own[at] : -1;
  if (is_new) return {own, -1};
  const int held = there ? p.table[at] : -2 - lane;
  const unsigned same = __match_any_sync(~0u, held);
  const bool parts = there && same >> lane > 1;
  bool used = !there;
  for (int beam = 0; beam < p.width; ++beam) used |= own == __shfl_sync(~0u, held, beam);
  const unsigned parting = __ballot_sync(~0u, parts), unused = __ballot_sync(~0u, !used);
  const int chosen = nth_bit(unused, __popc(parting & ((1u << lane) - 1)));
  const int target = __shfl_sync(~0u, own, chosen & 31);
  return parts && chosen >= 0 ? Written{target, held} : Written{held, -1};
}

// The search's rows as the next step wants them, which writes a token further.
__device__ void go_on(const BeamParams& p, int first, int* record, Search& search) {
  const int lane = threadIdx.x % 32, row = first + lane;
  const int length = p.lengths[first], column = length / p.block_size;
  inherit(p, first, min((length - 1) / p.block_size + 1, p.table_width), search);
  if (threadIdx.x >= 32) return;
  Written written{-1, -1};
  if (column < p.table_width) written = place(p, row, column, length % p.block_size == 0);
  if (lane >= p.width) return;
  if (column < p.table_width) {
    p.table[static_cast<int64_t>(row) * p.table_width + column] = written.block;
  }
  p.copies[2 * row] = written.source, p.copies[2 * row + 1] = written.block;
  p.ids[row] = search.token[lane], p.scores[row] = search.score[lane];
  p.lengths[row] = length + 1, p.turns[row] = (p.turns[row] + 1) & 1;
  record[lane] = search.parent[lane];
  record[p.width + lane] = search.token[lane];
  record[2 * p.width + lane] = __float_as_int(search.score[lane]);
  record[3 * p.width + lane] = written.block, record[4 * p.width + lane] = written.source;
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) beams_kernel(const BeamParams p) {
  __shared__ Search search;
  let_next_start();
  wait_for_last();
  const int row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Work work(p);
  const Share share =
      see_share(static_cast<const T*>(p.logits.data) + row * p.stride, p.vocab, p.keep);
  const int64_t list = static_cast<int64_t>(row) * BEAM_LISTS + blockIdx.x * WARPS + warp;
  if (lane < p.keep) work.lists[list * p.keep + lane] = share.best.own;
  const float highest = number_of(key_in(__shfl_sync(~0u, share.best.own, 0)));
  const float sum = share.exponentials.of_warp(highest);
  if (lane == 0) work.sums[list] = sum;

  const int number = row / p.width, first = number * p.width;
  if (threadIdx.x == 0) search.unusable = 0;
  const Team own = Team::whole_block();
  if (!is_last_part(own, p.counters + number, BEAM_PARTS * p.width)) return;
  normalize(p, work, first, search);
  __syncthreads();
  const Entry entry = merge(p, work, first, search);
  int* found = p.found + (p.turns[first] & 1) * p.found_stride + int64_t{1} * number * p.record();
  if (warp == 0) choose(p, first, entry, found, search);
  __syncthreads();
  if (p.live[first]) {
    go_on(p, first, found + 3 * p.keep + 1, search);
  } else if (threadIdx.x < p.width) {
    p.copies[2 * (first + threadIdx.x)] = -1;
  }
}

template <typename T>
void launch_beams(const BeamParams& p, const Device& gpu, cudaStream_t stream) {
  launch(&beams_kernel<T>, p, dim3(BEAM_PARTS, p.rows()), THREADS, 0, early(gpu), stream);
}

}  // namespace

void beams(const BeamParams& p, const Device& gpu, cudaStream_t stream) {
  switch (p.logits.type) {
    case Type::float16: return launch_beams<__half>(p, gpu, stream);
    case Type::bfloat16: return launch_beams<__nv_bfloat16>(p, gpu, stream);
    default: return launch_beams<float>(p, gpu, stream);
  }
}

}  // namespace lmi
