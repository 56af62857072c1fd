// Fewer multiplications for the sums of a moment over all positions, after Winograd and Karatsuba.
//
// Sums at neighbouring shifts share factors: of S_d = Σ_t u(t) v(t + d), two neighbouring t and three shifts take
// four products of sums and differences of neighbours instead of six, and two shifts take three instead of four. Only
// factors of 1, −1 and ½ occur, so that little precision is lost. In two dimensions the savings multiply.
#pragma once

#include "correlation.h"

namespace growkern {

// Has the sums of a moment over all positions mixed from products of planes, where that pays.
template <class T>
void use_planes(Moment<T>& moment);

}  // namespace growkern
