// Several lanes do a head, eight features each: of queries, keys and values alike.
#include "write_kv.h"

namespace lmi {
namespace {

constexpr int THREADS = 256;

struct Work {
  WriteKvParams p;
  int first, count;  // the heads of a token that there is something to do for
  int width;         // lanes a head: dim / 8, rounded up to a power of two
};

// What a lane's eight features, from `at` on, are rotated with in half-split layout: feature i goes
// with i + pairs, and the first of the two has the negative sine.
template <typename T>
__device__ void read_partners(const WriteKvParams& p, const T* head, int64_t token, int at,
                              float (&partner)[8], float (&cos)[8], float (&sin)[8],
                              int (&other)[8]) {
  const float* const cosines = p.cos + token * p.pairs;
  const float* const sines = p.sin + token * p.pairs;
  if (p.pairs % 8 == 0) {
    const bool lower = at < p.pairs, turned = at < 2 * p.pairs;
    const int from = !turned ? at : lower ? at + p.pairs : at - p.pairs;
    load8(head + from, partner);
    load8(cosines + (turned ? min(at, from) : 0), cos);
    load8(sines + (turned ? min(at, from) : 0), sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      other[i] = from + i;
      cos[i] = turned ? cos[i] : 1;
      sin[i] = !turned ? 0 : lower ? -sin[i] : sin[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int own = at + i;
    const bool lower = own < p.pairs, turned = own < 2 * p.pairs;
    other[i] = !turned ? own : lower ? own + p.pairs : own - p.pairs;
    partner[i] = widen(head[other[i]]);
    cos[i] = turned ? cosines[min(own, other[i])] : 1;
    sin[i] = !turned ? 0 : lower ? -sines[own] : sines[other[i]];
  }
}

__device__ inline float sum_over(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A lane's features of a query or key, from `at` on; all lanes of a warp come here.
template <typename T>
__device__ void turn(const Work& work, const T* head, int64_t token, int at, bool active,
                     Operand norm, Raw<T>& raw) {
  const WriteKvParams& p = work.p;
  float x[8], partner[8] = {}, cos[8], sin[8] = {};
  int other[8];
  raw.unpack(x);
#pragma unroll
  for (int i = 0; i < 8; ++i) cos[i] = 1, other[i] = at + i;
  if (p.pairs) read_partners(p, head, token, at, partner, cos, sin, other);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += active ? x[i] * x[i] : 0;
  const float factor = rsqrtf(sum_over(squares, work.width) / p.dim + p.eps);
  if (norm.data) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // rounded, as the norm by itself would be
      x[i] = widen(narrow<T>(x[i] * factor * load(norm, at + i)));
      partner[i] = widen(narrow<T>(partner[i] * factor * load(norm, other[i])));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = x[i] * cos[i] + partner[i] * sin[i];
  raw.pack(x);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) write_kv_kernel(const Work work) {
  let_next_start();
  wait_for_last();
  const WriteKvParams& p = work.p;
  const int lane = threadIdx.x % work.width;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / work.width;
  // Lanes without work repeat that of others, and write nothing.
  const int64_t own = min(item, p.tokens * work.count - 1);
  const bool active = lane * 8 < p.dim;
  const int at = active ? lane * 8 : 0, head = work.first + static_cast<int>(own % work.count);
  const int64_t token = own / work.count;
  T* x = static_cast<T*>(p.qkv) + (token * (p.heads + 2 * p.kv_heads) + head) * p.dim;
  const bool query = head < p.heads, value = head >= p.heads + p.kv_heads;
  Raw<T> raw, before;
  before.read(x + at);
  raw = before;
  if (p.pairs || p.q_norm.data || p.k_norm.data) {
    turn(work, x, token, at, active, query ? p.q_norm : p.k_norm, raw);
  }
  __syncwarp();  // all lanes of a head have read it
  if (item != own || !active) return;
  if (query || !p.k) {
    if (at < 2 * p.pairs || p.q_norm.data || p.k_norm.data) raw.write(x + at);
    return;
  }
  const int slot = p.slots[token];
  if (slot < 0) return;
  const int kv = head - p.heads - (value ? p.kv_heads : 0);
  const int64_t to = (static_cast<int64_t>(slot) * p.kv_heads + kv) * p.dim + at;
  if (value) {
    before.write(static_cast<T*>(p.v) + to);
  } else {
    raw.write(static_cast<T*>(p.k) + to);
  }
}

template <typename T>
void launch_write(const Work& work, const Device& gpu, cudaStream_t stream) {
  const int64_t threads = work.p.tokens * work.count * work.width;
  const dim3 grid(static_cast<unsigned>((threads + THREADS - 1) / THREADS));
  launch(&write_kv_kernel<T>, work, grid, THREADS, 0, early(gpu), stream);
}

}  // namespace

void write_kv(const WriteKvParams& p, const Device& gpu, cudaStream_t stream) {
  Work work{p, 0, 0, 1};
  while (work.width * 8 < p.dim) work.width *= 2;
  const bool turned = p.pairs || p.q_norm.data || p.k_norm.data;
  work.first = turned ? 0 : p.heads;
  work.count = p.heads + p.kv_heads * (p.k ? 2 : turned ? 1 : 0) - work.first;
  if (!work.count) return;
  switch (p.type) {
    case Type::float16: return launch_write<__half>(work, gpu, stream);
    case Type::bfloat16: return launch_write<__nv_bfloat16>(work, gpu, stream);
    default: return launch_write<float>(work, gpu, stream);
  }
}

}  // namespace lmi
