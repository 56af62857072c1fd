// How the ops of growkern_cuda start kernels: on the device of a tensor, in torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace growkern {

void check(cudaError_t error);

class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor);

  // Shared memory that one block may have; more than 48 KB only on request.
  int64_t shared_bytes() const;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, Arguments... arguments) const {
    if (shared > (48 << 10))
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    kernel<<<grid, threads, shared, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <class T>
T* data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* const_data(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace growkern
