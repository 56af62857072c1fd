// Maps copied to rows of channels, many maps in one launch. Free of torch.
#pragma once

#include <cstdint>

#include "table.cuh"

namespace growkern {

constexpr int kPackThreads = 256;
constexpr int kPackPixels = 64, kPackChannels = 16;  // tile of a block

// As growkern/ops/moments/layout.py lays it out; zeros fill channels up to the pitch.
struct Copy {
  int64_t first_program, source, target, pixels, channels, pitch, area, width;
  int64_t image_step, channel_step, row_step, column_step;
};

// Reads along pixels, writes along channels. From, To: of an element, or words of its size.
template <class From, class To>
__device__ void pack_block(const Copy* copies, int count, To* shared) {
  constexpr int ld = kPackChannels + 1;
  const Copy copy = row_of(copies, count);
  const int64_t tile = blockIdx.x - copy.first_program, across = (copy.pitch + kPackChannels - 1) / kPackChannels;
  const int64_t first_pixel = tile / across * kPackPixels, first_channel = tile % across * kPackChannels;
  const From* const source = reinterpret_cast<const From*>(copy.source);
  To* const target = reinterpret_cast<To*>(copy.target);
  const int column = threadIdx.x % kPackPixels;
  const int64_t pixel = first_pixel + column, rest = pixel % copy.area;
  const int64_t place = pixel / copy.area * copy.image_step + rest / copy.width * copy.row_step +
                        rest % copy.width * copy.column_step;
  for (int i = threadIdx.x / kPackPixels; i < kPackChannels; i += kPackThreads / kPackPixels) {
    const int64_t channel = first_channel + i;
    const bool inside = pixel < copy.pixels && channel < copy.channels;
    shared[column * ld + i] = inside ? static_cast<To>(source[place + channel * copy.channel_step]) : To(0);
  }
  __syncthreads();
  const int64_t channel = first_channel + threadIdx.x % kPackChannels;
  for (int i = threadIdx.x / kPackChannels; i < kPackPixels; i += kPackThreads / kPackChannels)
    if (first_pixel + i < copy.pixels && channel < copy.pitch)
      target[(first_pixel + i) * copy.pitch + channel] = shared[i * ld + threadIdx.x % kPackChannels];
}

}  // namespace growkern
