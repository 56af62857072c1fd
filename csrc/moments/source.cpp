#include "source.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace growkern {

template <class T>
Buffer<T> allocate(int64_t elements) {
  const size_t bytes = (static_cast<size_t>(elements) * sizeof(T) / 64 + 1) * 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}
template Buffer<float> allocate<float>(int64_t);
template Buffer<double> allocate<double>(int64_t);

template <class T>
void Source<T>::lay_out() {
  // Few channels: a panel row then holds two or four positions, so that no lane is idle.
  const int64_t lanes = kLanes<T>;
  width = channels <= lanes / 4 ? lanes / 4 : channels <= lanes / 2 ? lanes / 2 : lanes;
  channel_blocks = (channels + width - 1) / width;
  blocks = channel_blocks * (copied ? 1 + draws : 1);
}

template <class T>
void Source<T>::reserve(int64_t images, int64_t reach) {
  const int64_t before = (reach * width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t after = reach * width + 2 * kLanes<T>;
  block_elements = before + images * image_elements() + after;
  // Blocks at distances of a power of two would share cache sets.
  block_elements = (block_elements + kLanes<T> - 1) / kLanes<T> * kLanes<T> + 5 * kLanes<T>;
  memory = allocate<T>(blocks * block_elements);
  panels = memory.get() + before;
  parallel(blocks, [&](int64_t block) {
    std::memset(memory.get() + block * block_elements, 0, block_elements * sizeof(T));
  });
  if (summed) sums.assign((1 + draws) * channel_blocks * size[0] * size[1] * width, 0.0);
}

namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

const void* at(const Map& map, int64_t image, int64_t channel, int64_t row, int64_t column) {
  const int64_t element =
      image * map.stride[0] + channel * map.stride[1] + row * map.stride[2] + column * map.stride[3];
  return static_cast<const char*>(map.data) + element * bytes_of(map.dtype);
}

// One row of sample positions of all features of a block.
template <class T>
void pack_patches(const Source<T>& source, int64_t block, int64_t image, int64_t row, T* out) {
  const Map& map = source.map;
  const Window& window = source.window;
  for (int64_t lane = 0; lane < source.channels_of(block); ++lane) {
    const int64_t feature = block * source.width + lane, taps = window.count();
    const int64_t channel = feature / taps, tap = feature % taps;
    const int64_t tap_column = tap % window.taps[1];
    const int64_t y = window.position(0, row, tap / window.taps[1]);
    int64_t first = 0, last = 0;  // the sample columns that read inside the map
    if (y >= 0 && y < map.size[0]) {
      last = source.size[1];
      while (first < last && window.position(1, first, tap_column) < 0 && window.divisor[1] == 1) ++first;
      while (last > first && window.position(1, last - 1, tap_column) >= map.size[1]) --last;
    }
    for (int64_t column = 0; column < first; ++column) out[column * source.width + lane] = 0;
    for (int64_t column = last; column < source.size[1]; ++column) out[column * source.width + lane] = 0;
    if (first == last) continue;
    if (window.divisor[1] == 1) {
      const int64_t x = window.position(1, first, tap_column);
      const Row inside{at(map, image, channel, y, x), map.dtype, 0, map.stride[3] * window.stride[1], 1, last - first};
      kernels<T>().pack(inside, out + first * source.width + lane, source.width);
    } else {
      for (int64_t column = first; column < last; ++column) {
        T& value = out[column * source.width + lane];
        const int64_t x = window.position(1, column, tap_column);
        if (x < 0 || x >= map.size[1]) value = 0;
        else kernels<T>().pack({at(map, image, channel, y, x), map.dtype, 0, 1, 1, 1}, &value, 1);
      }
    }
  }
  if (source.weights[0].empty()) return;
  for (int64_t column = 0; column < source.size[1]; ++column) {
    const T weight = static_cast<T>(source.weights[0][row] * source.weights[1][column]);
    for (int64_t lane = 0; lane < source.width; ++lane) out[column * source.width + lane] *= weight;
  }
}

}  // namespace

template <class T>
void Source<T>::pack(int64_t first, int64_t count) {
  // The rows of a matrix, images of one position, are packed many at a time.
  const bool rows = !patches && size == Pair{1, 1} && pitch == Pair{1, 1};
  const int64_t step = rows ? 256 : 1, groups = (count + step - 1) / step;
  parallel(blocks * groups, [&](int64_t task) {
    const int64_t block = task / groups, start = task % groups * step;
    T* out = panels + block * block_elements + start * image_elements();
    const int64_t channel = block % channel_blocks * width, draw = block / channel_blocks;
    if (rows) {
      const int64_t length = std::min(step, count - start);
      kernels<T>().pack({at(map, first + start, channel, 0, 0), map.dtype, map.stride[1], map.stride[0],
                         channels_of(block), length},
                        out, width);
      if (draw == 0) return;
      const T* sign = signs + (draw - 1) * map.images + first + start;
      for (int64_t i = 0; i < length; ++i)
        for (int64_t lane = 0; lane < width; ++lane) out[i * width + lane] *= sign[i];
      return;
    }
    for (int64_t y = 0; y < size[0]; ++y, out += pitch[1] * width) {
      if (patches) {
        pack_patches(*this, block, first + start, y, out);
      } else {
        kernels<T>().pack({at(map, first + start, channel, y, 0), map.dtype, map.stride[1], map.stride[3],
                           channels_of(block), size[1]},
                          out, width);
      }
    }
  });
}

template <class T>
void Source<T>::add_sums(int64_t first, int64_t count) {
  const int64_t rows = channel_blocks * size[0], elements = size[1] * width;
  parallel(rows * (1 + draws), [&](int64_t task) {
    const int64_t draw = task / rows, block = task % rows / size[0], row = task % size[0];
    double* sum = sums.data() + task * elements;
    const T* in = panels + block * block_elements + row * pitch[1] * width;
    for (int64_t image = 0; image < count; ++image, in += image_elements()) {
      const T sign = draw == 0 ? T{1} : signs[(draw - 1) * map.images + first + image];
      for (int64_t i = 0; i < elements; ++i) sum[i] += sign * in[i];
    }
  });
}

template struct Source<float>;
template struct Source<double>;

}  // namespace growkern
