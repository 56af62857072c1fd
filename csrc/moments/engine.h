// Runs moments over a batch: pack some images, multiply, and in the end assemble the results.
#pragma once

#include <memory>
#include <vector>

#include "correlation.h"

namespace growkern {

template <class T>
struct Batch {
  int64_t images;
  std::vector<std::unique_ptr<Source<T>>> sources;
  std::vector<Moment<T>> moments;

  void run();
};

}  // namespace growkern
