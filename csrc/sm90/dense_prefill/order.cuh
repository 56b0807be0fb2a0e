// Which block a number stands for.
#pragma once

#include "plan.h"

namespace flashmla::sm90::dense_prefill {

// At the very end balance counts for more than L2: the last sets are one.
constexpr int kLastSets = 3;

struct Block {
  int sequence;
  int head;  // -1: there is no such block
  int rank;  // among the blocks of the sequence and head; rank 0 comes first
};

// How many heads' columns are worked on at a time: those that take `bytes`, and at least one.
struct HeadSets {
  int bytes_per_column;
  int64_t bytes;

  __device__ __forceinline__ int sharing(int columns, int heads) const {
    const int64_t wanted = bytes / (int64_t{max(1, columns)} * bytes_per_column);
    return static_cast<int>(max(int64_t{1}, min(wanted, int64_t{heads})));
  }
};

// region: block_order
// Block `number` of the call. Sequences come one after the other, the longest first. Within one,
// heads go in sets; within a set, all heads' blocks of rank 0 come first, then those of rank 1, and
// so on. Ranks go by work, so that what is left at the end is small. `group` heads read the same
// columns.
__device__ __forceinline__ Block find_block(const Sequences& sequences, const WorkPlan& plan,
                                            int64_t number, int heads, int group,
                                            const HeadSets& sets) {
  int low = 0, high = sequences.count();
  if (number >= int64_t{plan.blocks[high]} * heads) return {0, -1, 0};
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (int64_t{plan.blocks[middle]} * heads <= number ? low : high) = middle;
  }
  const int before = plan.blocks[low];
  const int blocks = plan.blocks[low + 1] - before;
  const int rest = static_cast<int>(number - int64_t{before} * heads);
  const int sequence = plan.order[low];

  const int sharing = sets.sharing(sequences.columns_of(sequence).length, heads);
  const int set = min(sharing * group, heads);
  const bool last = plan.blocks[low + 1] == plan.blocks[sequences.count()];
  // Heads that go in sets of the usual size; the others are the last set.
  const int in_sets = max(0, heads - (last ? kLastSets : 1) * set + set - 1) / set * set;
  const int first_head = min(rest / (blocks * set) * set, in_sets);
  const int in_set = rest - blocks * first_head;
  const int set_heads = first_head < in_sets ? set : heads - in_sets;
  return {sequence, first_head + in_set % set_heads, in_set / set_heads};
}
// endregion: block_order

}  // namespace flashmla::sm90::dense_prefill
