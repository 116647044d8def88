// A whole stack of layers as one kernel: its phases are recorded once, and run by every replay.
#pragma once

#include "attention.h"
#include "inbox.h"
#include "linear.h"
#include "norm.h"

namespace lmi {

constexpr int PHASE_BYTES = 256;
constexpr int MOST_STAGED_ROWS = 8;  // of x in shared memory; more are in registers
constexpr int MOST_STEP_ROWS = 16;
constexpr int STEP_WARPS = 16, STEP_THREADS = STEP_WARPS * 32;  // of a block, one a processor
constexpr int HELD_FEATURES = 4096;  // of x that a block's registers have
constexpr int STEP_HEADS = 1;  // of a chunk: registers are too few for more

enum class Work : int { linear, attention, norm, sum };

// out = residual + (the sum of what all ranks' product before it has found + bias): see sum.cuh.
struct SumParams {
  Operand residual, bias;  // [rows, features]; [features], or none
  void* out;
  Type out_type;
  int features, words;  // rows * features
};

// A product, and the sum that it takes itself, if any, as its x: see take.cuh.
struct ProductParams : LinearParams {
  SumParams added;
};

// One operation.
struct alignas(16) Phase {
  Work work;
  bool barrier;  // everything before it must be done
  bool staged;   // a product's x is in shared memory as the product before has had it
  short hand;    // which of the program's hand-overs, from 1, attention and the product behind it do; or 0
  int sum;       // which of the program's sums, from 1, this is, or this product's results go to; or 0
  short taken;   // which of them a product takes itself, as its x; or 0
  union {
    ProductParams linear;
    AttentionParams attention;
    NormParams norm;
    SumParams sum_params;
    char bytes[PHASE_BYTES - 16];
  };

  Phase()
      : work(Work::norm), barrier(false), staged(false), hand(0), sum(0), taken(0), bytes{} {}
};
static_assert(sizeof(Phase) == PHASE_BYTES);

// What is the same for all phases.
struct Program {
  Type type;         // of activations
  Type weight_type;  // of every product's weights
  int rows;
  int phases;
  int products;
  int sums;
  int words;         // of each sum: rows * features
  int hands;         // of attention's results: see hand.cuh
  int handed;        // words of each, at most
  int slots;         // of all warps' rings together
  int products_at;   // where the list of products lies in shared memory, in bytes
  int shared_bytes;
};

// Who takes part in a step's sums.
struct StepPeers {
  int rank, ranks;              // 0 ranks: nothing is exchanged, and nobody waited for
  unsigned long long patience;  // nanoseconds to wait for a peer
  int* failed;                  // in host memory: what `broken` says
  StepInbox* own;
  StepInbox* inboxes[MOST_PEERS];  // of every rank, as this GPU sees them
};

struct StepParams {
  const Phase* phases;
  const Weights* weights;  // [products], of those phases that are products
  int count, products, slots;
  int products_at;  // see Program
  unsigned* barrier;  // see GridBarrier
  int sums, words;    // 0 sums: there are no peers
  int hands, handed;
  long long barrier_patience;  // in cycles, if there are
  StepPeers peers;
};

// Share the work of a product among the blocks of a step. False if it cannot be one's.
bool plan_linear(LinearParams& p, Type type, const Device& gpu, int64_t work_floats,
                 int64_t counters);

// Make what was recorded runnable by so many ranks, and list its products' weights, of which there may
// be as many as phases; of these fewer may be left. False if it is not runnable: no product, types that
// differ, too large.
bool plan_program(Program& program, Phase* phases, Weights* weights, int ranks, const Device& gpu);

void step_float32(const Program& program, const StepParams& p, const Device& gpu,
                  cudaStream_t stream);
void step_float16(const Program& program, const StepParams& p, const Device& gpu,
                  cudaStream_t stream);
void step_bfloat16(const Program& program, const StepParams& p, const Device& gpu,
                   cudaStream_t stream);

}  // namespace lmi
