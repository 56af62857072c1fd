#pragma once

#include <cstdint>
#include <functional>

namespace growkern {

// Runs body(0) … body(n − 1) on torch's threads, in no fixed order.
void parallel(int64_t n, const std::function<void(int64_t)>& body);

}  // namespace growkern
