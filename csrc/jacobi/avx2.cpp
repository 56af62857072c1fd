#include "lanes.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "lanes_kernel.h"
#include "tridiagonal_kernel.h"

namespace growkern {

const Lanes<float> avx2_float_lanes = lanes_table<float, 32>();
const Lanes<double> avx2_double_lanes = lanes_table<double, 32>();

}  // namespace growkern

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
