// A sum over the GPUs of one host, in one kernel: each writes its part straight into the memory of all
// the others, and adds up what it has been sent.
//
// There are two sets of words (words.cuh), used in turns: who sends in the turn after the
// next has received everybody's words of the next one, which a peer sends when its kernel of this turn
// has ended, and so has read them. So nobody overwrites what is still to be read, and nobody has to
// say that he has read it.
//
// Marks count a block's turns. They live on the device, so that a CUDA graph can hold the kernel; and
// as blocks have the same words in messages of all sizes, no block has to know of the others.
//
// Every rank adds in the order of ranks, in float32, and rounds once: the sums have the same bits
// everywhere.
#include "all_reduce.h"

#include "words.cuh"

namespace lmi {
namespace {

template <typename T>
constexpr int OF_WORD = 4 / sizeof(T);  // elements

template <typename T>
__device__ inline float2 unpacked(unsigned bits) {
  if constexpr (std::is_same_v<T, float>) {
    return {__uint_as_float(bits), 0};
  } else {
    return widen(*reinterpret_cast<const typename TwoOf<T>::type*>(&bits));
  }
}

template <typename T>
__device__ inline unsigned packed(float2 sum) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(sum.x);
  } else {
    const T pair[2] = {narrow<T>(sum.x), narrow<T>(sum.y)};
    return *reinterpret_cast<const unsigned*>(pair);
  }
}

// As many elements as a word of T has, from `at` on.
template <typename T>
__device__ inline float2 load_word(Operand from, int at) {
  if (!from.data) return {0, 0};
  return {load(from, at), OF_WORD<T> == 2 ? load(from, at + 1) : 0};
}

template <typename T>
__device__ inline void store_word(const AllReduceParams& p, int word, float2 value) {
  void* to = p.residual ? p.residual : p.x;
  if (!p.residual || p.residual_type == p.type) {
    static_cast<unsigned*>(to)[word] = packed<T>(value);
    return;
  }
  const int at = word * OF_WORD<T>;
  store(to, p.residual_type, at, value.x);
  if (OF_WORD<T> == 2) store(to, p.residual_type, at + 1, value.y);
}

__device__ inline float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

// One word of every peer, in the order of ranks; this rank's is left out. False if one does not come
// within `patience` nanoseconds.
__device__ inline bool receive(const AllReduceParams& p, unsigned mark, int at,
                               unsigned long long patience, unsigned (&bits)[MOST_PEERS]) {
  unsigned long long words[MOST_PEERS] = {};
  unsigned long long begun = 0;
  for (bool complete = false; !complete;) {
    complete = true;
#pragma unroll
    for (int r = 0; r < MOST_PEERS; ++r) {  // all that are missing at once
      if (r < p.peers.ranks && r != p.peers.rank && mark_of(words[r]) != mark) {
        words[r] = peek(&p.peers.own->words[mark & 1][r][at]);
      }
    }
#pragma unroll
    for (int r = 0; r < MOST_PEERS; ++r) {
      if (r < p.peers.ranks && r != p.peers.rank) complete &= mark_of(words[r]) == mark;
    }
    if (complete) break;
    if (begun == 0) {
      begun = now();
    } else if (now() - begun > patience) {
      return false;
    }
  }
#pragma unroll
  for (int r = 0; r < MOST_PEERS; ++r) {
    bits[r] = static_cast<unsigned>(words[r]);
    if (r < p.peers.ranks && r != p.peers.rank) send(&p.peers.own->words[mark & 1][r][at], 0, 0);
  }
  return true;
}

template <typename T>
__global__ void __launch_bounds__(SUM_THREADS, 1) all_reduce_kernel(const AllReduceParams p) {
  let_next_start();
  wait_for_last();
  const unsigned mark = after(p.peers.own->marks[blockIdx.x]);
  // After one that did not come, not to wait as long in all that follows. No branch: what is sent
  // does not wait for it.
  const unsigned long long patience = p.peers.own->broken ? 0 : p.peers.patience;
  const int at = blockIdx.x * SUM_THREADS + threadIdx.x;
  if (at < p.words) {
    unsigned bits[MOST_PEERS];
    const unsigned mine = static_cast<const unsigned*>(p.x)[at];
#pragma unroll
    for (int r = 0; r < MOST_PEERS; ++r) {
      if (r < p.peers.ranks && r != p.peers.rank) send(&p.peers.inboxes[r]->words[mark & 1][p.peers.rank][at], mine, mark);
    }
    // While words are under way.
    const int first = at * OF_WORD<T>;
    const float2 residual = load_word<T>({p.residual, p.residual_type}, first);
    const float2 bias = load_word<T>(p.bias, first % p.features);
    if (receive(p, mark, at, patience, bits)) {
      float2 sum = {0, 0};
#pragma unroll
      for (int r = 0; r < MOST_PEERS; ++r) {
        if (r < p.peers.ranks) sum = plus(sum, unpacked<T>(r == p.peers.rank ? mine : bits[r]));
      }
      store_word<T>(p, at, plus(residual, plus(sum, bias)));
    } else {
      p.peers.own->broken = 1;
      *static_cast<volatile int*>(p.peers.failed) = 1;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) p.peers.own->marks[blockIdx.x] = mark;
}

template <typename T>
void launch_all_reduce(const AllReduceParams& p, const Device& gpu, cudaStream_t stream) {
  const int blocks = (p.words + SUM_THREADS - 1) / SUM_THREADS;
  launch(&all_reduce_kernel<T>, p, dim3(blocks), SUM_THREADS, 0, early(gpu), stream);
}

}  // namespace

void all_reduce(const AllReduceParams& p, const Device& gpu, cudaStream_t stream) {
  switch (p.type) {
    case Type::float16: return launch_all_reduce<__half>(p, gpu, stream);
    case Type::bfloat16: return launch_all_reduce<__nv_bfloat16>(p, gpu, stream);
    default: return launch_all_reduce<float>(p, gpu, stream);
  }
}

}  // namespace lmi
