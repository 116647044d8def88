// A row's next token by all options, and what the step leaves for the next: one kernel, in which some blocks
// share a row's vocabulary, and keep their part of it in shared memory.
//
// What a token weighs is an integer, and all sums that decide are of integers, as in the reference
// (lmi_multi/ops/sampling.py), so they do not depend on the order that threads add in, nor on how many
// blocks there are. The last token of a selection is found by a histogram over how far logits are below
// the likeliest one. Those in the bin that matters are listed, and each is compared with all; where they
// are too many there are more histograms, over 11 bits of their keys at a time.
#include "draw_rules.cuh"
#include "draw_team.cuh"

namespace lmi {
namespace {

constexpr int WEIGHT_BITS = 38, DRAW_BITS = 24;  // as the reference has them
constexpr int EXPONENTIAL_BITS = 44;  // of exponentials, of which 2^18 are at most 1
constexpr int NOBODY = -2;
// A token that is further below the likeliest one weighs less than one: exp(-26.4) is 2^-38.
constexpr float DEPTH = 27;
static_assert(WEIGHT_BITS < 32 + LOW_BITS);

__device__ inline float scaled(int bits) { return __uint_as_float((127 + bits) << 23); }

// exp(x), x <= 0.
__device__ inline Weight exponential(float x) {
  return static_cast<Weight>(expf(x) * scaled(EXPONENTIAL_BITS));
}

__device__ inline float of_exponentials(Weight sum) {
  return static_cast<float>(sum) * scaled(-EXPONENTIAL_BITS);
}

__device__ inline Weight share(Weight whole, float part) {
  return static_cast<Weight>(part * scaled(DRAW_BITS)) * whole >> DRAW_BITS;
}

__device__ inline int bin_of(float depth) {
  return static_cast<int>(fminf(fmaxf(depth, 0) * ((BINS - 1) / DEPTH), BINS - 1));
}

// The largest key up to `most` for which `depth_of`, which grows as keys fall, comes to `bin`, or where it
// is behind it.
template <typename DepthOf>
__device__ uint32_t largest_key(int bin, uint32_t least, uint32_t most, DepthOf depth_of) {
  while (least < most) {
    const uint32_t middle = least + (most - least + 1) / 2;
    if (bin_of(depth_of(middle)) >= bin) least = middle;
    else most = middle - 1;
  }
  return least;
}

// Of the tokens whose keys are `low` to `high`, behind those that weigh `above`, the first that together
// come to `target`.
template <typename See>
__device__ Cut refine(const Chunk& chunk, Meet& meet, Weight above, Weight target, uint32_t low,
                      uint32_t high, See see) {
  for (;;) {
    const int shift = max(32 - __clz(high - low) - BIN_BITS, 0);
    chunk.visit([&](int i) {
      const Seen own = see(i);
      if (own.weight && own.key >= low && own.key <= high) meet.add((high - own.key) >> shift, own.weight);
    });
    const Crossing found = meet.crossing(above, target);
    if (found.bin < 0) return {0, 0, 0, true};
    above = found.above, high -= static_cast<uint32_t>(found.bin) << shift;
    if (!shift) return {high, above, found.own, false};
    low = max(low, high - min(high, (1u << shift) - 1));
  }
}

// The same of all tokens. `depth_of` a key: how late its tokens come, from 0; others' keys are not between
// `least` and `most`.
template <typename See, typename DepthOf>
__device__ Cut select(const Chunk& chunk, Meet& meet, Weight target, uint32_t least, uint32_t most,
                      See see, DepthOf depth_of) {
  chunk.visit([&](int i) {
    const Seen own = see(i);
    if (own.weight) meet.add(bin_of(depth_of(own.key)), own.weight);
  });
  const Crossing found = meet.crossing(0, target);
  if (found.bin < 0) return {0, 0, 0, true};
  const uint32_t high = largest_key(found.bin, least, most, depth_of);
  const uint32_t behind = largest_key(found.bin + 1, least, high, depth_of);
  const uint32_t low = found.bin == BINS - 1 ? least : behind + 1;
  chunk.visit([&](int i) {
    const Seen own = see(i);
    if (own.weight && own.key >= low && own.key <= high) meet.list(own);
  });
  Cut cut;
  if (meet.listed(found.above, target, cut)) return cut;
  return refine(chunk, meet, found.above, target, low, high, see);
}

// What the tokens of a row weigh, of which ever fewer are left: others weigh 0.
struct Weights {
  const Chunk& chunk;
  Meet& meet;
  float top, sum;  // the largest of the row, and of all exponentials

  __device__ float plain(float x) const { return truncf(expf(x - top) / sum * scaled(WEIGHT_BITS)); }

  __device__ Weight of(int i) const { return static_cast<Weight>(chunk.w[i]); }

  template <typename Gone>
  __device__ void drop(Gone gone) const {
    chunk.visit([&](int i) {
      if (gone(i)) chunk.w[i] = 0;
    });
  }

  __device__ Weight total() const {
    Weight own = 0;
    chunk.visit([&](int i) { own += of(i); });
    return meet.all({own, 0}, Sums()).first;
  }

  // By the size of their logits.
  template <typename WeightOf>
  __device__ Cut likeliest(Weight target, WeightOf weight_of) const {
    return select(
        chunk, meet, target, key_of(-INFINITY), key_of(top),
        [&](int i) { return Seen{key_of(chunk.x[i]), weight_of(i)}; },
        [&](uint32_t key) { return top - number_of(key); });
  }

  // What ties with the k-th stays.
  __device__ void keep_top_k(int k) const {
    const float least = top - DEPTH;  // others weigh nothing
    const Cut cut = likeliest(k, [&](int i) { return Weight{chunk.x[i] >= least}; });
    if (!cut.none) drop([&](int i) { return key_of(chunk.x[i]) < cut.key; });
  }

  // The fewest that reach p of all; of equal ones the highest ids.
  __device__ void keep_top_p(float p) const {
    const Weight target = max(share(total(), p), Weight{1});
    const Cut cut = likeliest(target, [&](int i) { return of(i); });
    const Weight each = max(static_cast<Weight>(plain(number_of(cut.key))), Weight{1});
    const Weight room = (target - cut.above + each - 1) / each;
    uint32_t least_id = 0;
    if (cut.own > room * each) {
      const auto is_last = [&](int i) {
        return Seen{static_cast<uint32_t>(chunk.first + i), key_of(chunk.x[i]) == cut.key};
      };
      least_id = refine(chunk, meet, 0, room, 0, MOST_DRAWN_VOCAB - 1, is_last).key;
    }
    drop([&](int i) {
      const uint32_t key = key_of(chunk.x[i]), id = chunk.first + i;
      return key < cut.key || (key == cut.key && id < least_id);
    });
  }

  __device__ void keep_min_p(float p) const {
    const Weight least = share(static_cast<Weight>(plain(top)), p);
    drop([&](int i) { return of(i) < least; });
  }

  __device__ void keep_typical(float p) const {
    Both own;
    chunk.visit([&](int i) {
      if (chunk.w[i] > 0) own.first += of(i), own.second += exponential(chunk.x[i] - top);
    });
    const Both sums = meet.all(own, Sums());
    const float log_of_all = logf(of_exponentials(sums.second));
    Weight bits = 0;
    chunk.visit([&](int i) {
      if (chunk.w[i] == 0) return;
      const float log_p = chunk.x[i] - top - log_of_all;
      bits += static_cast<Weight>(expf(log_p) * -log_p * scaled(WEIGHT_BITS));
    });
    const float entropy = static_cast<float>(meet.all({bits, 0}, Sums()).first) * scaled(-WEIGHT_BITS);
    const auto distance = [&](int i) { return fabsf(-(chunk.x[i] - top - log_of_all) - entropy); };
    const Weight target = max(share(sums.first, p), Weight{1});
    const Cut cut = select(
        chunk, meet, target, ~key_of(INFINITY), ~key_of(0),
        [&](int i) { return Seen{~key_of(distance(i)), of(i)}; },
        [&](uint32_t key) { return number_of(~key); });
    drop([&](int i) { return ~key_of(distance(i)) < cut.key; });
  }

  // The first id whose cumulative weight exceeds the number's share of all, to the one lane that finds it, or
  // -1 to one if nothing weighs anything; NOBODY to all others.
  __device__ int draw(float uniform) const {
    Weight own = 0, before, of_block;
    chunk.visit([&](int i) { own += of(i); });
    const Weight whole = meet.total(own, before, of_block), target = share(whole, uniform);
    if (!whole) return meet.block() == 0 && threadIdx.x == 0 ? -1 : NOBODY;
    if (before > target || before + of_block <= target) return NOBODY;  // whole blocks
    // The warp in whose tokens it lies goes through them.
    const int lane = threadIdx.x % 32, begin = chunk.begin();
    const Weight first = before + __shfl_sync(~0u, meet.before(own), 0);
    const Weight of_warp = __shfl_sync(~0u, Meet::of_lanes_until(own), 31);
    if (first > target || first + of_warp <= target) return NOBODY;
    Weight until = first;
    for (int from = begin; from < chunk.count; from += 32) {
      const Weight sums = Meet::of_lanes_until(from + lane < chunk.count ? of(from + lane) : 0);
      const unsigned beyond = __ballot_sync(~0u, until + sums > target);
      if (beyond) return lane == __ffs(beyond) - 1 ? chunk.first + from + lane : NOBODY;
      until += __shfl_sync(~0u, sums, 31);
    }
    return NOBODY;
  }
};

// Log-probabilities of the model's own logits, which `chunk` still has: those of the likeliest to the host.
// Returns what to take off a logit.
__device__ float report_likeliest(const Chunk& chunk, Meet& meet, int count, int* to) {
  const int lane = threadIdx.x % 32, begin = chunk.begin(), end = min(begin + chunk.each(), chunk.count);
  uint32_t key = 0;
  Ranking ranking;
  for (int from = begin; from < end; from += 32) {
    const int i = from + lane;
    const uint32_t own = i < end ? key_of(chunk.x[i]) : 0;
    key = max(key, own);
    if (count) ranking.take(own ? entry_of(own, chunk.first + i) : 0, count);
  }
  const float top = number_of(static_cast<uint32_t>(meet.all({key, 0}, Largest()).first));
  Weight sum = 0;
  chunk.visit([&](int i) { sum += exponential(chunk.x[i] - top); });
  const float less = top + logf(of_exponentials(meet.all({sum, 0}, Sums()).first));
  if (!count) return less;
  ranking = meet.likeliest(ranking, count);
  if (meet.block() == 0 && threadIdx.x < count) {
    const bool real = ranking.own;
    to[1 + lane] = real ? static_cast<int>(id_in(ranking.own)) : -1;
    to[1 + MOST_LOGPROBS + lane] = __float_as_int(number_of(key_in(ranking.own)) - less);
  }
  return less;
}

// What the step leaves, by one thread: the token, or -1 if there is none.
__device__ void leave(const DrawParams& p, const DrawOptions& o, int row, int token, int* logprobs,
                      float less) {
  const int live = p.live[row], turn = p.turns[row];
  if (o.logprobs >= 0 && token >= 0) {
    logprobs[0] = __float_as_int(load(p.logits, row * p.stride + token) - less);
  }
  const Past past(p, o, row);
  *past.place(past.length - 1) = past.last;
  p.drawn[(turn & 1) * p.drawn_stride + row] = token;
  p.ids[row] = token < 0 ? 0 : token;
  p.turns[row] = (turn + live) & 1;
  p.lengths[row] = past.length + live;
}

template <typename T>
__device__ void draw_row(const DrawParams& p, int row, const Chunk& chunk, Meet& meet) {
  const DrawOptions& o = p.options[row];
  const T* logits = static_cast<const T*>(p.logits.data) + row * p.stride + chunk.first;
  const bool greedy = o.temperature == 0;
  uint32_t given = 0;
  chunk.visit([&](int i) {
    chunk.x[i] = widen(logits[i]);
    given = max(given, key_of(chunk.x[i]));
  });
  int* logprobs = p.logprobs + ((p.turns[row] & 1) * p.drawn_stride + row) * (1 + 2 * MOST_LOGPROBS);
  const float less = o.logprobs < 0 ? 0 : report_likeliest(chunk, meet, o.logprobs, logprobs);
  apply_rules(p, o, chunk, row);
  Entry best = 0;
  chunk.visit([&](int i) { best = max(best, entry_of(key_of(chunk.x[i]), chunk.first + i)); });
  const Both largest = meet.all({given, best}, Largest());  // neither must hide an infinity
  const bool usable = is_usable(static_cast<uint32_t>(largest.first)) && is_usable(key_in(largest.second));
  const float top = number_of(key_in(largest.second)) / (greedy ? 1 : o.temperature);
  if (!usable || !isfinite(top) || greedy) {
    const int token = usable && isfinite(top) ? static_cast<int>(id_in(largest.second)) : -1;
    if (meet.block() == 0 && threadIdx.x == 0) leave(p, o, row, token, logprobs, less);
    return;
  }
  Weight own = 0;
  chunk.visit([&](int i) {
    chunk.x[i] /= o.temperature;
    own += exponential(chunk.x[i] - top);
  });
  const Weights weights{chunk, meet, top, of_exponentials(meet.all({own, 0}, Sums()).first)};
  chunk.visit([&](int i) { chunk.w[i] = weights.plain(chunk.x[i]); });
  if (o.top_k > 0) weights.keep_top_k(o.top_k);
  if (o.top_p < 1) weights.keep_top_p(o.top_p);
  if (o.min_p > 0) weights.keep_min_p(o.min_p);
  if (o.typical_p < 1) weights.keep_typical(o.typical_p);
  const int token = weights.draw(p.uniform[row]);
  if (token != NOBODY) leave(p, o, row, token, logprobs, less);
}

// A team is a column of blocks; it takes every so many-th row.
template <typename T>
__global__ void __launch_bounds__(DRAW_THREADS, 2) draw_kernel(const DrawParams p) {
  extern __shared__ float floats[];
  __shared__ DrawShared shared;
  Meet meet(shared, static_cast<DrawTeam*>(p.teams)[blockIdx.y]);
  const int first = meet.block() * p.chunk;
  const Chunk chunk{first, max(min(p.chunk, p.vocab - first), 0), floats, floats + p.chunk};
#pragma unroll 1
  for (int row = blockIdx.y; row < p.rows; row += gridDim.y) {
    draw_row<T>(p, row, chunk, meet);
    // Who is still at this row needs what the next one's beginning overwrites.
    __syncthreads();
  }
  meet.end();
}

struct Plan {
  int blocks = 0, teams = 0, chunk = 0;
};

// How rows and their vocabulary are shared out in the shortest time, by what that takes in all passes: a
// token a block's time, and what a row's exchanges, and each of their blocks, take beside it.
Plan plan_draw(const void* kernel, int rows, int vocab, const Device& gpu) {
  constexpr int EXCHANGES = 2048, OF_BLOCK = 32;
  Plan best;
  int64_t least = 0;
  for (int blocks = 1; blocks <= std::min(MOST_DRAW_BLOCKS, gpu.processors); blocks *= 2) {
    const int chunk = (vocab + blocks - 1) / blocks, bytes = 2 * chunk * static_cast<int>(sizeof(float));
    if (chunk > 1 << (32 - LOW_BITS)) continue;  // low parts of a bin would overflow
    if (bytes + static_cast<int>(sizeof(DrawShared)) + 1024 > gpu.shared_per_block) continue;
    allow_shared(kernel, bytes);
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, DRAW_THREADS, bytes), "occupancy");
    const int teams = std::min({rows, each * gpu.processors / blocks, MOST_DRAW_TEAMS});
    if (!teams) continue;
    const int64_t waves = (rows + teams - 1) / teams;
    const int64_t beside = (teams * blocks + gpu.processors - 1) / gpu.processors;
    const int64_t fixed = blocks > 1 ? EXCHANGES + OF_BLOCK * blocks : 0;
    const int64_t cost = waves * (fixed + chunk * beside);
    if (best.blocks && cost >= least) continue;
    best = {blocks, teams, chunk}, least = cost;
  }
  return best;
}

template <typename T>
bool launch_draw(DrawParams& p, const Device& gpu, cudaStream_t stream) {
  const auto* kernel = reinterpret_cast<const void*>(&draw_kernel<T>);
  const Plan plan = plan_draw(kernel, p.rows, p.vocab, gpu);
  if (!plan.blocks) return false;
  p.chunk = plan.chunk;
  const int bytes = 2 * plan.chunk * static_cast<int>(sizeof(float));
  launch(&draw_kernel<T>, p, dim3(plan.blocks, plan.teams), DRAW_THREADS, bytes, Start::together, stream);
  return true;
}

}  // namespace

bool draw(DrawParams p, const Device& gpu, cudaStream_t stream) {
  switch (p.logits.type) {
    case Type::float16: return launch_draw<__half>(p, gpu, stream);
    case Type::bfloat16: return launch_draw<__nv_bfloat16>(p, gpu, stream);
    default: return launch_draw<float>(p, gpu, stream);
  }
}

}  // namespace lmi
