// The products of one item.
#pragma once

#include <vector>

#include "engine.h"

namespace growkern {

// Adds the sums of `count` packed images, of which the first is number `number` of the batch, to those of an item, or
// to one set of them.
template <class T>
void multiply_item(const Item<T>& item, const std::vector<Panels<T>>& panels, int64_t number, int64_t count, T* sums);

}  // namespace growkern
