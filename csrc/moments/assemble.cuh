// Splits added up in a fixed order, as they are or under signs, and results put together from the sums of products.
// Free of torch.
#pragma once

#include <cstdint>

#include "table.cuh"
#include "tile.cuh"

namespace growkern {

constexpr int kAssembleThreads = 256;
constexpr int kCombineElements = 128, kCombineDraws = 32;  // of a block

// As growkern/ops/moments/schedule.py lays them out.
struct SplitSum {
  int64_t source, target, size, splits, chunk, site;
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

struct Combination {
  float* buffer;
  const SplitSum* sums;
  const float* signs;  // (draws − 1, pitch); draw 0 is of ones
  int64_t pitch, samples;
  const Signs* drawn;  // instead, one for each site, if there are any
  int draws;
  int64_t slots;  // from the sums of one draw to those of the next
  bool add;       // to what is there
};

constexpr int kCombineSplits = 32, kCombineLd = kCombineDraws + 4;  // held in shared memory at once
constexpr int kCombineShared = kCombineSplits * kCombineLd * int(sizeof(float));

// One chunk of a product by one block: every thread has one element and half of the draws.
__device__ inline void combine_block(const Combination& task, float* shared) {
  constexpr int mine = kCombineDraws / (kAssembleThreads / kCombineElements);
  const SplitSum sum = task.sums[blockIdx.x];
  const float* signs = task.signs;
  int64_t pitch = task.pitch, samples = task.samples;
  if (task.drawn) {
    const Signs& of_site = task.drawn[sum.site];
    signs = reinterpret_cast<const float*>(of_site.address), pitch = of_site.pitch, samples = of_site.count;
  }
  const int first_draw = blockIdx.y * kCombineDraws, half = threadIdx.x / kCombineElements * mine;
  const int64_t element = sum.chunk * kCombineElements + threadIdx.x % kCombineElements;
  float total[mine] = {};
  for (int64_t start = 0; start < samples; start += kCombineSplits) {
    __syncthreads();
    for (int i = threadIdx.x; i < kCombineSplits * kCombineDraws; i += kAssembleThreads) {
      const int draw = first_draw + i / kCombineSplits;
      const int64_t split = start + i % kCombineSplits;
      const bool drawn = draw > 0 && draw < task.draws && split < samples;
      shared[i % kCombineSplits * kCombineLd + i / kCombineSplits] = drawn ? signs[(draw - 1) * pitch + split] : 1.0f;
    }
    __syncthreads();
    float part[mine] = {};
    for (int split = 0; split < kCombineSplits; ++split) {
      const bool live = start + split < samples && element < sum.size;
      const float value = live ? task.buffer[sum.source + (start + split) * sum.size + element] : 0;
#pragma unroll
      for (int i = 0; i < mine; ++i) part[i] += shared[split * kCombineLd + half + i] * value;
    }
#pragma unroll
    for (int i = 0; i < mine; ++i) total[i] += part[i];
  }
  if (element >= sum.size) return;
#pragma unroll
  for (int i = 0; i < mine; ++i) {
    const int64_t draw = first_draw + half + i, target = sum.target + draw * task.slots + element;
    if (draw < task.draws) task.buffer[target] = total[i] + (task.add ? task.buffer[target] : 0);
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
  const Region& region = row_of(task.regions, task.count);
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
