#include "plan.h"

#include <algorithm>
#include <numeric>

namespace growkern {
namespace {

// What gathering patches costs beside multiplying them, about.
constexpr double kGather = 1.3;
// Strides beyond, of samples or of half positions, make more sums than they save.
constexpr int64_t kFarthest = 2;

bool all_ones(const Weights& weights) {
  return std::all_of(weights.begin(), weights.end(), [](const std::vector<double>& axis) {
    return std::all_of(axis.begin(), axis.end(), [](double weight) { return weight == 1; });
  });
}

// What some taps of a window read at a stride: each position of a smaller map, every stride-th of the whole one.
struct Part {
  Map map;
  Window window;
  Taps taps;
};

// Along one axis: taps first, first + every, … of a window read positions of one remainder, the phase.
struct AxisPart {
  int64_t phase, first, every, taps, offset, step;
};

std::vector<AxisPart> parts_along(const Window& window, int axis) {
  const int64_t stride = window.stride[axis], every = stride / std::gcd(stride, window.step[axis]);
  std::vector<AxisPart> parts;
  for (int64_t first = 0; first < std::min(every, window.taps[axis]); ++first) {
    const int64_t read = window.offset[axis] + window.step[axis] * first, phase = (read % stride + stride) % stride;
    parts.push_back({phase, first, every, (window.taps[axis] - first + every - 1) / every, (read - phase) / stride,
                     window.step[axis] * every / stride});
  }
  return parts;
}

std::vector<Part> parts_of(const Map& map, const Window& window) {
  std::vector<Part> parts;
  for (const AxisPart& down : parts_along(window, 0)) {
    for (const AxisPart& along : parts_along(window, 1)) {
      Part part{map.every(window.stride, {down.phase, along.phase}), {}, {{}, window.count()}};
      part.window.taps = {down.taps, along.taps};
      part.window.offset = {down.offset, along.offset};
      part.window.step = {down.step, along.step};
      for (int64_t y = 0; y < down.taps; ++y)
        for (int64_t x = 0; x < along.taps; ++x)
          part.taps.places.push_back((down.first + y * down.every) * window.taps[1] + along.first + x * along.every);
      parts.push_back(std::move(part));
    }
  }
  return parts;
}

}  // namespace

Weights constant(const Pair& size, double value) {
  return {std::vector<double>(size[0], value), std::vector<double>(size[1], value)};
}

template <class T>
Source<T>* Planner<T>::whole(const Map& map, const Pair& apart) {
  for (auto& known : batch_.sources)
    if (!known->patches && known->map == map && known->apart == apart) return known.get();
  Source<T> source;
  source.map = map;
  source.apart = apart;
  for (int axis : {0, 1}) source.size[axis] = std::max<int64_t>(0, (map.size[axis] - 1) * apart[axis] + 1);
  source.channels = map.channels;
  batch_.sources.push_back(std::make_unique<Source<T>>(std::move(source)));
  return batch_.sources.back().get();
}

template <class T>
Source<T>* Planner<T>::patches(int map, const Window& window, const Weights& weights, const Pair& size) {
  const bool weighted = !all_ones(weights);
  for (auto& known : batch_.sources)
    if (known->patches && known->map == maps_[map] && known->window == window && known->size == size &&
        known->weights == (weighted ? weights : Weights{}))
      return known.get();
  Source<T> source;
  source.map = maps_[map];
  source.patches = true;
  source.window = window;
  if (weighted) source.weights = weights;
  source.size = source.pitch = size;
  source.channels = maps_[map].channels * window.count();
  batch_.sources.push_back(std::make_unique<Source<T>>(std::move(source)));
  return batch_.sources.back().get();
}

template <class T>
void Planner<T>::add(int u, const Window& u_window, bool u_bias, int v, const Window& v_window, bool v_bias,
                     const Weights& weights, T* out, T* null) {
  const bool symmetric = u == v && u_window == v_window;
  Moment<T> whole_moment{.weights = weights, .u_bias = u_bias, .v_bias = v_bias, .out = out, .null = null};
  const Pair size{static_cast<int64_t>(weights[0].size()), static_cast<int64_t>(weights[1].size())};
  const double gathered = (symmetric ? 0.5 : 1) * kGather * static_cast<double>(size[0] * size[1]) *
                          static_cast<double>(u_window.count() * v_window.count());
  bool near = true;
  for (int axis : {0, 1})
    for (const Window* window : {&u_window, &v_window})
      near &= window->stride[axis] <= kFarthest && window->divisor[axis] <= kFarthest;
  std::vector<Moment<T>> moments;
  double cost = 0;
  const std::vector<Part> u_parts = near ? parts_of(maps_[u], u_window) : std::vector<Part>{};
  const std::vector<Part> v_parts = near ? parts_of(maps_[v], v_window) : std::vector<Part>{};
  for (size_t i = 0; i < u_parts.size(); ++i) {
    for (size_t j = symmetric ? i : 0; j < v_parts.size(); ++j) {
      Moment<T> moment = whole_moment;
      // Where a window reads every half position, positions of the map are put apart.
      moment.u = whole(u_parts[i].map, u_window.divisor);
      moment.v = whole(v_parts[j].map, v_window.divisor);
      moment.u_window = u_parts[i].window;
      moment.v_window = v_parts[j].window;
      moment.u_taps = u_parts[i].taps;
      moment.v_taps = v_parts[j].taps;
      moment.symmetric = symmetric && i == j;
      moment.mirrored = symmetric && i != j;
      cost += correlation_cost(moment);
      moments.push_back(std::move(moment));
    }
  }
  if (!near || cost > gathered) {
    moments.assign(1, whole_moment);
    moments[0].u = patches(u, u_window, weights, size);
    moments[0].v = patches(v, v_window, constant(size, 1), size);
    moments[0].u_taps = moments[0].v_taps = {{0}, 1};
    moments[0].symmetric = symmetric;
  }
  for (Moment<T>& moment : moments) {
    for (const Moment<T>& known : batch_.moments)
      if (known.like < 0 && known.u == moment.u && known.v == moment.v && known.u_window == moment.u_window &&
          known.v_window == moment.v_window && known.symmetric == moment.symmetric && known.mirrored == moment.mirrored)
        moment.like = &known - batch_.moments.data();
    batch_.moments.push_back(std::move(moment));
  }
}

// Zeros enough that no shift reaches from one row or image into the next; what is shifted against each other has one
// pitch.
template <class T>
void Planner<T>::set_pitches() {
  for (auto& source : batch_.sources)
    if (!source->patches) source->pitch = {1, 1};
  for (bool changed = true; changed;) {
    changed = false;
    for (Moment<T>& moment : batch_.moments) {
      if (moment.u->patches) continue;
      for (int axis : {0, 1}) {
        const Pair shifts = shift_range(moment.u_window, moment.v_window, axis);
        const int64_t u_size = moment.u->size[axis], v_size = moment.v->size[axis];
        int64_t &u_pitch = moment.u->pitch[axis], &v_pitch = moment.v->pitch[axis];
        const int64_t pitch = std::max({u_pitch, v_pitch, u_size, v_size, v_size - shifts[0], u_size + shifts[1]});
        changed |= u_pitch != pitch || v_pitch != pitch;
        u_pitch = v_pitch = pitch;
      }
    }
  }
}

template <class T>
void Planner<T>::set_signs(const T* signs, int64_t draws) {
  signs_ = signs;
  draws_ = draws;
}

template <class T>
void Planner<T>::run() {
  set_pitches();
  const auto is_sign = [](T value) { return value == 1 || value == -1; };
  if (draws_ == 1 && std::all_of(signs_, signs_ + batch_.images, is_sign)) {
    const auto positive = [this](int64_t image) { return signs_[image] > 0; };
    batch_.order.resize(batch_.images);
    std::iota(batch_.order.begin(), batch_.order.end(), int64_t{0});
    const auto others = std::stable_partition(batch_.order.begin(), batch_.order.end(), positive);
    batch_.positive = others - batch_.order.begin();
    for (auto& source : batch_.sources) source->order = batch_.order.data();
  }
  for (Moment<T>& moment : batch_.moments) {
    if (!(moment.v->map == maps_[2])) continue;
    moment.v->signs = signs_;
    moment.v->draws = draws_;
    // The row of a matrix is not worth its own sums.
    moment.v->copied = draws_ > 0 && batch_.order.empty() && moment.u->is_matrix() && moment.v->is_matrix();
  }
  // Of the sources those that were only considered are not packed.
  std::erase_if(batch_.sources, [&](const auto& source) {
    return std::none_of(batch_.moments.begin(), batch_.moments.end(),
                        [&](const Moment<T>& moment) { return moment.u == source.get() || moment.v == source.get(); });
  });
  batch_.run();
}

template class Planner<float>;
template class Planner<double>;

ConvWindows::ConvWindows(const Geometry& producer, const Geometry& consumer, bool full, const Pair& hidden,
                         const Pair& outputs)
    : ones(constant(outputs, 1)) {
  x.taps = producer.kernel;
  x.step = producer.dilation;
  h.taps = consumer.kernel;
  h.step = consumer.dilation;
  h.stride = consumer.stride;
  for (int axis : {0, 1}) {
    h.offset[axis] = -consumer.padding[axis];
    if (full) {
      x.stride[axis] = producer.stride[axis];
      x.offset[axis] = -producer.padding[axis];
      // Tap t at output o reads hidden position i: o = (i + padding − dilation·t) / stride.
      target.taps[axis] = consumer.kernel[axis];
      target.offset[axis] = consumer.padding[axis];
      target.step[axis] = -consumer.dilation[axis];
      target.divisor[axis] = consumer.stride[axis];
      xv[axis].assign(hidden[axis], 1);
      xx[axis].assign(hidden[axis], 0);
      for (int64_t output = 0; output < outputs[axis]; ++output) {
        for (int64_t tap = 0; tap < consumer.kernel[axis]; ++tap) {
          const int64_t position = h.position(axis, output, tap);
          if (position >= 0 && position < hidden[axis]) ++xx[axis][position];
        }
      }
    } else {
      const int64_t centre = consumer.dilation[axis] * (consumer.kernel[axis] / 2) - consumer.padding[axis];
      x.stride[axis] = producer.stride[axis] * consumer.stride[axis];
      x.offset[axis] = producer.stride[axis] * centre - producer.padding[axis];
      xx[axis].assign(outputs[axis], 0);
      for (int64_t output = 0; output < outputs[axis]; ++output) {
        const int64_t position = consumer.stride[axis] * output + centre;
        if (position >= 0 && position < hidden[axis]) xx[axis][output] = 1;
      }
      xv[axis] = xx[axis];
    }
  }
}

}  // namespace growkern
