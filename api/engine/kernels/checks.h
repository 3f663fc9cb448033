// Checks of the operations' arguments. They run before any parallel region, because nothing may throw inside one.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace glm {

using at::Tensor;

// Requires a contiguous CPU tensor of `dims` dimensions.
inline void check_tensor(const Tensor& tensor, at::ScalarType type, int64_t dims, const char* operation, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == type && tensor.dim() == dims && tensor.is_contiguous(),
              operation, ": ", name, " must be a contiguous CPU tensor of ", type, " with ", dims, " dimensions. Given: ",
              tensor.scalar_type(), " ", tensor.sizes(), tensor.is_contiguous() ? "" : ", not contiguous");
}

inline void check_bf16(const Tensor& tensor, int64_t dims, const char* operation, const char* name) {
  check_tensor(tensor, at::kBFloat16, dims, operation, name);
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* operation, const char* name) {
  TORCH_CHECK(tensor.size(dim) == size, operation, ": dimension ", dim, " of ", name, " must be ", size, ". Given: ", tensor.sizes());
}

// Requires numbers from `least` to `end` - 1: page numbers, slots and lengths must stay within their tensors.
inline void check_range(const Tensor& numbers, int64_t least, int64_t end, const char* operation, const char* name) {
  const int64_t* number = numbers.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < numbers.numel(); ++i)
    TORCH_CHECK(number[i] >= least && number[i] < end, operation, ": ", name, " must be >= ", least, " and < ", end,
                ". Given: ", number[i]);
}

}  // namespace glm
