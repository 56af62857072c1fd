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

namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

const void* at(const Map& map, int64_t image, int64_t channel, int64_t row, int64_t column) {
  const int64_t element =
      image * map.stride[0] + channel * map.stride[1] + row * map.stride[2] + column * map.stride[3];
  return static_cast<const char*>(map.data) + element * bytes_of(map.dtype);
}

}  // namespace

Map Map::every(const Pair& apart, const Pair& first) const {
  Map part = *this;
  part.data = at(*this, 0, 0, first[0], first[1]);
  for (int axis : {0, 1}) {
    part.size[axis] = std::max<int64_t>(0, (size[axis] - first[axis] + apart[axis] - 1) / apart[axis]);
    part.stride[2 + axis] *= apart[axis];
  }
  return part;
}

template <class T>
void Source<T>::lay_out() {
  // Few channels: a panel row then holds two or four positions, so that no lane is idle.
  const int64_t lanes = kLanes<T>;
  width = channels <= lanes / 4 ? lanes / 4 : channels <= lanes / 2 ? lanes / 2 : lanes;
  channel_blocks = (channels + width - 1) / width;
  blocks = channel_blocks * (copied ? 1 + draws : 1);
}

template <class T>
bool Source<T>::in_place() const {
  const Dtype own = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
  return is_matrix() && !copied && order == nullptr && map.dtype == own && map.stride[1] == 1 && channels > 0 &&
         channels % kLanes<T> == 0 && map.stride[0] <= 4 * kLanes<T>;
}

template <class T>
Panels<T> Source<T>::reserve(int64_t images, int64_t reach) const {
  Panels<T> panels;
  const Pair apart = summed_size();
  if (summed) panels.sums.assign((1 + draws) * channel_blocks * apart[0] * apart[1] * width, 0.0);
  if (in_place()) {
    panels.block_elements = width;
    return panels;
  }
  const int64_t lanes = kLanes<T>, before = (reach * width + lanes - 1) / lanes * lanes;
  const int64_t elements = before + images * image_elements() + reach * width + 2 * lanes;
  // Blocks at distances of a power of two would share cache sets.
  panels.block_elements = (elements + lanes - 1) / lanes * lanes + 5 * lanes;
  panels.memory = allocate<T>(blocks * panels.block_elements);
  panels.first = panels.memory.get() + before;
  std::memset(panels.memory.get(), 0, blocks * panels.block_elements * sizeof(T));
  return panels;
}

namespace {

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
    // The sample columns that read inside the map: every `apart`-th from `first` on.
    const int64_t apart = window.divisor[1], step = window.stride[1];
    int64_t first = 0, count = 0, x = -1;
    if (y >= 0 && y < map.size[0]) {
      while (first < source.size[1] && (x = window.position(1, first, tap_column)) < 0) ++first;
      if (first < source.size[1] && x < map.size[1])
        count = std::min((source.size[1] - first + apart - 1) / apart, (map.size[1] - x + step - 1) / step);
    }
    T* target = out + lane;
    if (apart > 1 || count < source.size[1])
      for (int64_t column = 0; column < source.size[1]; ++column) target[column * source.width] = 0;
    if (count == 0) continue;
    kernels<T>().pack({at(map, image, channel, y, x), map.dtype, 0, map.stride[3] * step, 1, count},
                      target + first * source.width, source.width * apart);
  }
  if (source.weights[0].empty()) return;
  for (int64_t column = 0; column < source.size[1]; ++column) {
    const T weight = static_cast<T>(source.weights[0][row] * source.weights[1][column]);
    for (int64_t lane = 0; lane < source.width; ++lane) out[column * source.width + lane] *= weight;
  }
}

}  // namespace

// The rows of a matrix, images of one position, are packed many at a time.
constexpr int64_t kRows = 256;

template <class T>
int64_t Source<T>::pack_tasks(int64_t count) const {
  if (in_place()) return 1;
  return blocks * (is_matrix() ? (count + kRows - 1) / kRows : count);
}

template <class T>
void Source<T>::pack(Panels<T>& panels, int64_t first, int64_t count, int64_t task) const {
  if (in_place()) {
    panels.first = static_cast<T*>(const_cast<void*>(at(map, first, 0, 0, 0)));  // only read from
    return;
  }
  const int64_t block = task % blocks, channel = block % channel_blocks * width, draw = block / channel_blocks;
  const int64_t start = task / blocks * (is_matrix() ? kRows : 1), number = image(first + start);
  T* out = panels.first + block * panels.block_elements + start * image_elements();
  if (is_matrix()) {
    const int64_t length = std::min(kRows, count - start);
    for (int64_t i = 0, next; i < length; i = next) {
      const int64_t row = image(first + start + i);
      for (next = i + 1; next < length && image(first + start + next) == row + next - i;) ++next;
      kernels<T>().pack({at(map, row, channel, 0, 0), map.dtype, map.stride[1], map.stride[0], channels_of(block),
                         next - i},
                        out + i * width, width);
    }
    for (int64_t i = 0; draw > 0 && i < length; ++i)
      for (int64_t lane = 0; lane < width; ++lane) out[i * width + lane] *= sign(draw, first + start + i);
    return;
  }
  for (int64_t y = 0; y < (patches ? size : map.size)[0]; ++y, out += apart[0] * pitch[1] * width) {
    if (patches) {
      pack_patches(*this, block, number, y, out);
    } else {
      kernels<T>().pack({at(map, number, channel, y, 0), map.dtype, map.stride[1], map.stride[3],
                         channels_of(block), map.size[1]},
                        out, apart[1] * width);
    }
  }
}

template <class T>
void Source<T>::add_sums(Panels<T>& panels, int64_t first, int64_t count, int64_t task) const {
  if (lumped) return add_lumped(panels, first, count, task);
  const int64_t rows = channel_blocks * size[0], elements = size[1] * width;
  const int64_t draw = task / rows, block = task % rows / size[0], row = task % size[0];
  double* sum = panels.sums.data() + task * elements;
  const T* in = panels.first + block * panels.block_elements + row * pitch[1] * width;
  for (int64_t image = 0; image < count; ++image, in += image_elements()) {
    const T own = sign(draw, first + image);
    for (int64_t i = 0; i < elements; ++i) sum[i] += own * in[i];
  }
}

// The positions of all images of like signs in a row are added up before the signs apply: a few in single precision,
// then in double.
template <class T>
void Source<T>::add_lumped(Panels<T>& panels, int64_t first, int64_t count, int64_t block) const {
  constexpr int64_t few = 16;
  T part[kLanes<T>] = {};
  double total[kLanes<T>] = {};
  int64_t waiting = 0;
  const auto flush = [&] {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) total[lane] += part[lane];
    std::fill(part, part + kLanes<T>, T{0});
    waiting = 0;
  };
  const int64_t elements = image_elements();
  const T* in = panels.first + block * panels.block_elements;
  for (int64_t image = 0; image < count; ++image, in += elements) {
    for (int64_t y = 0; y < size[0]; ++y) {
      for (int64_t x = 0; x < size[1]; ++x) {
        const T* values = in + (y * pitch[1] + x) * width;
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) part[lane] += values[lane];  // the last ones may be of no use
        if (++waiting == few) flush();
      }
    }
    if (image + 1 < count && (draws == 0 || (order != nullptr && sign(1, first + image) == sign(1, first + image + 1))))
      continue;
    flush();
    for (int64_t draw = 0; draw <= draws; ++draw) {
      const T own = sign(draw, first + image);
      double* sum = panels.sums.data() + (draw * channel_blocks + block) * width;
      for (int64_t lane = 0; lane < width; ++lane) sum[lane] += own * total[lane];
    }
    std::fill(total, total + kLanes<T>, 0.0);
  }
}

template struct Source<float>;
template struct Source<double>;

}  // namespace growkern
