#include "correlation.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

namespace growkern {
namespace {

// What a visit of a sum costs beside its multiplications, in positions, about: where every third row has another
// weight, as under a consumer of stride 3, there are too many sums to be worth it.
constexpr double kVisit = 32;

// Along one axis: the positions m of u, one or Lines, that a pair of taps sums at a shift, and their weight.
struct AxisTerm {
  int64_t position, shift;
  double weight;
};

// The most frequent number; 0 among none.
double most_frequent(const std::map<double, int64_t>& counts) {
  double found = 0;
  int64_t most = 0;
  for (const auto& [value, count] : counts) {
    if (count <= most) continue;
    found = value;
    most = count;
  }
  return found;
}

template <class T>
std::vector<AxisTerm> axis_terms(const Moment<T>& moment, int axis, int64_t a, int64_t b) {
  const Source<T>&u = *moment.u, &v = *moment.v;
  const int64_t u_offset = moment.u_window.offset[axis] + moment.u_window.step[axis] * a;
  const int64_t shift = moment.v_window.offset[axis] + moment.v_window.step[axis] * b - u_offset;
  const std::vector<double>& weights = moment.weights[axis];
  std::vector<std::pair<int64_t, double>> read;  // positions where neither is zero, and their weights
  std::map<double, int64_t> counts, counts_of[2];
  const int64_t first = std::max<int64_t>(0, -shift), last = std::min(u.size[axis], v.size[axis] - shift);
  for (int64_t m = first; m < last; ++m) {
    if (m % u.apart[axis] != 0 || (m + shift) % v.apart[axis] != 0) continue;
    const int64_t sample = m - u_offset;
    const bool inside = !u.patches && sample >= 0 && sample < static_cast<int64_t>(weights.size());
    const double weight = u.patches ? 1 : inside ? weights[sample] : 0;  // patches carry theirs
    read.emplace_back(m, weight);
    ++counts[weight];
    ++counts_of[m % 2][weight];
  }
  const double common = most_frequent(counts);
  const double common_of[2] = {most_frequent(counts_of[0]), most_frequent(counts_of[1])};
  int64_t others = 0, others_of = 1;
  for (const auto& [m, weight] : read) {
    others += weight != common;
    others_of += weight != common_of[m % 2];
  }
  const bool apart = u.apart[axis] > 1 || v.apart[axis] > 1 || others_of < others;
  std::vector<AxisTerm> terms;
  if (!apart && common != 0) terms.push_back({kAll, shift, common});
  if (apart && common_of[0] != 0) terms.push_back({kEven, shift, common_of[0]});
  if (apart && common_of[1] != 0) terms.push_back({kOdd, shift, common_of[1]});
  for (const auto& [m, weight] : read) {
    const double left = weight - (apart ? common_of[m % 2] : common);
    if (left != 0) terms.push_back({m, shift, left});
  }
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

Run run_of(int64_t lines, int64_t size) {
  if (lines == kAll) return {0, 1, size};
  if (lines == kEven) return {0, 2, (size + 1) / 2};
  if (lines == kOdd) return {1, 2, size / 2};
  return {lines, 1, 1};
}

template <class T>
double correlation_cost(const Moment<T>& moment) {
  double positions = moment.symmetric ? 0.5 : 1, sums = positions;
  for (int axis : {0, 1}) {
    std::set<std::pair<int64_t, int64_t>> seen;
    double visited = 0;
    for (int64_t a = 0; a < moment.u_window.taps[axis]; ++a)
      for (int64_t b = 0; b < moment.v_window.taps[axis]; ++b)
        for (const AxisTerm& term : axis_terms(moment, axis, a, b))
          if (seen.emplace(term.position, term.shift).second)
            visited += static_cast<double>(run_of(term.position, moment.u->size[axis]).count);
    positions *= visited;
    sums *= static_cast<double>(seen.size());
  }
  const double visits = static_cast<double>(moment.u->size[0] * moment.u->size[1]) / kGroupRows;
  return positions + kVisit * visits * sums;
}

template <class T>
void Moment<T>::plan(const std::vector<Moment*>& others) {
  std::vector<Moment*> all{this};
  all.insert(all.end(), others.begin(), others.end());
  const auto each_pair = [&](const Moment& moment, const auto& visit) {
    std::array<std::vector<std::vector<AxisTerm>>, 2> axis_pairs;
    for (int axis : {0, 1})
      for (int64_t a = 0; a < u_window.taps[axis]; ++a)
        for (int64_t b = 0; b < v_window.taps[axis]; ++b) axis_pairs[axis].push_back(axis_terms(moment, axis, a, b));
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
  for (const Moment* moment : all)
    each_pair(*moment, [&](int64_t, const AxisTerm& y, const AxisTerm& x, int64_t shift) {
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
  for (Moment* moment : all) {
    moment->terms.resize(u_window.count() * v_window.count());
    each_pair(*moment, [&](int64_t pair, const AxisTerm& y, const AxisTerm& x, int64_t shift) {
      const int64_t group = index[{y.position, x.position}];
      const auto& starts = groups[group].shifts;
      const int64_t vector = std::upper_bound(starts.begin(), starts.end(), shift) - starts.begin() - 1;
      const int64_t lane = (shift - starts[vector]) * v->width;
      moment->terms[pair].push_back({group, vector, lane, static_cast<T>(y.weight * x.weight)});
    });
  }
}

template struct Moment<float>;
template struct Moment<double>;
template double correlation_cost(const Moment<float>&);
template double correlation_cost(const Moment<double>&);

}  // namespace growkern
