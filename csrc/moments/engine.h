// Runs moments over a batch: pack some images, multiply, and in the end assemble the results.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "spectrum.h"

namespace growkern {

// Some blocks of u by some blocks of v over a part of the images.
template <class T>
struct Item {
  Moment<T>* moment;
  int64_t u0, u1, v0, v1;
  int64_t part, parts;
  double cost;      // panel products of one image
  // Of its sums: [set][block of u][group][block of v][shift][kLanes][kLanes]. A set is a draw, 0 for none, or of one
  // draw at first the images of one sign.
  int64_t start;

  int64_t set_elements() const { return (u1 - u0) * (v1 - v0) * moment->sums * kLanes<T> * kLanes<T>; }
  int64_t elements() const { return set_elements() * moment->sets(); }
  // Of one sum, from that of the first block of u.
  int64_t offset(int64_t u, int64_t v, const Group& group, int64_t vector) const {
    const int64_t shifts = static_cast<int64_t>(group.shifts.size());
    const int64_t before = ((u - u0) * moment->sums + group.first) * (v1 - v0);
    return (before + (v - v0) * shifts + vector) * kLanes<T> * kLanes<T>;
  }
};

// How the work is shared. Few sums: parts of the batch, each with panels and sums of its own, next to each other
// in time and in the cache. Many sums: one part, whose items are shared.
template <class T>
struct Schedule {
  std::vector<Item<T>> items;
  std::vector<size_t> order;  // the most expensive item first, so that threads end together
  int64_t parts, images_at_once, sum_elements;
  std::map<const Moment<T>*, std::vector<const Item<T>*>> held;

  // The item that has the sums of two blocks, or the first of them; none where nothing is summed.
  const Item<T>* holder(const Moment<T>& moment, int64_t u, int64_t v) const {
    const auto found = held.find(&moment);
    return found == held.end() ? nullptr : found->second[u * moment.v->blocks + v];
  }
};

template <class T>
struct Batch {
  int64_t images;
  std::vector<int64_t> order;  // of the images under one draw: those of sign 1 first
  int64_t positive = 0;        // how many these are
  std::vector<std::unique_ptr<Source<T>>> sources;
  std::vector<Moment<T>> moments;
  Spectrum<T> spectrum;

  void run();

 private:
  void sum_part(const Schedule<T>& plan, int64_t part, int64_t reach, std::vector<Panels<T>>& panels, T* sums);
};

}  // namespace growkern
