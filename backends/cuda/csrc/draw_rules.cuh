// What a row's options and its earlier tokens do to its logits before anything is drawn: bias, penalties,
// bans, forced tokens; as lmi_multi/ops/processors.py and bans.py have it.
#pragma once

#include "draw.h"

namespace lmi {

// A block's tokens of a row, from id `first` on: their logits `x`, and `w`, of which use is made before
// they have weights.
struct Chunk {
  int first, count;
  float *x, *w;

  // A token's place, -1 if it is not among them.
  __device__ int at(int id) const { return id >= first && id - first < count ? id - first : -1; }

  // All places, each always by the same thread. A warp has neighbouring ones.
  template <typename See>
  __device__ void visit(See see) const {
    const int end = min(begin() + each(), count);
#pragma unroll 4
    for (int i = begin() + threadIdx.x % 32; i < end; i += 32) see(i);
  }
  __device__ int each() const { return (count + blockDim.x - 1) / blockDim.x * 32; }
  __device__ int begin() const { return threadIdx.x / 32 * each(); }

  __device__ void put(int id, float logit) const {
    const int place = at(id);
    if (place >= 0) x[place] = logit;
  }
};

// A row's earlier tokens: the last one is what the step was fed.
struct Past {
  const DrawHistory& in;
  int row, length, given, last;

  __device__ Past(const DrawParams& p, const DrawOptions& o, int row)
      : in(p.history), row(row), length(p.lengths[row]), given(o.given),
        last(static_cast<int>(p.ids[row])) {}

  __device__ int* place(int position) const {
    const int block = in.table[static_cast<int64_t>(row) * in.width + position / in.block_size];
    return in.tokens + static_cast<int64_t>(block) * in.block_size + position % in.block_size;
  }

  __device__ int operator[](int position) const {
    return position == length - 1 ? last : *place(position);
  }

  __device__ int encoded() const { return in.cross_width ? in.cross_lengths[row] : 0; }

  __device__ int encoded_at(int position) const {
    const int place = position / in.block_size;
    const int block = in.cross_table[static_cast<int64_t>(row) * in.cross_width + place];
    return in.tokens[static_cast<int64_t>(block) * in.block_size + position % in.block_size];
  }

  // Whether the `count` tokens that end before `position` are `ids`, or are the row's last ones.
  __device__ bool ends_with(const int* ids, int count) const {
    if (count > length) return false;
    for (int i = 1; i <= count; ++i) {
      if ((*this)[length - i] != ids[count - i]) return false;
    }
    return true;
  }
  __device__ bool repeats(int position, int count) const {
    for (int i = 1; i <= count; ++i) {
      if ((*this)[length - i] != (*this)[position - i]) return false;
    }
    return true;
  }
};

// What `w` says of a token until it has a weight: whether it is the prompt's, and how often it was drawn.
constexpr uint32_t OF_PROMPT = 1u << 31, GIVEN = 1u << 30, DRAWN = GIVEN - 1;

__device__ inline float penalised(float x, const DrawOptions& o, uint32_t marks) {
  if (marks & OF_PROMPT && o.prompt != 1) x = x < 0 ? x * o.prompt : x / o.prompt;
  if (marks & (GIVEN | DRAWN) && o.repetition != 1) x = x < 0 ? x * o.repetition : x / o.repetition;
  if (marks & DRAWN) {  // in double, as Python does it
    x += __double2float_rn(__dsub_rn(-o.presence, __dmul_rn(o.frequency, marks & DRAWN)));
  }
  return x;
}

__device__ inline void penalise(const Chunk& chunk, const DrawOptions& o, const Past& past) {
  auto* marks = reinterpret_cast<uint32_t*>(chunk.w);
  chunk.visit([&](int i) { marks[i] = 0; });
  __syncthreads();
  const int encoded = past.encoded();
  for (int i = threadIdx.x; i < past.length; i += blockDim.x) {
    const int place = chunk.at(past[i]);
    if (place < 0) continue;
    if (i >= past.given) atomicAdd(marks + place, 1);
    else atomicOr(marks + place, encoded ? GIVEN : GIVEN | OF_PROMPT);
  }
  if (o.prompt != 1) {
    for (int i = threadIdx.x; i < encoded; i += blockDim.x) {
      const int place = chunk.at(past.encoded_at(i));
      if (place >= 0) atomicOr(marks + place, OF_PROMPT);
    }
  }
  __syncthreads();
  chunk.visit([&](int i) {
    if (marks[i]) chunk.x[i] = penalised(chunk.x[i], o, marks[i]);
  });
  __syncthreads();
}

// Ids that would complete an n-gram that was there before, and words that the row ends with all but the last
// token of.
__device__ inline void ban(const Chunk& chunk, const DrawOptions& o, const Past& past, const int* lists) {
  for (int i = threadIdx.x; i < o.bans; i += blockDim.x) chunk.put(lists[o.banned + i], -INFINITY);
  if (o.ngram) {
    for (int i = o.ngram - 1 + threadIdx.x; i < past.length; i += blockDim.x) {
      if (past.repeats(i, o.ngram - 1)) chunk.put(past[i], -INFINITY);
    }
  }
  const int *begins = lists + o.words, *ids = begins + o.word_count + 1;
  for (int i = threadIdx.x; i < o.word_count; i += blockDim.x) {
    const int last = begins[i + 1] - 1;
    if (past.ends_with(ids + begins[i], last - begins[i])) chunk.put(ids[last], -INFINITY);
  }
}

// All of it, on a chunk's logits as they come. Ends with a barrier of the block if it does anything.
__device__ inline void apply_rules(const DrawParams& p, const DrawOptions& o, const Chunk& chunk, int row) {
  if (!(o.biases || o.bans || o.forces || o.ngram || o.word_count || o.presence != 0 ||
        o.frequency != 0 || o.repetition != 1 || o.prompt != 1)) {
    return;
  }
  const Past past(p, o, row);
  __syncthreads();
  for (int i = threadIdx.x; i < o.biases; i += blockDim.x) {
    const int* pair = p.lists + o.bias + 2 * i;
    const int place = chunk.at(pair[0]);
    if (place >= 0) chunk.x[place] += __int_as_float(pair[1]);
  }
  __syncthreads();
  if (o.presence != 0 || o.frequency != 0 || o.repetition != 1 || o.prompt != 1) {
    penalise(chunk, o, past);
  }
  if (o.forces) {
    chunk.visit([&](int i) { chunk.x[i] = -INFINITY; });
    __syncthreads();
    for (int i = threadIdx.x; i < o.forces; i += blockDim.x) chunk.put(p.lists[o.forced + i], 0);
    __syncthreads();
  }
  ban(chunk, o, past, p.lists);
  __syncthreads();
}

}  // namespace lmi
