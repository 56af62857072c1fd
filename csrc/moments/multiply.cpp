#include "multiply.h"

#include <algorithm>

namespace growkern {
namespace {

// Positions summed in a register at once, unless a row has more: rounding grows with the chain of additions.
constexpr int64_t kChain = 128;
// Images whose sums wait to be added up under all draws at once.
constexpr int64_t kSignedImages = 8;

// The longest loop innermost, and loops over adjacent memory made one.
Walk compact(Walk walk) {
  for (int pass = 0; pass < 2; ++pass) {
    for (int k = 2; k > 0; --k) {
      const bool adjacent =
          walk.a[k - 1] == walk.a[k] * walk.count[k] && walk.b[k - 1] == walk.b[k] * walk.count[k];
      if (walk.count[k] == 1 || walk.count[k - 1] == 1 || adjacent) {
        if (walk.count[k] == 1) {
          walk.a[k] = walk.a[k - 1];
          walk.b[k] = walk.b[k - 1];
        }
        walk.count[k] *= walk.count[k - 1];
        walk.count[k - 1] = 1;
      }
    }
  }
  return walk;
}

// Adds the sums of one group over `count` images to those of an item.
template <class T>
void multiply_group(const Item<T>& item, const Group& group, const std::vector<Panels<T>>& panels, int64_t first,
                    int64_t count, T* sums, std::vector<const T*>& right) {
  const Source<T>&u = *item.moment->u, &v = *item.moment->v;
  const Panels<T>&u_panels = panels[u.index], &v_panels = panels[v.index];
  right.clear();
  for (int64_t block = item.v0; block < item.v1; ++block)
    for (int64_t shift : group.shifts)
      right.push_back(v_panels.first + block * v_panels.block_elements + shift * v.width);
  const auto [row0, down, rows] = run_of(group.row, u.size[0]);
  const auto [column0, along, columns] = run_of(group.column, u.size[1]);
  const int64_t image_step = std::max<int64_t>(1, kChain / (rows * columns));
  const int64_t row_step = std::max<int64_t>(1, kChain / columns);
  for (int64_t image = first; image < first + count; image += image_step) {
    for (int64_t row = 0; row < rows; row += row_step) {
      const int64_t images = std::min(image_step, first + count - image);
      const int64_t position = (row0 + row * down) * u.pitch[1] + column0;
      const Walk walk = compact({{images, std::min(row_step, rows - row), columns},
                                 {u.image_elements(), down * u.pitch[1] * u.width, along * u.width},
                                 {v.image_elements(), down * v.pitch[1] * v.width, along * v.width}});
      const T* left = u_panels.first + image * u.image_elements() + position * u.width;
      const int64_t shift = image * v.image_elements() + position * v.width;
      for (int64_t block = item.u0; block < item.u1; ++block) {
        // Of a symmetric moment of single taps, the blocks below the diagonal are not needed.
        const int64_t v0 = item.moment->upper() ? std::max(item.v0, block) : item.v0;
        const int64_t skipped = (v0 - item.v0) * static_cast<int64_t>(group.shifts.size());
        kernels<T>().multiply(walk, left + block * u_panels.block_elements, u.channels_of(block),
                              right.data() + skipped, shift, static_cast<int64_t>(right.size()) - skipped,
                              {sums + item.offset(block, v0, group, 0)});
      }
    }
  }
}

// Adds the sums of `count` images, one after the other, under every draw. The first is number `first` of the batch.
template <class T>
void add_signed(const Item<T>& item, const std::vector<T>& sums, int64_t first, int64_t count, T* totals) {
  const Source<T>& v = *item.moment->v;
  const int64_t rows = v.sign_rows(), elements = item.set_elements();
  std::vector<T> signs(kSignedImages * rows, T{0});
  for (int64_t image = 0; image < count; ++image) {
    signs[image * rows] = 1;
    for (int64_t draw = 0; draw < v.draws; ++draw)
      signs[image * rows + 1 + draw] = v.signs[draw * v.map.images + first + image];
  }
  std::vector<const T*> parts(elements / kLanes<T>);
  for (size_t i = 0; i < parts.size(); ++i) parts[i] = sums.data() + i * kLanes<T>;
  kernels<T>().multiply({{1, 1, count}, {0, 0, rows}, {0, 0, elements}}, signs.data(), rows, parts.data(), 0,
                        static_cast<int64_t>(parts.size()), {totals, kLanes<T>, elements});
}

}  // namespace

template <class T>
void multiply_item(const Item<T>& item, const std::vector<Panels<T>>& panels, int64_t number, int64_t count, T* sums) {
  const Moment<T>& moment = *item.moment;
  const int64_t begin = count * item.part / item.parts, end = count * (item.part + 1) / item.parts;
  const bool alone = moment.image_by_image();
  const int64_t positions = moment.u->pitch[0] * moment.u->pitch[1];
  const int64_t step = alone ? 1 : std::max<int64_t>(1, kGroupRows / positions);
  const int64_t elements = alone ? item.set_elements() : 0;
  std::vector<const T*> right;
  std::vector<T> waiting(kSignedImages * elements);
  for (int64_t image = begin; image < end; image += step) {
    T* target = sums;
    const int64_t place = (image - begin) % kSignedImages;
    if (alone) {
      target = waiting.data() + place * elements;
      std::fill(target, target + elements, T{0});
    }
    const int64_t images = std::min(step, end - image);
    for (const Group& group : moment.groups)
      if (&group - moment.groups.data() != moment.transformed)
        multiply_group(item, group, panels, image, images, target, right);
    if (alone && (place + 1 == kSignedImages || image + 1 == end))
      add_signed(item, waiting, number + image - place, place + 1, sums);
  }
}

template void multiply_item<float>(const Item<float>&, const std::vector<Panels<float>>&, int64_t, int64_t, float*);
template void multiply_item<double>(const Item<double>&, const std::vector<Panels<double>>&, int64_t, int64_t, double*);

}  // namespace growkern
