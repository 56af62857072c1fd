#include "lanes.h"

#include "lanes_kernel.h"
#include "tridiagonal_kernel.h"

namespace growkern {

const Lanes<float> portable_float_lanes = lanes_table<float, 16>();
const Lanes<double> portable_double_lanes = lanes_table<double, 16>();

}  // namespace growkern
