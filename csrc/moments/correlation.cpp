#include "correlation.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

namespace growkern {
namespace {

// What a visit of a sum costs beside its multiplications, in positions, about: where every other row has another
// weight, as under a consumer of stride 2, there are too many sums to be worth it.
constexpr double kVisit = 32;

// Along one axis: the positions m of u, all (−1) or one, that a pair of taps sums at a shift, and their weight.
struct AxisTerm {
  int64_t position, shift;
  double weight;
};

std::vector<AxisTerm> axis_terms(int64_t u_length, int64_t v_length, const Window& u, const Window& v, int axis,
                                 const std::vector<double>& weights, int64_t a, int64_t b) {
  const int64_t u_offset = u.offset[axis] + u.step[axis] * a, v_offset = v.offset[axis] + v.step[axis] * b;
  const int64_t shift = v_offset - u_offset;
  const auto weight = [&](int64_t m) {
    const int64_t sample = m - u_offset;
    return sample >= 0 && sample < static_cast<int64_t>(weights.size()) ? weights[sample] : 0.0;
  };
  // Elsewhere v is zero at the shift.
  const int64_t first = std::max<int64_t>(0, -shift), last = std::min(u_length, v_length - shift);
  std::map<double, int64_t> counts;
  for (int64_t m = first; m < last; ++m) ++counts[weight(m)];
  double common = 0;
  for (const auto& [value, count] : counts)
    if (count > counts[common]) common = value;
  std::vector<AxisTerm> terms;
  if (common != 0) terms.push_back({-1, shift, common});
  for (int64_t m = first; m < last; ++m)
    if (weight(m) != common) terms.push_back({m, shift, weight(m) - common});
  return terms;
}

}  // namespace

Pair shift_range(const Window& u, const Window& v, int axis) {
  Pair range{INT64_MAX, INT64_MIN};
  for (int64_t a : {int64_t{0}, u.taps[axis] - 1}) {
    for (int64_t b : {int64_t{0}, v.taps[axis] - 1}) {
      const int64_t shift = v.offset[axis] + v.step[axis] * b - u.offset[axis] - u.step[axis] * a;
      range = {std::min(range[0], shift), std::max(range[1], shift)};
    }
  }
  return range;
}

double correlation_cost(const Pair& u_size, const Pair& v_size, const Window& u, const Window& v,
                        const Weights& weights, bool symmetric) {
  double positions = symmetric ? 0.5 : 1, sums = positions;
  for (int axis : {0, 1}) {
    std::set<std::pair<int64_t, int64_t>> seen;
    double visited = 0;
    for (int64_t a = 0; a < u.taps[axis]; ++a)
      for (int64_t b = 0; b < v.taps[axis]; ++b)
        for (const AxisTerm& term : axis_terms(u_size[axis], v_size[axis], u, v, axis, weights[axis], a, b))
          if (seen.emplace(term.position, term.shift).second)
            visited += term.position < 0 ? static_cast<double>(u_size[axis]) : 1;
    positions *= visited;
    sums *= static_cast<double>(seen.size());
  }
  const double visits = static_cast<double>(u_size[0] * u_size[1]) / kGroupRows;
  return positions + kVisit * visits * sums;
}

template <class T>
void Moment<T>::plan() {
  Weights factors = weights;
  if (u->patches)  // they carry the weights themselves
    for (auto& axis : factors) std::fill(axis.begin(), axis.end(), 1.0);
  std::array<std::vector<std::vector<AxisTerm>>, 2> axis_pairs;
  for (int axis : {0, 1})
    for (int64_t a = 0; a < u_window.taps[axis]; ++a)
      for (int64_t b = 0; b < v_window.taps[axis]; ++b)
        axis_pairs[axis].push_back(
            axis_terms(u->size[axis], v->size[axis], u_window, v_window, axis, factors[axis], a, b));
  const auto each_pair = [&](const auto& visit) {
    const int64_t taps_u = u_window.count(), taps_v = v_window.count();
    for (int64_t a = 0; a < taps_u; ++a) {
      for (int64_t b = symmetric ? a : 0; b < taps_v; ++b) {
        const auto& ys = axis_pairs[0][a / u_window.taps[1] * v_window.taps[0] + b / v_window.taps[1]];
        const auto& xs = axis_pairs[1][a % u_window.taps[1] * v_window.taps[1] + b % v_window.taps[1]];
        for (const AxisTerm& y : ys)
          for (const AxisTerm& x : xs) visit(a * taps_v + b, y, x, y.shift * u->pitch[1] + x.shift);
      }
    }
  };
  std::map<Pair, std::set<int64_t>> wanted;
  each_pair([&](int64_t, const AxisTerm& y, const AxisTerm& x, int64_t shift) {
    wanted[{y.position, x.position}].insert(shift);
  });
  std::map<Pair, int64_t> index;
  const int64_t reached = kLanes<T> / v->width;  // positions in a panel row
  for (const auto& [where, shifts] : wanted) {
    index[where] = static_cast<int64_t>(groups.size());
    Group group{where[0], where[1], {}, sums};
    for (int64_t shift : shifts)
      if (group.shifts.empty() || shift >= group.shifts.back() + reached) group.shifts.push_back(shift);
    sums += static_cast<int64_t>(group.shifts.size());
    groups.push_back(std::move(group));
  }
  terms.resize(u_window.count() * v_window.count());
  each_pair([&](int64_t pair, const AxisTerm& y, const AxisTerm& x, int64_t shift) {
    const int64_t group = index[{y.position, x.position}];
    const auto& starts = groups[group].shifts;
    const int64_t vector = std::upper_bound(starts.begin(), starts.end(), shift) - starts.begin() - 1;
    const int64_t lane = (shift - starts[vector]) * v->width;
    terms[pair].push_back({group, vector, lane, static_cast<T>(y.weight * x.weight)});
  });
}

template struct Moment<float>;
template struct Moment<double>;

}  // namespace growkern
