// A moment of two tapped maps as correlations: block (a, b) = Σ_l ω(l) u(l + a) v(l + b)ᵀ.
//
// With m = l + a the shift between the two maps is the same for all pairs of taps of one difference, and the
// weights of m are constant but for a few rows and columns at the border, or, under strides of 2, one constant for even
// and one for odd rows and columns. So every block is a combination of few sums: over all positions m or every other
// row or column, over one row, over one column, over one position, each at some shift.
#pragma once

#include <cstdint>
#include <vector>

#include "source.h"

namespace growkern {

// Rows of a panel multiplied at once: two panels stay in the L2 cache while border sums revisit them.
constexpr int64_t kGroupRows = 4096;

// coefficient · sum `vector` of group `group`, from this lane on.
template <class T>
struct Term {
  int64_t group, vector, lane;
  T coefficient;
};

// Rows or columns of u: one of them, or these.
enum Lines : int64_t { kAll = -1, kEven = -2, kOdd = -3 };

// Every step-th from `first` on.
struct Run {
  int64_t first, step, count;
};
Run run_of(int64_t lines, int64_t size);

// The sums over the same positions of u, one for each shift of v.
struct Group {
  int64_t row, column;          // or Lines
  std::vector<int64_t> shifts;  // in positions of the packed map; narrow panels reach the next ones too
  int64_t first;                // the number of sums in the groups before this one
};

// Taps of a part of a window, numbered as in the whole one.
struct Taps {
  std::vector<int64_t> places;
  int64_t all;
};

template <class T>
struct Moment {
  Source<T>* u;
  Source<T>* v;
  Window u_window, v_window;
  Taps u_taps, v_taps;  // where they are in the result
  Weights weights;      // ω of the sample positions
  bool symmetric;       // u and v are the same, and so are their windows
  bool mirrored;        // part of a symmetric result, whose transpose belongs to it too
  bool u_bias, v_bias;
  T* out;   // row-major; rows (channel, tap) of u and its bias, columns likewise of v; or null
  T* null;  // the same under each of v's draws of signs, one after the other
  int64_t like = -1;  // number of another moment, of which only weights, biases and result differ, and which has the sums

  std::vector<Group> groups;
  int64_t transformed = -1;  // the group whose sums a Spectrum makes, if any
  int64_t sums = 0;
  std::vector<std::vector<Term<T>>> terms;  // of each pair of taps; of a symmetric one only a ≤ b

  int64_t rows() const { return u->channels * u_taps.all + u_bias; }
  int64_t columns() const { return v->channels * v_taps.all + v_bias; }
  // Whether it writes the row, the column of its result that belongs to ones: so do the parts with the first taps.
  bool writes_row() const { return u_bias && u_taps.places[0] == 0; }
  bool writes_column() const { return v_bias && v_taps.places[0] == 0 && !symmetric && !mirrored; }
  bool upper() const { return symmetric && u_window.count() == 1; }
  // Draws whose sums are beside those without, as v's panels are not repeated.
  int64_t summed_draws() const { return v->copied ? 0 : v->draws; }
  // Whether the sums of every image are made first, and then added up under all draws. Under one draw images come in
  // the order of their signs, and those of either sign are summed.
  bool image_by_image() const { return summed_draws() > 0 && v->order == nullptr; }
  // How many of each sum there are.
  int64_t sets() const { return image_by_image() ? v->sign_rows() : 1 + summed_draws(); }
  T* result(int64_t draw) const { return draw == 0 ? out : null + (draw - 1) * rows() * columns(); }
  // Finds the sums that this moment and those like it take, and the terms of all.
  void plan(const std::vector<Moment*>& others);
};

// The smallest and largest shift of v against u along one axis.
Pair shift_range(const Window& u, const Window& v, int axis);

// Multiplications per pair of channels and image by correlation, about.
template <class T>
double correlation_cost(const Moment<T>& moment);

}  // namespace growkern
