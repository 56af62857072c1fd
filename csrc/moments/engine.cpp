#include "engine.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "../parallel.h"
#include "multiply.h"

namespace growkern {
namespace {

// Memory for panels at one time beyond a share of that of the sums: little to fault in.
constexpr int64_t kBatchPanelBytes = 16 << 20;
// The same where every part of the batch has panels of its own, in the L2 cache.
constexpr int64_t kPartPanelBytes = 512 << 10;
// Memory for the sums of all parts, and multiplications for which another part pays: the first few, and more.
constexpr int64_t kPartSumBytes = 16 << 20;
constexpr double kPartWork = 2 << 20, kLargePartWork = 64 << 20;
constexpr int64_t kFewParts = 8, kMostParts = 64;
// Sums per item: enough that panels are read from memory seldom; and fewer where each is held for every draw as well.
constexpr double kItemSums = 64, kDrawItemSums = 16;
// Items of the whole batch, about, whatever the number of threads, so that results do not depend on it.
constexpr double kItems = 24;

// Tiles of blocks of all moments, and what their sums cost but for those that a Spectrum makes.
template <class T>
std::vector<Item<T>> split(std::vector<Moment<T>>& moments) {
  std::vector<Item<T>> items;
  for (Moment<T>& moment : moments) {
    if (moment.groups.empty()) continue;
    const Source<T>&u = *moment.u, &v = *moment.v;
    double work = 0;
    double most = 1;  // shifts of a group
    for (const Group& group : moment.groups) {
      if (&group - moment.groups.data() == moment.transformed) continue;
      const int64_t rows = run_of(group.row, u.size[0]).count, columns = run_of(group.column, u.size[1]).count;
      const auto shifts = static_cast<double>(group.shifts.size());
      work += shifts * static_cast<double>(rows * columns);
      most = std::max(most, shifts);
    }
    const double wanted = moment.image_by_image() ? kDrawItemSums : kItemSums;
    const int64_t side = std::max<int64_t>(1, static_cast<int64_t>(std::sqrt(wanted / most)));
    for (int64_t u0 = 0; u0 < u.blocks; u0 += side) {
      for (int64_t v0 = moment.upper() ? u0 : 0; v0 < v.blocks; v0 += side) {
        Item<T> item{
            &moment, u0, std::min(u0 + side, u.blocks), v0, std::min(v0 + side, v.blocks), 0, 1, 0, 0};
        item.cost = work * static_cast<double>((item.u1 - u0) * (item.v1 - v0));
        items.push_back(item);
      }
    }
  }
  return items;
}

template <class T>
double total_cost(const std::vector<Item<T>>& items) {
  double total = 0;
  for (const Item<T>& item : items) total += item.cost;
  return total;
}

// Splits expensive items by images.
template <class T>
std::vector<Item<T>> divide(const std::vector<Item<T>>& whole, int64_t images) {
  const double total = total_cost(whole);
  std::vector<Item<T>> items;
  for (Item<T> item : whole) {
    const double share = total > 0 ? item.cost / total : 0;  // transforms may have left nothing
    item.parts = std::clamp<int64_t>(static_cast<int64_t>(std::ceil(share * kItems)), 1, images);
    item.cost /= static_cast<double>(item.parts);
    for (item.part = 0; item.part < item.parts; ++item.part) items.push_back(item);
  }
  return items;
}

template <class T>
int64_t place(std::vector<Item<T>>& items) {
  int64_t elements = 0;
  for (Item<T>& item : items) {
    item.start = elements;
    elements += item.elements();
  }
  return elements;
}

// Where terms find their sums, and their weights.
template <class T>
struct Weighted {
  std::vector<const T*> from;
  std::vector<double> weights;
};

// Writes rows × columns of a pair of taps: out[i·row_step + j·column_step] = Σ over terms, in double precision because
// borders are subtracted.
template <class T>
void emit(const Moment<T>& moment, const Item<T>* item, const T* sums, int64_t u, int64_t v, int64_t draw,
          const std::vector<Term<T>>& terms, Weighted<T>& weighted, T* out, int64_t row_step, int64_t column_step) {
  weighted.from.clear();
  weighted.weights.clear();
  for (const Term<T>& term : terms) {
    const Group& group = item->moment->groups[term.group];
    const int64_t offset = item->offset(u, v, group, term.vector) + draw * item->set_elements();
    weighted.from.push_back(sums + item->start + offset + term.lane);
    weighted.weights.push_back(term.coefficient);
  }
  kernels<T>().emit(weighted.from.data(), weighted.weights.data(), static_cast<int64_t>(terms.size()),
                    moment.u->channels_of(u), moment.v->channels_of(v), out, row_step, column_step);
}

// Writes all pairs of taps of block u by block v. `holder` finds the item that has the sums of two blocks.
template <class T, class Holder>
void assemble(const Moment<T>& moment, const T* sums, int64_t summed_draw, int64_t u, int64_t v,
              const Holder& holder) {
  const auto &places_u = moment.u_taps.places, &places_v = moment.v_taps.places;
  const int64_t taps_u = moment.u_taps.all, taps_v = moment.v_taps.all;
  const int64_t stride = moment.columns(), width_u = moment.u->width, width_v = moment.v->width;
  const int64_t block = v % moment.v->channel_blocks;
  T* out = moment.result(summed_draw + v / moment.v->channel_blocks);
  if (out == nullptr) return;
  Weighted<T> weighted;
  const auto own_u = static_cast<int64_t>(places_u.size()), own_v = static_cast<int64_t>(places_v.size());
  for (int64_t a = 0; a < own_u; ++a) {
    for (int64_t b = 0; b < own_v; ++b) {
      const int64_t row = u * width_u * taps_u + places_u[a], column = block * width_v * taps_v + places_v[b];
      T* corner = out + row * stride + column;
      if (moment.symmetric && (a > b || (a == b && u > v))) {
        const auto& terms = moment.terms[b * own_v + a];
        emit(moment, holder(v, u), sums, v, u, summed_draw, terms, weighted, corner, taps_v, stride * taps_u);
      } else {
        const auto& terms = moment.terms[a * own_v + b];
        emit(moment, holder(u, v), sums, u, v, summed_draw, terms, weighted, corner, stride * taps_u, taps_v);
        if (moment.mirrored)
          emit(moment, holder(u, v), sums, u, v, summed_draw, terms, weighted, out + column * stride + row, taps_u,
               stride * taps_v);
      }
      if (moment.symmetric && a == b && u == v) {
        const int64_t channels = moment.u->channels_of(u);
        for (int64_t i = 0; i < channels; ++i)
          for (int64_t j = 0; j < i; ++j)
            corner[(i * stride + j) * taps_u] = corner[(j * stride + i) * taps_u];
      }
    }
  }
}

// Σ_l ω(l) times what each tap of a source reads at l, for one draw: entry (channel, tap) goes to out[… · step].
template <class T>
void write_sums(const Source<T>& source, const Panels<T>& panels, const Window& window, const Taps& taps,
                const Weights& weights, int64_t draw, T* out, int64_t step) {
  const Pair apart = source.summed_size();
  const int64_t elements = apart[0] * apart[1] * source.width;
  const double* sums = panels.sums.data() + draw * source.channel_blocks * elements;
  for (int64_t tap = 0; tap < window.count(); ++tap) {
    std::vector<std::vector<std::pair<int64_t, double>>> read(2);  // positions and their weights
    for (int axis : {0, 1}) {
      const int64_t t = axis == 0 ? tap / window.taps[1] : tap % window.taps[1];
      for (size_t sample = 0; sample < weights[axis].size(); ++sample) {
        const int64_t position = window.position(axis, static_cast<int64_t>(sample), t);
        if (position >= 0 && position < source.size[axis]) read[axis].emplace_back(position, weights[axis][sample]);
      }
    }
    for (int64_t channel = 0; channel < source.channels; ++channel) {
      const double* sum = sums + channel / source.width * elements + channel % source.width;
      T& to = out[(channel * taps.all + taps.places[tap]) * step];
      if (source.lumped) {
        to = static_cast<T>(*sum);
        continue;
      }
      double value = 0;
      for (const auto& [y, wy] : read[0])
        for (const auto& [x, wx] : read[1]) value += wy * wx * sum[(y * source.size[1] + x) * source.width];
      to = static_cast<T>(value);
    }
  }
}

template <class T>
void write_bias(const Moment<T>& moment, const std::vector<Panels<T>>& panels, int64_t images) {
  const int64_t rows = moment.rows(), columns = moment.columns();
  for (int64_t draw = 0; draw <= moment.v->draws; ++draw) {
    T* out = moment.result(draw);
    if (out == nullptr) continue;
    if (moment.writes_row()) {
      T* row = out + (rows - 1) * columns;
      write_sums(*moment.v, panels[moment.v->index], moment.v_window, moment.v_taps, moment.weights, draw, row, 1);
      if (moment.symmetric || moment.mirrored)
        for (int64_t first = 0; first + 1 < rows; first += moment.v_taps.all)
          for (int64_t place : moment.v_taps.places) out[(first + place + 1) * columns - 1] = row[first + place];
    }
    if (moment.writes_column()) {
      Weights weights = moment.weights;
      if (!moment.u->weights[0].empty())  // patches carry them already
        for (auto& axis : weights) std::fill(axis.begin(), axis.end(), 1.0);
      write_sums(*moment.u, panels[moment.u->index], moment.u_window, moment.u_taps, weights, draw, out + columns - 1,
                 columns);
    }
    if (moment.u_bias && moment.v_bias) {
      double total[2] = {0, 0};
      for (int axis : {0, 1})
        for (double weight : moment.weights[axis]) total[axis] += weight;
      out[rows * columns - 1] = static_cast<T>(total[0] * total[1] * static_cast<double>(images));
    }
  }
}

void each(bool alone, int64_t n, const std::function<void(int64_t)>& body) {
  if (!alone) return parallel(n, body);
  for (int64_t i = 0; i < n; ++i) body(i);
}

// Notes that a moment reads the sums of a source: of all positions together, where it reads each of them alike.
template <class T>
void want_sums(Source<T>& source, const Window& window, const Weights& weights) {
  source.summed = true;
  const bool carried = !source.weights[0].empty();  // by patches
  for (int axis : {0, 1})
    for (double weight : weights[axis]) source.lumped &= carried || weight == 1;
  source.lumped &= window == Window{};
  for (int axis : {0, 1}) source.lumped &= static_cast<int64_t>(weights[axis].size()) == source.size[axis];
}

template <class T>
Schedule<T> schedule(std::vector<Moment<T>>& moments, int64_t images, int64_t of_one_sign, int64_t image_bytes,
                     bool together) {
  Schedule<T> plan;
  plan.items = split(moments);
  plan.sum_elements = place(plan.items);
  const int64_t bytes = plan.sum_elements * static_cast<int64_t>(sizeof(T));
  const double work = total_cost(plan.items) * static_cast<double>(images * kLanes<T> * kLanes<T>);
  // Powers of two, so that threads as many end together.
  const auto parts = [work](double each, int64_t least, int64_t most) {
    return std::clamp<int64_t>(std::bit_ceil(static_cast<uint64_t>(work / each)), least, most);
  };
  const int64_t few = parts(kPartWork, 1, kFewParts), wanted = parts(kLargePartWork, few, kMostParts);
  const int64_t possible = std::min(images, kPartSumBytes / (bytes + 1));
  plan.parts = possible >= few && !together ? std::min(wanted, possible) : 1;
  int64_t budget = kPartPanelBytes;
  if (plan.parts < few || together) {
    // Transforms are mixed once for all images at hand.
    const int64_t share = of_one_sign < images ? of_one_sign : images / 2;
    budget = std::max(kBatchPanelBytes + bytes / 2, together ? share * image_bytes : 0);
    plan.items = divide(plan.items, images);
    plan.sum_elements = place(plan.items);
  }
  const int64_t own = std::min((images + plan.parts - 1) / plan.parts, of_one_sign);  // of a part
  const int64_t most = std::clamp<int64_t>(budget / image_bytes, 1, own), times = (own + most - 1) / most;
  plan.images_at_once = (own + times - 1) / times;
  for (const Item<T>& item : plan.items) {
    auto& held = plan.held[item.moment];
    held.resize(item.moment->u->blocks * item.moment->v->blocks, nullptr);
    for (int64_t u = item.u0; item.part == 0 && u < item.u1; ++u)
      for (int64_t v = item.v0; v < item.v1; ++v) held[u * item.moment->v->blocks + v] = &item;
  }
  plan.order.resize(plan.items.size());
  std::iota(plan.order.begin(), plan.order.end(), size_t{0});
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](size_t a, size_t b) { return plan.items[a].cost > plan.items[b].cost; });
  return plan;
}

}  // namespace

template <class T>
void Batch<T>::sum_part(const Schedule<T>& plan, int64_t part, int64_t reach, std::vector<Panels<T>>& panels, T* sums) {
  const bool alone = plan.parts > 1;
  const int64_t begin = images * part / plan.parts, end = images * (part + 1) / plan.parts;
  for (const auto& source : sources) panels.push_back(source->reserve(plan.images_at_once, reach));
  if (begin == end) std::memset(sums, 0, plan.sum_elements * sizeof(T));
  for (int64_t first = begin, count; first < end; first += count) {
    count = std::min(plan.images_at_once, end - first);
    if (first < positive) count = std::min(count, positive - first);
    const int64_t set = !order.empty() && first >= positive;
    for (const auto& source : sources) {
      Panels<T>& own = panels[source->index];
      each(alone, source->pack_tasks(count), [&](int64_t task) { source->pack(own, first, count, task); });
      each(alone, source->sum_tasks(), [&](int64_t task) { source->add_sums(own, first, count, task); });
    }
    each(alone, static_cast<int64_t>(plan.items.size()), [&](int64_t i) {
      const Item<T>& item = plan.items[plan.order[i]];
      if (first == begin) std::memset(sums + item.start, 0, item.elements() * sizeof(T));
      multiply_item(item, panels, first, count, sums + item.start + set * item.set_elements());
    });
    if (!spectrum.empty())
      spectrum.add(panels, count, [&](const Moment<T>& moment, int64_t u, int64_t v, int64_t vector) {
        const Item<T>& item = *plan.holder(moment, u, v);
        const int64_t start = item.start + set * item.set_elements();
        return sums + start + item.offset(u, v, moment.groups[moment.transformed], vector);
      });
  }
}

template <class T>
void Batch<T>::run() {
  int64_t image_bytes = 1, reach = 0;
  for (auto& source : sources) {
    source->lay_out();
    source->index = &source - sources.data();
    image_bytes += source->blocks * source->pitch[0] * source->pitch[1] * source->width * sizeof(T);
  }
  for (Moment<T>& moment : moments) {
    std::vector<Moment<T>*> others;
    for (Moment<T>& other : moments)
      if (other.like == &moment - moments.data()) others.push_back(&other);
    if (moment.like < 0) moment.plan(others);
    if (moment.writes_row()) want_sums(*moment.v, moment.v_window, moment.weights);
    if (moment.writes_column()) want_sums(*moment.u, moment.u_window, moment.weights);
    for (const Group& group : moment.groups)
      for (int64_t shift : group.shifts) reach = std::max(reach, std::abs(shift));
  }
  const int64_t of_one_sign = order.empty() ? images : std::max(positive, images - positive);
  spectrum.take(moments, of_one_sign);
  const Schedule<T> plan = schedule(moments, std::max<int64_t>(images, 1), std::max<int64_t>(of_one_sign, 1),
                                    image_bytes, !spectrum.empty());
  const Buffer<T> sums = allocate<T>(plan.parts * plan.sum_elements);
  std::vector<std::vector<Panels<T>>> panels(plan.parts);
  each(plan.parts == 1, plan.parts, [&](int64_t part) {
    sum_part(plan, part, reach, panels[part], sums.get() + part * plan.sum_elements);
  });

  const auto add = [](auto* total, const auto* other, int64_t count) {
    for (int64_t i = 0; i < count; ++i) total[i] += other[i];
  };
  parallel(static_cast<int64_t>(plan.items.size()), [&](int64_t i) {
    const Item<T>& item = plan.items[i];
    for (int64_t part = 1; part < plan.parts; ++part)
      add(sums.get() + item.start, sums.get() + part * plan.sum_elements + item.start, item.elements());
    for (int64_t part = 1; item.part == 0 && part < item.parts; ++part)
      add(sums.get() + item.start, sums.get() + plan.items[i + part].start, item.elements());
    if (order.empty() || item.part > 0) return;
    T *positives = sums.get() + item.start, *negatives = positives + item.set_elements();
    for (int64_t e = 0; e < item.set_elements(); ++e) {
      const T positive_sum = positives[e], negative_sum = negatives[e];
      positives[e] = positive_sum + negative_sum;
      negatives[e] = positive_sum - negative_sum;
    }
  });
  for (int64_t part = 1; part < plan.parts; ++part)
    for (size_t source = 0; source < sources.size(); ++source)
      add(panels[0][source].sums.data(), panels[part][source].sums.data(),
          static_cast<int64_t>(panels[0][source].sums.size()));

  for (const Moment<T>& moment : moments) {
    const int64_t blocks = moment.v->blocks;
    const Moment<T>& summed = moment.like < 0 ? moment : moments[moment.like];
    const auto holder = [&](int64_t u, int64_t v) { return plan.holder(summed, u, v); };
    const int64_t pairs = moment.u->blocks * blocks;
    parallel(pairs * (1 + moment.summed_draws()), [&](int64_t task) {
      assemble(moment, sums.get(), task / pairs, task % pairs / blocks, task % pairs % blocks, holder);
    });
    write_bias(moment, panels[0], images);
  }
}

template struct Batch<float>;
template struct Batch<double>;

}  // namespace growkern
