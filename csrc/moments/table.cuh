// Tables that tell blocks what to do. Free of torch.
#pragma once

namespace growkern {

// The row that this block belongs to: the last one whose first program is not after it.
template <class Row>
__device__ const Row& row_of(const Row* rows, int count) {
  int row = 0, after = count;
  while (after - row > 1) {
    const int middle = (row + after) / 2;
    (rows[middle].first_program <= blockIdx.x ? row : after) = middle;
  }
  return rows[row];
}

}  // namespace growkern
