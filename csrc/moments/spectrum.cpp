#include "spectrum.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "../parallel.h"

namespace growkern {
namespace {

// From so many shifts on, and so many tiles of images, transforms and mixing are worth the products that are saved.
// The fewer shifts, the more tiles it takes.
constexpr int64_t kLeastShifts = 5, kLeastTiles = 16, kLeastSums = 400;
// Positions of a tile along one axis: many, because large tiles have fewer frequencies for each position, unless there
// are too few tiles then.
constexpr int64_t kMostPositions = 32, kFewPositions = 8;
// Memory for planes at one time, about, or half of that of the panels; and the columns of frequencies for which they
// are made together at most.
constexpr int64_t kPlaneBytes = 8 << 20, kMostColumns = 4;
// Blocks of u and v of a task: its products stay in the L2 cache until they are mixed.
constexpr Pair kTaskBlocks{2, 4};
// Rows of frequencies whose products are mixed at a time, while the cache has them.
constexpr int64_t kMixedRows = 6;
// Groups of positions summed in a register at once.
constexpr int64_t kChain = 16;

int64_t fours(int64_t count) { return (count + 3) / 4 * 4; }

template <class T>
Pair own_reach(const Moment<T>& moment) {
  Pair reach;
  for (int axis : {0, 1}) {
    const Pair range = shift_range(moment.u_window, moment.v_window, axis);
    reach[axis] = std::max(std::abs(range[0]), std::abs(range[1]));
  }
  return reach;
}

}  // namespace

template <class T>
double Spectrum<T>::Axis::angle(int64_t frequency, int64_t position) const {
  const int64_t turned = ((frequency * position) % length + length) % length;
  return 2 * std::numbers::pi * static_cast<double>(turned) / static_cast<double>(length);
}

// Real and imaginary part of exp(−2πi·frequency·position / length), rows of positions.
template <class T>
std::vector<T> Spectrum<T>::Axis::waves(int64_t first, int64_t count) const {
  const int64_t row = fours(2 * count), rows = tile + high - low;
  std::vector<T> table(rows * row, T{0});
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < count; ++k) {
      table[i * row + 2 * k] = static_cast<T>(std::cos(angle(first + k, low + i)));
      table[i * row + 2 * k + 1] = static_cast<T>(-std::sin(angle(first + k, low + i)));
    }
  }
  return table;
}

// Tiles of at most so many positions, and the shortest torus for them.
template <class T>
void Spectrum<T>::lay_out(Axis& axis, int64_t u_size, int64_t v_size, int64_t most) const {
  axis.tiles = (u_size + most - 1) / most;
  axis.tile = (u_size + axis.tiles - 1) / axis.tiles;
  // Positions of v less those of u, modulo the length, have to tell all shifts from all others that are met.
  const int64_t first = axis.tiles > 1 ? axis.low : 0;
  const int64_t last = axis.tiles > 1 ? axis.tile + axis.high : std::min(v_size, axis.tile + axis.high);
  axis.length = std::max({last - axis.low, axis.tile + axis.high - first, int64_t{2}});
  axis.length += axis.length % 2;
}

template <class T>
const typename Spectrum<T>::Side* Spectrum<T>::side(const Source<T>* source, bool left) {
  left &= tiles() > 1;
  for (const auto& known : sides_)
    if (known->source == source && known->left == left) return known.get();
  sides_.push_back(std::make_unique<Side>(Side{source, left, blocks_}));
  blocks_ += source->blocks;
  return sides_.back().get();
}

template <class T>
void Spectrum<T>::take(std::vector<Moment<T>>& moments, int64_t images) {
  Pair u_size{0, 0}, v_size{0, 0};
  for (Moment<T>& moment : moments) {
    const Source<T>&u = *moment.u, &v = *moment.v;
    if (u.width < kLanes<T> || v.width < kLanes<T> || moment.image_by_image() || u.blocks * v.blocks == 0) continue;
    if (2 * own_reach(moment)[1] >= u.pitch[1]) continue;  // shifts by rows and by columns could not be told apart
    for (const Group& group : moment.groups) {
      const bool everywhere = group.row == kAll && group.column == kAll;
      if (!everywhere || static_cast<int64_t>(group.shifts.size()) < kLeastShifts) continue;
      moment.transformed = &group - moment.groups.data();
      for (int axis : {0, 1}) {
        const Pair range = shift_range(moment.u_window, moment.v_window, axis);
        axes_[axis].low = std::min(axes_[axis].low, range[0]);
        axes_[axis].high = std::max(axes_[axis].high, range[1]);
        u_size[axis] = std::max(u_size[axis], u.size[axis]);
        v_size[axis] = std::max(v_size[axis], v.size[axis]);
      }
    }
  }
  if (u_size == Pair{0, 0}) return;
  for (int64_t most = kMostPositions; most >= kFewPositions; most /= 2) {
    for (int axis : {0, 1}) lay_out(axes_[axis], u_size[axis], v_size[axis], most);
    if (images * tiles() >= kLeastTiles) break;
  }
  bool pays = images * tiles() >= kLeastTiles;
  for (const Axis& axis : axes_) pays &= axis.tiles == 1 || axis.tile >= kFewPositions;
  for (Moment<T>& moment : moments) {
    // On a torus for much larger maps, each of its positions costs as much as one of theirs.
    const Pair& size = moment.u->size;
    if (!pays || 2 * size[0] * size[1] < u_size[0] * u_size[1]) moment.transformed = -1;
    if (moment.transformed < 0) continue;
    const auto shifts = static_cast<int64_t>(moment.groups[moment.transformed].shifts.size());
    if (images * tiles() * (moment.symmetric ? 2 : 1) * shifts < kLeastSums) moment.transformed = -1;
    if (moment.transformed < 0) continue;
    const Side *u = side(moment.u, true), *v = side(moment.v, false);
    for (int64_t u0 = 0; u0 < moment.u->blocks; u0 += kTaskBlocks[0])
      for (int64_t v0 = moment.symmetric ? u0 : 0; v0 < moment.v->blocks; v0 += kTaskBlocks[1])
        tasks_.push_back({&moment, u, v, u0, std::min(u0 + kTaskBlocks[0], moment.u->blocks), v0,
                          std::min(v0 + kTaskBlocks[1], moment.v->blocks)});
  }
}

template <class T>
typename Spectrum<T>::Span Spectrum<T>::span(const Axis& axis, const Side& side, int index, int64_t tile) const {
  const int64_t origin = tile * axis.tile, size = side.source->size[index];
  const int64_t first = std::max<int64_t>(0, origin + (side.left ? 0 : axis.low));
  const int64_t last = std::min(size, origin + axis.tile + (side.left ? 0 : axis.high));
  return {first, std::max(first, last), first - origin - axis.low};
}

// Writes a group of positions of a block: rows of the maps first, then columns of real and of imaginary parts.
template <class T>
void Spectrum<T>::transform(const Side& side, const Panels<T>& panels, int64_t block, int64_t group) {
  const Source<T>& source = *side.source;
  const Axis &down = axes_[0], &along = axes_[1];
  const int64_t lanes = kLanes<T>, row = fours(2 * columns_), column = fours(2 * down.half());
  const int64_t height = down.tile + down.high - down.low;
  std::vector<T> rows(row * height * lanes), parts(2 * column * lanes);
  std::vector<const T*> from;
  for (int64_t i = 0; i < kGroup; ++i) {
    const int64_t position = group * kGroup + i, tile = position % tiles();
    const Span y = span(down, side, 0, tile / along.tiles), x = span(along, side, 1, tile % along.tiles);
    const int64_t count = position < positions_ && x.last > x.first ? y.last - y.first : 0;
    const T* in = panels.first + block * panels.block_elements + position / tiles() * source.image_elements();
    from.clear();
    for (int64_t k = y.first; k < y.first + count; ++k) from.push_back(in + (k * source.pitch[1] + x.first) * lanes);
    std::fill(rows.begin(), rows.end(), T{0});
    kernels<T>().multiply({{1, 1, x.last - x.first}, {0, 0, row}, {0, 0, lanes}}, column_waves_.data() + x.row * row,
                          row, from.data(), 0, count, {rows.data(), lanes, height * lanes});
    for (int64_t k = 0; k < columns_; ++k) {
      const T* real = rows.data() + 2 * k * height * lanes;
      const T* halves[] = {real, real + height * lanes};
      std::fill(parts.begin(), parts.end(), T{0});
      kernels<T>().multiply({{1, 1, count}, {0, 0, column}, {0, 0, lanes}}, row_waves_.data() + y.row * column, column,
                            halves, 0, along.real(first_ + k) ? 1 : 2, {parts.data(), column * lanes});
      kernels<T>().join(parts.data(), column * lanes, down.half(),
                        planes(side, block) + group * group_ + plane(k, 0) + i * lanes, plane_);
    }
  }
}

// The products of a task at the columns of frequencies at hand, mixed to sums at shifts.
template <class T>
void Spectrum<T>::multiply(const Task& task, const Places<T>& places) {
  const Axis &down = axes_[0], &along = axes_[1];
  const int64_t square = kLanes<T> * kLanes<T>, v_count = task.v1 - task.v0, pairs = (task.u1 - task.u0) * v_count;
  const int64_t products = kMixedRows * 6 * square, rows = (2 * down.reach() + 1) * 2 * square;
  std::vector<T> sums(pairs * products);
  std::vector<double> mixed(pairs * columns_ * rows, 0.0);
  std::vector<const T*> right;
  for (int64_t v = task.v0; v < task.v1; ++v) right.push_back(planes(*task.v, v));
  const auto each_pair = [&](const auto& body) {
    for (int64_t u = task.u0; u < task.u1; ++u)
      for (int64_t v = task.moment->symmetric ? std::max(task.v0, u) : task.v0; v < task.v1; ++v)
        body(u, v, (u - task.u0) * v_count + v - task.v0);
  };
  for (int64_t k = 0; k < columns_; ++k) {
    for (int64_t first = 0, count; first < down.half(); first += count) {
      count = std::min(kMixedRows, down.half() - first);
      std::fill(sums.begin(), sums.end(), T{0});
      for (int64_t i = first; i < first + count; ++i) {
        const int64_t parts = along.real(first_ + k) || down.real(i) ? 3 : 6;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t left = plane(k, i) + (part / 3 * 4 + part % 3) * plane_;
          const int64_t other = left + (part % 3 == 2) * plane_;
          for (int64_t start = 0; start < groups_; start += kChain) {
            const int64_t chain = std::min(kChain, groups_ - start);
            for (int64_t u = task.u0; u < task.u1; ++u) {
              const int64_t skipped = task.moment->symmetric ? std::max<int64_t>(0, u - task.v0) : 0;
              T* to = sums.data() + ((u - task.u0) * v_count + skipped) * products + ((i - first) * 6 + part) * square;
              kernels<T>().multiply({{1, chain, kGroup}, {0, group_, kLanes<T>}, {0, group_, kLanes<T>}},
                                    planes(*task.u, u) + start * group_ + left, task.moment->u->channels_of(u),
                                    right.data() + skipped, start * group_ + other, v_count - skipped, {to, products});
            }
          }
        }
      }
      each_pair([&](int64_t, int64_t, int64_t pair) {
        kernels<T>().mix_rows(sums.data() + pair * products, count,
                              row_mix_.data() + (k * down.half() + first) * (down.reach() + 1) * 2, down.reach(),
                              mixed.data() + (pair * columns_ + k) * rows);
      });
    }
  }
  each_pair([&](int64_t u, int64_t v, int64_t pair) {
    store(task, u, v, mixed.data() + pair * columns_ * rows, places);
  });
}

// Adds what a pair of blocks gives to the sums; (v, u) at shift −d is (u, v) at d, transposed.
template <class T>
void Spectrum<T>::store(const Task& task, int64_t u, int64_t v, const double* rows, const Places<T>& places) const {
  const Moment<T>& moment = *task.moment;
  const Pair reach{axes_[0].reach(), axes_[1].reach()};
  const auto& shifts = moment.groups[moment.transformed].shifts;
  const int64_t square = kLanes<T> * kLanes<T>, count = (2 * reach[0] + 1) * (2 * reach[1] + 1);
  const bool mirrored = moment.symmetric && u != v;
  const Pair own = own_reach(moment);
  std::vector<T> sums(count * square);
  kernels<T>().mix_columns(rows, columns_, column_mix_.data(), reach, sums.data());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = i / (2 * reach[1] + 1) - reach[0], x = i % (2 * reach[1] + 1) - reach[1];
    if (std::abs(y) > own[0] || std::abs(x) > own[1]) continue;  // another moment's
    const T* from = sums.data() + i * square;
    const auto wanted = [&](int64_t shift) {
      const auto found = std::lower_bound(shifts.begin(), shifts.end(), shift);
      return found != shifts.end() && *found == shift ? found - shifts.begin() : -1;
    };
    const int64_t shift = y * moment.u->pitch[1] + x, vector = wanted(shift), opposite = wanted(-shift);
    if (vector >= 0) {
      T* to = places(moment, u, v, vector);
      for (int64_t e = 0; e < square; ++e) to[e] += from[e];
    }
    if (mirrored && opposite >= 0) {
      T* to = places(moment, v, u, opposite);
      for (int64_t row = 0; row < kLanes<T>; ++row)
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) to[row * kLanes<T> + lane] += from[lane * kLanes<T> + row];
    }
  }
}

// Tables for the columns of frequencies at hand: transforms along rows, and factors that mix products.
template <class T>
void Spectrum<T>::tabulate() {
  const Axis &down = axes_[0], &along = axes_[1];
  column_waves_ = along.waves(first_, columns_);
  row_mix_.clear();
  column_mix_.clear();
  for (int64_t k = 0; k < columns_; ++k) {
    const bool real = along.real(first_ + k);
    for (int64_t i = 0; i < down.half(); ++i) {
      // Every frequency stands for its opposite too, unless it is its own.
      const double weight = (real && down.real(i) ? 1.0 : 2.0) / static_cast<double>(down.length * along.length);
      for (int64_t shift = 0; shift <= down.reach(); ++shift) {
        row_mix_.push_back(weight * std::cos(down.angle(i, shift)));
        row_mix_.push_back(weight * std::sin(down.angle(i, shift)));
      }
    }
    for (int64_t shift = -along.reach(); shift <= along.reach(); ++shift) {
      column_mix_.push_back(std::cos(along.angle(first_ + k, shift)));
      column_mix_.push_back(real ? 0.0 : std::sin(along.angle(first_ + k, shift)));
    }
  }
}

template <class T>
void Spectrum<T>::add(const std::vector<Panels<T>>& panels, int64_t images, const Places<T>& places) {
  const int64_t columns = axes_[1].half();
  positions_ = images * tiles();
  groups_ = (positions_ + kGroup - 1) / kGroup;
  int64_t panel_bytes = 0;
  for (const auto& each : sides_)
    panel_bytes += each->source->blocks * panels[each->source->index].block_elements * static_cast<int64_t>(sizeof(T));
  const int64_t column_bytes = blocks_ * groups_ * plane(1, 0) * static_cast<int64_t>(sizeof(T));
  const int64_t possible = std::max(kPlaneBytes, panel_bytes / 2) / column_bytes;
  const int64_t most = std::clamp<int64_t>(possible, 1, std::min(kMostColumns, columns));
  group_ = plane(most, 0) + plane_;  // an odd number of planes: neighbours do not share cache sets
  block_ = groups_ * group_ + plane_;
  if (allocated_ < blocks_ * block_) planes_ = allocate<T>(allocated_ = blocks_ * block_);
  row_waves_ = axes_[0].waves(0, axes_[0].half());
  for (first_ = 0; first_ < columns; first_ += columns_) {
    columns_ = std::min(most, columns - first_);
    tabulate();
    parallel(blocks_ * groups_, [&](int64_t task) {
      const int64_t block = task % blocks_;
      const auto side = std::find_if(sides_.rbegin(), sides_.rend(), [&](const auto& s) { return s->start <= block; });
      transform(**side, panels[(*side)->source->index], block - (*side)->start, task / blocks_);
    });
    parallel(static_cast<int64_t>(tasks_.size()), [&](int64_t i) { multiply(tasks_[i], places); });
  }
}

template class Spectrum<float>;
template class Spectrum<double>;

}  // namespace growkern
