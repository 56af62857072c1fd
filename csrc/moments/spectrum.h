// Sums over all positions at many shifts from discrete Fourier transforms.
//
// By the convolution theorem the sums S_d = Σ_t u(t) v(t + d) of all shifts d come from one product conj(û(f)) v̂(f)
// for each frequency f of a torus on which the shifts do not wrap around. Its real and imaginary parts, p₀ + p₁ and
// p₂ + p₀ − p₁, take three products (Gauss): p₀ = a c, p₁ = b d, p₂ = (a + b)(d − c) for û = a + ib, v̂ = c + id. The
// planes of a frequency hold real part, imaginary part, their sum and their difference, imaginary less real, for all
// tiles of all images: each product is one sum over them.
#pragma once

#include <cstdlib>
#include <functional>
#include <vector>

#include "correlation.h"

namespace growkern {

// Where the sums of the pair of blocks (u, v) at each shift of a group are.
template <class T>
using Places = std::function<T*(const Moment<T>&, int64_t u, int64_t v, int64_t vector)>;

// Those of all moments of a batch that are worth it.
template <class T>
class Spectrum {
 public:
  // Takes the sums over all positions from those moments where that pays: it sets their `transformed`.
  void take(std::vector<Moment<T>>& moments, int64_t images);
  bool empty() const { return tasks_.empty(); }
  // Adds the sums of the packed images.
  void add(const std::vector<Panels<T>>& panels, int64_t images, const Places<T>& places);

 private:
  // Positions whose planes lie side by side: [block][group][column][row][sign][plane][position of the group][lane].
  static constexpr int64_t kGroup = 8, plane_ = kGroup * kLanes<T>;

  // Tiles of u, and by how much more v reads around each; tables have a row for each of these positions.
  struct Axis {
    int64_t tile = 0, tiles = 0, length = 0, low = 0, high = 0;
    int64_t half() const { return length / 2 + 1; }
    int64_t reach() const { return std::max(std::abs(low), std::abs(high)); }
    bool real(int64_t frequency) const { return frequency == 0 || 2 * frequency == length; }
    double angle(int64_t frequency, int64_t position) const;
    std::vector<T> waves(int64_t first, int64_t count) const;
  };
  // The positions [first, last) that are read, and the row of the tables for the first.
  struct Span {
    int64_t first, last, row;
  };
  // A source as u, as v, or, where one tile holds the map, as both.
  struct Side {
    const Source<T>* source;
    bool left;
    int64_t start;  // of its planes, in blocks
  };
  // Some pairs of blocks.
  struct Task {
    const Moment<T>* moment;
    const Side *u, *v;
    int64_t u0, u1, v0, v1;
  };

  void lay_out(Axis& axis, int64_t u_size, int64_t v_size, int64_t most) const;
  Span span(const Axis& axis, const Side& side, int axis_index, int64_t tile) const;
  const Side* side(const Source<T>* source, bool left);
  int64_t tiles() const { return axes_[0].tiles * axes_[1].tiles; }
  // Of the four planes of a frequency, among those of a group of positions.
  int64_t plane(int64_t column, int64_t row) const { return (column * axes_[0].half() + row) * 8 * plane_; }
  T* planes(const Side& side, int64_t block) const { return planes_.get() + (side.start + block) * block_; }
  void tabulate();
  void transform(const Side& side, const Panels<T>& panels, int64_t block, int64_t group);
  void multiply(const Task& task, const Places<T>& places);
  void store(const Task& task, int64_t u, int64_t v, const double* rows, const Places<T>& places) const;

  std::array<Axis, 2> axes_;
  std::vector<std::unique_ptr<Side>> sides_;
  std::vector<Task> tasks_;
  int64_t blocks_ = 0;  // of all sides
  // Of the images and the columns of frequencies at hand.
  int64_t positions_ = 0, groups_ = 0, group_ = 0, block_ = 0, first_ = 0, columns_ = 0;
  std::vector<T> row_waves_, column_waves_;
  std::vector<double> row_mix_, column_mix_;
  Buffer<T> planes_;
  int64_t allocated_ = 0;
};

}  // namespace growkern
