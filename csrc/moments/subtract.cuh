// The residual v − (weight ∗ h + bias), one tile of positions and channels of v by one block. Free of torch.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace growkern {

struct Subtraction {
  Side h, v;
  Dtype h_dtype, v_dtype;
  bool aligned;         // rows of h start and end at a multiple of 16 bytes
  const float* weight;  // (taps · channels of h, targets)
  const float* bias;    // (targets)
  float* out;
  int64_t out_pitch, positions;
  int targets, rows, columns, map_rows, map_columns;  // of v, of h
  int taps, kernel_columns;
  int stride[2], padding[2], step[2];
};

template <class Math, int BLOCK>
struct Subtract {
  using Grid = growkern::Grid<BLOCK>;
  static constexpr int depth = Math::depth, groups = Grid::threads / BLOCK;
  static constexpr int chunks = depth / 4 / groups, lines = depth / groups;

  struct Shared {
    float h[depth * Grid::ld], weight[depth * Grid::ld];
  };

  const Subtraction& task;
  Shared& shared;
  const int across, size;  // tiles of targets; rows of the weight
  const int64_t first_position;
  const int first_target;
  const int place = threadIdx.x % BLOCK, group = threadIdx.x / BLOCK;
  // Of the position that this thread reads.
  bool valid;
  int64_t image;
  int y, x;

  __device__ Subtract(const Subtraction& task_, unsigned char* memory)
      : task(task_), shared(*reinterpret_cast<Shared*>(memory)), across((task.targets + BLOCK - 1) / BLOCK),
        size(task.taps * task.h.channels), first_position(int64_t(blockIdx.x / across) * BLOCK),
        first_target(blockIdx.x % across * BLOCK) {
    const int64_t position = first_position + place, area = int64_t(task.rows) * task.columns;
    valid = position < task.positions;
    image = position / area;
    y = static_cast<int>(position % area / task.columns) * task.stride[0] - task.padding[0];
    x = static_cast<int>(position % area % task.columns) * task.stride[1] - task.padding[1];
  }

  // Number k of the patch is (tap, channel). Aligned, four of them belong to one tap.
  __device__ void read(Chunk<4>& chunk, int k, int count) const {
    if (!valid || k >= size) return;
    const int tap = k / task.h.channels, channel = k % task.h.channels;
    const int row = y + tap / task.kernel_columns * task.step[0], column = x + tap % task.kernel_columns * task.step[1];
    if (row < 0 || row >= task.map_rows || column < 0 || column >= task.map_columns) return;
    const int64_t element = ((image * task.map_rows + row) * task.map_columns + column) * task.h.pitch;
    if (task.aligned) chunk.read(task.h, element, channel, task.h_dtype, true);
    else chunk.words[count] = bits_at(task.h.data, element + channel, task.h_dtype);
  }

  __device__ void run() {
    Sums<BLOCK> total;
    for (int start = 0; start < size; start += depth) {
      Chunk<4> patch[chunks];
      float weights[lines];
#pragma unroll
      for (int i = 0; i < chunks; ++i) {
        const int k = start + (group + i * groups) * 4;
        if (task.aligned) read(patch[i], k, 0);
        else
          for (int j = 0; j < 4; ++j) read(patch[i], k + j, j);
      }
#pragma unroll
      for (int i = 0; i < lines; ++i) {
        const int k = start + group + i * groups, target = first_target + place;
        weights[i] = k < size && target < task.targets ? task.weight[int64_t(k) * task.targets + target] : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < chunks; ++i)
        for (int j = 0; j < 4; ++j)
          shared.h[((group + i * groups) * 4 + j) * Grid::ld + place] = patch[i].value(j, task.h_dtype, task.aligned);
#pragma unroll
      for (int i = 0; i < lines; ++i) shared.weight[(group + i * groups) * Grid::ld + place] = weights[i];
      __syncthreads();
      Sums<BLOCK> part;
      Math::template multiply<BLOCK>(shared.h, shared.weight, part);
      total += part;
    }
    total.each([&](int m, int n, float value) {
      const int64_t position = first_position + m;
      const int target = first_target + n;
      if (position >= task.positions || target >= task.targets) return;
      const float v = from_bits(bits_at(task.v.data, position * task.v.pitch + target, task.v_dtype), task.v_dtype);
      task.out[position * task.out_pitch + target] = v - task.bias[target] - value;
    });
  }
};

// Calls run(way to multiply, tile size).
template <class Run>
void choose_subtract(int64_t block, bool tf32, const Run& run) {
  const auto sized = [&](auto math) {
    if (block == 32) run(math, std::integral_constant<int, 32>{});
    else run(math, std::integral_constant<int, 64>{});
  };
  if (block == 16) run(Fma{}, std::integral_constant<int, 16>{});
  else if (tf32) sized(Tf32<false>{});
  else sized(Tf32<true>{});
}

// Blocks for all tiles.
inline int64_t subtract_blocks(const Subtraction& task, int64_t block) {
  return (task.positions + block - 1) / block * ((task.targets + block - 1) / block);
}

}  // namespace growkern
