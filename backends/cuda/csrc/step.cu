// How a step's work is shared among blocks, decided once when it is recorded.
#include "step.h"

#include "attention.cuh"
#include "multiply.cuh"

namespace lmi {
namespace {

// Bytes of shared memory for what is static: 896 at most now, and 2,944 where x is in registers.
constexpr int STAGED_MARGIN = 1024, HELD_MARGIN = 3072;
constexpr int LISTED = 12 << 10;  // bytes that the list of products may take beside x
// Bytes of all ranks' words up to which every block takes them itself: 132 blocks read so much of L2 in 1.6
// microseconds, half of it while the peers' is awaited, and what that spares takes two.
constexpr int MOST_TAKEN = 64 << 10;

int item_bytes(Type type) { return type == Type::float32 ? 4 : 2; }

// Of so many rows' partial sums.
int partial_bytes(int rows) {
  return 2 * 4 * (rows > MOST_STAGED_ROWS ? PARTIALS<2, STEP_WARPS> : PARTIALS<1, STEP_WARPS>);
}

// A split's features.
int x_bytes(const Weights& w, int rows, Type type) {
  const int features = (std::min(w.slice, w.inputs) + PAD - 1) / PAD * PAD;
  return rows * (features * item_bytes(type) + 64);
}

// A third of shared memory, and what the shortest rings leave; the rest makes rings longer.
int x_room(const Device& gpu) {
  const int rings = FEW_SLOTS * STEP_WARPS * SLOT_BYTES;
  const int left = gpu.shared_per_block - STAGED_MARGIN - LISTED - partial_bytes(1) - rings;
  return std::min(left, static_cast<int>(gpu.shared_per_block * 0.36));
}

bool uses_work(const Phase& phase) {
  return (phase.work == Work::linear && phase.linear.weights.splits > 1) ||
         (phase.work == Work::attention && phase.attention.splits > 1);
}

bool is_of(const Operand& operand, Type type) { return !operand.data || operand.type == type; }

bool fits(const Program& program, const Phase& phase) {
  switch (phase.work) {
    case Work::linear: {
      const ProductParams& p = phase.linear;
      return p.x.type == program.type && p.weight_type == program.weight_type &&
             (p.scale || p.weight_type == program.type) && p.rows == program.rows &&
             is_of(p.norm_weight, program.type) && is_of(p.bias, program.type) &&
             is_of(p.residual, program.type) && p.out_type == program.type &&
             (!phase.taken || p.added.words == program.words);
    }
    case Work::norm:
      return phase.norm.x.type == program.type && phase.norm.weight.type == program.type;
    case Work::sum: return phase.sum_params.words == program.words;
    default: return phase.attention.rows == program.rows;
  }
}

// Whether all blocks have x in shared memory as a product wants it, since `last` put it there. No phase
// writes where another one has: the same x by the same norm is what it was.
bool is_staged(const LinearParams* last, const LinearParams& p, const Device& gpu) {
  if (!last || p.rows > MOST_STAGED_ROWS) return false;
  const Weights &had = last->weights, &w = p.weights;
  const int places = gpu.processors / w.splits;
  return last->x.data == p.x.data && last->norm_weight.data == p.norm_weight.data &&
         last->norm_bias.data == p.norm_bias.data && last->eps == p.eps &&
         had.slice == w.slice && had.splits == w.splits &&
         std::min(had.tiles, places) >= std::min(w.tiles, places);
}

bool reads(const Phase& phase, const void* what) {
  const ProductParams& p = phase.linear;
  switch (phase.work) {
    case Work::linear:
      return p.x.data == what || p.residual.data == what ||
             (phase.taken && p.added.residual.data == what);
    case Work::norm: return phase.norm.x.data == what;
    case Work::sum: return phase.sum_params.residual.data == what;
    default: return phase.attention.q == what;  // its keys and values are in the same tensor
  }
}

// Whether no other phase reads what `phase` does.
bool only_reader(const Program& program, const Phase* phases, const Phase& phase, const void* what) {
  return std::none_of(phases, phases + program.phases, [&](const Phase& other) {
    return &other != &phase && reads(other, what);
  });
}

// Whether nothing but the product behind attention reads what that writes, and it can be handed over.
bool can_hand(const Program& program, const Phase* phases, int at) {
  const Phase &phase = phases[at], &product = phases[at + 1];
  if (!phase.barrier || product.work != Work::linear) return false;
  const void* out = phase.attention.out;
  const LinearParams& p = product.linear;
  if (p.x.data != out || p.norm_weight.data || p.residual.data == out || p.weights.splits > 1 ||
      p.weights.inputs % 4 || p.rows * p.weights.inputs > MOST_HANDED) {
    return false;
  }
  return only_reader(program, phases, product, out);
}

// Let attention hand its results over where there are peers. Not the last one: words are taken away
// behind a barrier that follows.
void hand_over(Program& program, Phase* phases) {
  const auto sums = [](const Phase& phase) { return phase.work == Work::sum; };
  if (program.type == Type::float32 || std::none_of(phases, phases + program.phases, sums)) return;
  int last = program.phases - 1;
  while (last > 0 && !(phases[last].work == Work::attention && phases[last].barrier)) --last;
  for (int i = 0; i < last; ++i) {
    if (phases[i].work != Work::attention || !can_hand(program, phases, i)) continue;
    const LinearParams& p = phases[i + 1].linear;
    phases[i].hand = phases[i + 1].hand = static_cast<short>(++program.hands);
    phases[i + 1].barrier = false;
    program.handed = std::max(program.handed, p.rows * p.weights.inputs);
  }
}

// Whether a product waits for nothing but its residual, and the very threads that read that have written
// it in the phase before, in front of which all else was waited for: both share their tiles among blocks alike.
bool reads_own(const Program& program, const Phase* phases, int at) {
  const Phase &before = phases[at - 1], &phase = phases[at];
  if (before.work != Work::linear || phase.work != Work::linear) return false;
  const LinearParams &had = before.linear, &p = phase.linear;
  const Weights &a = had.weights, &b = p.weights;
  return (before.barrier || before.hand) && !before.sum && p.residual.data == had.out && p.x.data != had.out &&
         a.splits == 1 && b.splits == 1 && a.outputs == b.outputs && !a.gated && !b.gated &&
         only_reader(program, phases, phase, had.out);  // others rely on the barrier
}

// Whether the blocks of a product can take the sum in front of it themselves.
bool can_take(const Program& program, const Phase& sum, const Phase& product, int ranks) {
  if (sum.work != Work::sum || product.work != Work::linear) return false;
  if (program.type == Type::float32) return false;
  const SumParams& s = sum.sum_params;
  const LinearParams& p = product.linear;
  return p.x.data == s.out && p.norm_weight.data && !p.residual.data && !product.sum &&
         p.weights.splits == 1 && s.out_type == program.type &&
         s.residual.type == program.type && (!s.bias.data || s.bias.type == program.type) &&
         s.features % 8 == 0 && s.words * ranks <= MOST_TAKEN / 4;
}

// Make one phase of each sum that a product can take and this product; no barrier is between them.
void join_sums(Program& program, Phase* phases, int ranks) {
  int count = 0;
  for (int i = 0; i < program.phases; ++i) {
    Phase phase = phases[i];
    if (phase.work == Work::sum && phase.barrier) {  // of the product before, which does not write
      phases[count - 1].barrier = true;              // what the sum reads
      phase.barrier = false;
    }
    if (count && can_take(program, phases[count - 1], phase, ranks)) {
      phase.linear.added = phases[--count].sum_params;
      phase.taken = 1;  // that it takes one: they are numbered later
      phase.barrier = false;
    }
    phases[count++] = phase;
  }
  program.phases = count;
}

// What a phase wants of shared memory beside the rings.
int beside_rings(const Program& program, const Phase& phase) {
  if (phase.work == Work::linear) {
    if (program.rows > MOST_STAGED_ROWS) return partial_bytes(program.rows);
    return partial_bytes(program.rows) + x_bytes(phase.linear.weights, program.rows, program.type);
  }
  if (phase.work != Work::attention) return 0;
  AttentionParams p = phase.attention;
  const int warps = least_team(p.dim);
  return STEP_WARPS / warps * shared_floats(arrange(p, STEP_HEADS), warps, p.dim) * 4;  // at most
}

}  // namespace

bool plan_linear(LinearParams& p, Type type, const Device& gpu, int64_t work_floats,
                 int64_t counters) {
  Weights& w = p.weights;
  if (p.rows > MOST_STAGED_ROWS) {
    split(w, (w.inputs + HELD_FEATURES - 1) / HELD_FEATURES);
    if (type == Type::float32) return false;
    // A norm is of whole rows, and x times its weights is in range; a LayerNorm's biases are in `norm_terms`.
    const bool behind = type == Type::bfloat16 && !p.norm_bias.data && w.splits == 1;
    if (p.norm_weight.data && !behind) return false;
  } else {
    for (int splits = 1;; ++splits) {
      split(w, splits);
      if (x_bytes(w, p.rows, type) <= x_room(gpu)) break;
      if (w.slice == PAD) return false;
    }
  }
  const int64_t left = static_cast<int64_t>(w.tiles) * w.splits * TILE * ((p.rows + 7) / 8 * 8);
  return w.splits <= gpu.processors && w.tiles <= counters && (w.splits == 1 || left <= work_floats);
}

bool plan_program(Program& program, Phase* phases, Weights* weights, int ranks, const Device& gpu) {
  if (gpu.major < 9) return false;
  int beside = 0;
  bool dirty = false, summed = false, taken = false, waits = false;
  const LinearParams* staged = nullptr;  // whose x is in shared memory
  phases[0].barrier = false;
  hand_over(program, phases);
  join_sums(program, phases, ranks);
  for (int i = 0; i < program.phases; ++i) {
    Phase& phase = phases[i];
    const bool adds = phase.work == Work::sum || phase.taken;
    if (adds && !program.words) {
      program.words = (phase.taken ? phase.linear.added : phase.sum_params).words;
    }
    if (!fits(program, phase)) return false;
    beside = std::max(beside, beside_rings(program, phase));
    if (phase.work == Work::attention) staged = nullptr;  // its queries are there
    if (phase.work == Work::linear) {
      phase.staged = !phase.taken && is_staged(staged, phase.linear, gpu);
      if (!phase.staged) staged = &phase.linear;
      weights[program.products++] = phase.linear.weights;
    }
    if (i > 0 && reads_own(program, phases, i)) phase.barrier = false;
    // Two phases at once may not leave their sums in the same place.
    if (uses_work(phase) && dirty) phase.barrier = true;
    // Nor may words of a sum be sent before all blocks have those of the last one.
    if (phase.work == Work::linear && phase.sum && summed) phase.barrier = true;
    // Whoever takes a sum waits at no barrier: what comes next does, if it reads what others wrote.
    if (taken && !(phase.staged && !phase.linear.residual.data)) phase.barrier = true;
    dirty = uses_work(phase) || (dirty && !phase.barrier);
    summed = adds || (summed && !phase.barrier);
    taken = phase.taken || (taken && !phase.barrier);
    waits = waits || phase.barrier;
    if (phase.work == Work::linear && phase.sum) phase.sum = program.sums + 1;
    if (phase.work == Work::sum) phase.sum = ++program.sums;
    if (phase.taken) phase.taken = static_cast<short>(++program.sums);
  }
  const int list = program.products * static_cast<int>(sizeof(Weights));
  const int margin = program.rows > MOST_STAGED_ROWS ? HELD_MARGIN : STAGED_MARGIN;
  const int room = gpu.shared_per_block - margin - beside - list;
  program.slots = ring_slots(room / SLOT_BYTES, STEP_WARPS);
  program.products_at = program.slots * SLOT_BYTES + beside;
  program.shared_bytes = program.products_at + list;
  return program.products > 0 && program.slots > 0 && (waits || !program.sums);
}

}  // namespace lmi
