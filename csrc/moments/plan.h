// Which moments of which maps an op sums, and how each is best summed.
#pragma once

#include <array>
#include <vector>

#include "engine.h"

namespace growkern {

// As growkern.ops.ConvGeometry packs it.
struct Geometry {
  Pair kernel, stride, padding, dilation;
};

template <class T>
class Planner {
 public:
  explicit Planner(std::array<Map, 3> maps) : maps_(std::move(maps)) { batch_.images = maps_[0].images; }

  // Σ_l ω(l) u_l v_lᵀ of two of the maps, and the same under every draw, if wanted.
  void add(int u, const Window& u_window, bool u_bias, int v, const Window& v_window, bool v_bias,
           const Weights& weights, T* out, T* null = nullptr);
  // Draws of signs, one per image, under which the last map is summed as well.
  void set_signs(const T* signs, int64_t draws);
  void run();

 private:
  Source<T>* whole(const Map& map, const Pair& apart);
  void set_pitches();
  Source<T>* patches(int map, const Window& window, const Weights& weights, const Pair& size);

  std::array<Map, 3> maps_;
  const T* signs_ = nullptr;
  int64_t draws_ = 0;
  Batch<T> batch_;
};

// The windows of x, h and v for a pair of convolutions, and the weights of their samples: hidden positions for the
// first two moments of "full", consumer positions for all else.
struct ConvWindows {
  ConvWindows(const Geometry& producer, const Geometry& consumer, bool full, const Pair& hidden, const Pair& outputs);

  Window x, h, target;  // target: v as x meets it
  Weights xx, xv, ones;
};

Weights constant(const Pair& size, double value);

}  // namespace growkern
