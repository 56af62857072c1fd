// Splits added up in a fixed order, and results put together from the sums of products. Free of torch.
#pragma once

#include <cstdint>

namespace growkern {

constexpr int kAssembleThreads = 256;

// As growkern/ops/moments/schedule.py lays them out.
struct SplitSum {
  int64_t source, target, size, splits, chunk;
};

struct Region {
  int64_t first_program, result, corner, pitch, rows, u_taps, columns, v_taps, first_block, most_terms, result_size;
};

struct Term {
  int64_t slot, u_step, v_step;
};

// `elements` of a sum by one block.
__device__ inline void reduce_block(float* buffer, const SplitSum* sums, int elements) {
  const SplitSum sum = sums[blockIdx.x];
  const int64_t last = min(sum.size, (sum.chunk + 1) * elements);
  for (int64_t i = sum.chunk * elements + threadIdx.x; i < last; i += blockDim.x) {
    float total = 0;
#pragma unroll 8
    for (int64_t split = 0; split < sum.splits; ++split) total += buffer[sum.source + split * sum.size + i];
    buffer[sum.target + i] = total;
  }
}

struct Assembly {
  const float* slots;  // (draws, slots)
  int64_t slots_size;
  float* results[6];
  const int64_t* addresses;  // of results instead, if there are any
  const Region* regions;
  const int* starts;
  const Term* terms;
  const float* weights;
  int count;                    // of regions
  int tile_rows, tile_columns;  // by one block
};

// One tile of a region of a result, for draw blockIdx.y: every element is a weighted sum over the terms of its taps.
__device__ inline void assemble_block(const Assembly& task) {
  int number = 0;
  while (number + 1 < task.count && task.regions[number + 1].first_program <= blockIdx.x) ++number;
  const Region& region = task.regions[number];
  const int rows = region.rows, columns = region.columns, u_taps = region.u_taps, v_taps = region.v_taps;
  const int tile = static_cast<int>(blockIdx.x - region.first_program);
  const int across = (columns + task.tile_columns - 1) / task.tile_columns;
  const int first_row = tile / across * task.tile_rows, first_column = tile % across * task.tile_columns;
  const float* const slots = task.slots + int64_t(blockIdx.y) * task.slots_size;
  float* result = task.results[0];
  for (int i = 1; i < 6; ++i) result = region.result == i ? task.results[i] : result;
  if (task.addresses) result = reinterpret_cast<float*>(task.addresses[region.result]);
  result += int64_t(blockIdx.y) * region.result_size + region.corner;
  for (int element = threadIdx.x; element < task.tile_rows * task.tile_columns; element += blockDim.x) {
    const int i = first_row + element / task.tile_columns, j = first_column + element % task.tile_columns;
    if (i >= rows || j >= columns) continue;
    const int64_t block = region.first_block + i % u_taps * v_taps + j % v_taps;
    float total = 0;
    for (int number = task.starts[block]; number < task.starts[block + 1]; ++number) {
      const Term term = task.terms[number];
      total += task.weights[number] * slots[term.slot + i / u_taps * term.u_step + j / v_taps * term.v_step];
    }
    result[i * region.pitch + j] = total;
  }
}

}  // namespace growkern
