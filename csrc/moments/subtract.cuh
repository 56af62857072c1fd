// The residual v − (weight ∗ h + bias), one tile of positions and channels of v by one block. Free of torch.
#pragma once

#include <type_traits>

#include "table.cuh"
#include "tile.cuh"

namespace growkern {

struct Subtraction {
  Side h, v;
  Dtype h_dtype, v_dtype;
  bool aligned;         // rows of h start and end at a multiple of 16 bytes
  const float* weight;  // (taps · channels + 1, weight_pitch), the bias its last row
  float* out;
  int64_t weight_pitch, out_pitch, positions;
  int channels;                                       // of h, without those that fill its rows up
  int targets, rows, columns, map_rows, map_columns;  // of v, of h
  int taps, kernel_columns;
  int stride[2], padding[2], step[2];
};

// The same for many sites, as growkern/ops/moments/layout.py lays them out; pitches but that of the weight, in units
// that the call names, and that of the weight in fours.
struct Site {
  int64_t first_program, h, h_pitch, v, v_pitch, weight, weight_pitch, out, out_pitch;
  int64_t positions, area, columns, channels, targets, map_rows, map_columns;
  int64_t kernel_columns, stride[2], padding[2], step[2], taps;

  __device__ Subtraction subtraction(Dtype dtype, int unit) const {
    Subtraction task;
    const auto pitched = [&](int64_t address, int64_t pitch, int64_t count) {
      const int whole = static_cast<int>((count + unit - 1) / unit * unit);
      return Side{reinterpret_cast<const void*>(address), pitch * unit, whole};
    };
    task.h = pitched(h, h_pitch, channels), task.v = pitched(v, v_pitch, targets);
    task.h_dtype = task.v_dtype = dtype, task.aligned = unit > 1;
    task.weight = reinterpret_cast<const float*>(weight), task.weight_pitch = weight_pitch * 4;
    task.out = reinterpret_cast<float*>(out), task.out_pitch = out_pitch * unit, task.positions = positions;
    task.channels = static_cast<int>(channels), task.targets = static_cast<int>(targets);
    task.rows = static_cast<int>(area / columns), task.columns = static_cast<int>(columns);
    task.map_rows = static_cast<int>(map_rows), task.map_columns = static_cast<int>(map_columns);
    task.taps = static_cast<int>(taps), task.kernel_columns = static_cast<int>(kernel_columns);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      task.stride[i] = static_cast<int>(stride[i]), task.padding[i] = static_cast<int>(padding[i]);
      task.step[i] = static_cast<int>(step[i]);
    }
    return task;
  }
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
  const int across, size;  // tiles of targets; taps times channels, filled up
  const int64_t first_position;
  const int first_target;
  const int place = threadIdx.x % BLOCK, group = threadIdx.x / BLOCK;
  // Of the position that this thread reads.
  bool valid;
  int64_t image;
  int y, x;

  __device__ Subtract(const Subtraction& task_, int64_t block, unsigned char* memory)
      : task(task_), shared(*reinterpret_cast<Shared*>(memory)), across((task.targets + BLOCK - 1) / BLOCK),
        size(task.taps * task.h.channels), first_position(block / across * BLOCK),
        first_target(static_cast<int>(block % across) * BLOCK) {
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
        const int tap = k / task.h.channels, channel = k % task.h.channels;
        const bool live = k < size && channel < task.channels && target < task.targets;
        weights[i] = live ? task.weight[(int64_t(tap) * task.channels + channel) * task.weight_pitch + target] : 0.0f;
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
    const float* const bias = task.weight + int64_t(task.taps) * task.channels * task.weight_pitch;
    total.each([&](int m, int n, float value) {
      const int64_t position = first_position + m;
      const int target = first_target + n;
      if (position >= task.positions || target >= task.out_pitch) return;
      const bool live = target < task.targets;  // beyond them rows are filled up with zeros
      const uint32_t v = live ? bits_at(task.v.data, position * task.v.pitch + target, task.v_dtype) : 0;
      task.out[position * task.out_pitch + target] = from_bits(v, task.v_dtype) - (live ? bias[target] : 0) - value;
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
