// Maps as the kernels read them: packed into panels, zeros around every image.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels.h"

namespace growkern {

// A tensor (images, channels, rows, columns) in its own memory.
struct Map {
  const void* data;
  Dtype dtype;
  int64_t images, channels;
  Pair size;
  std::array<int64_t, 4> stride;  // in elements

  bool operator==(const Map&) const = default;
  // Every `apart`-th row and column, from the first on.
  Map every(const Pair& apart, const Pair& first) const;
};

// At sample position l, tap a reads (stride·l + offset + step·a) / divisor, where that is whole and inside the map;
// either the stride or the divisor is 1.
struct Window {
  Pair taps{1, 1}, offset{0, 0}, step{1, 1}, stride{1, 1}, divisor{1, 1};

  int64_t count() const { return taps[0] * taps[1]; }
  int64_t position(int axis, int64_t sample, int64_t tap) const {
    const int64_t scaled = stride[axis] * sample + offset[axis] + step[axis] * tap;
    return scaled >= 0 && scaled % divisor[axis] == 0 ? scaled / divisor[axis] : -1;
  }
  // Whether shifts of the map reach everything that it reads.
  bool dense() const { return stride == Pair{1, 1} && divisor == Pair{1, 1}; }
  bool operator==(const Window&) const = default;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t elements);

// Some images of a source: [block][image][row][column][channel of the block], zeros around every image.
template <class T>
struct Panels {
  Buffer<T> memory;
  T* first = nullptr;        // of block 0, image 0, position (0, 0)
  int64_t block_elements = 0;
  std::vector<double> sums;  // over images: [draw, 0 for none][channel block][row][column][channel]
};

// Weights of sample positions, one factor per row and one per column.
using Weights = std::array<std::vector<double>, 2>;

// A map, or its patches (im2col), and how it is packed.
template <class T>
struct Source {
  Map map;
  bool patches = false;      // the channels are then features (channel, tap row, tap column) of the window
  Window window;             // of the patches
  Weights weights;           // of the patches; empty for ones
  Pair apart{1, 1};          // distances of the positions of the map, with zeros between them
  Pair size{};               // positions: of the map, zeros between them too, or the sample positions of the patches
  Pair pitch{};              // positions from row to row and from image to image, zeros included
  int64_t channels = 0;
  bool summed = false;       // whether `sums` are wanted
  bool lumped = true;        // whether they are wanted over all positions together only
  const T* signs = nullptr;  // (draws, images)
  int64_t draws = 0;
  const int64_t* order = nullptr;  // in which images are packed; null for their own
  bool copied = false;       // whether the panels are repeated under each draw, or only `sums` are

  int64_t index = 0;           // in the batch
  int64_t width = 0;           // channels of a block, the distance between columns
  int64_t channel_blocks = 0;  // without the repetitions under draws
  int64_t blocks = 0;

  int64_t image(int64_t number) const { return order == nullptr ? number : order[number]; }
  T sign(int64_t draw, int64_t number) const {
    return draw == 0 ? T{1} : signs[(draw - 1) * map.images + image(number)];
  }
  // Signs of an image, with the 1 before them, and zeros to a multiple of four, as the micro-kernel wants them.
  int64_t sign_rows() const { return (draws + 4) / 4 * 4; }
  int64_t image_elements() const { return in_place() ? map.stride[0] : pitch[0] * pitch[1] * width; }
  int64_t channels_of(int64_t block) const { return std::min(width, channels - block % channel_blocks * width); }
  void lay_out();
  // Room for `images`, and zeros for shifts that reach up to `reach` positions before the first and after the last.
  Panels<T> reserve(int64_t images, int64_t reach) const;
  // Packing, and adding up `sums`, are made of independent tasks.
  int64_t pack_tasks(int64_t count) const;
  void pack(Panels<T>& panels, int64_t first, int64_t count, int64_t task) const;
  // What `sums` tell apart.
  Pair summed_size() const { return lumped ? Pair{1, 1} : size; }
  int64_t sum_tasks() const { return !summed ? 0 : lumped ? channel_blocks : channel_blocks * size[0] * (1 + draws); }
  void add_sums(Panels<T>& panels, int64_t first, int64_t count, int64_t task) const;
  void add_lumped(Panels<T>& panels, int64_t first, int64_t count, int64_t block) const;
  bool is_matrix() const { return !patches && size == Pair{1, 1} && pitch == Pair{1, 1}; }
  // Whether the rows of a narrow matrix are panel rows as they are; wide ones are slower than their copies.
  bool in_place() const;
};

}  // namespace growkern
