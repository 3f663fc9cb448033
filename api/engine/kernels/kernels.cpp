// The operations of a model in bfloat16 on a CPU with AVX512_BF16: matrix products and attention with that instruction,
// and each operation between them in one sweep over its rows where torch needs several, so that the OpenMP threads do
// not fall asleep in between.
//
// Compiled by build.py, called by operations.py. Numbers are computed in float32 and rounded where torch rounds them.
// Arguments are checked before anything is computed (checks.h); no parallel region allocates memory or throws.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "products.h"

namespace {

using at::Tensor;
using glm::bf16;

constexpr int64_t ROWS_EACH = 4;  // at least, for each thread: fewer do not pay for waking it

inline float wide(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline bf16 narrow(float number) {  // to nearest, ties to even; NaN is not handled
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  bits += 0x7FFF + ((bits >> 16) & 1);
  return bf16(static_cast<uint16_t>(bits >> 16), bf16::from_bits());
}

inline float rounded(float number) { return wide(narrow(number)); }

inline float norm_scale(float squares, int64_t size, double eps) {
  return 1 / std::sqrt(squares / size + static_cast<float>(eps));
}

void check_norm(const Tensor& weight, int64_t size, const char* operation) {
  glm::check_bf16(weight, 1, operation, "the norm's weight");
  glm::check_size(weight, 0, size, operation, "the norm's weight");
}

// rms_norm(x, weight) of x [rows, size].
Tensor norm(const Tensor& x, const Tensor& weight, double eps) {
  glm::check_bf16(x, 2, "norm", "x");
  const int64_t size = x.size(1);
  check_norm(weight, size, "norm");
  Tensor normed = at::empty_like(x);
  const bf16 *from = x.const_data_ptr<bf16>(), *weights = weight.const_data_ptr<bf16>();
  bf16* to = normed.data_ptr<bf16>();
  at::parallel_for(0, x.size(0), ROWS_EACH, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * size; at < end * size; at += size) {
      const bf16* __restrict r = from + at;
      bf16* __restrict n = to + at;
      float squares = 0;
      for (int64_t i = 0; i < size; ++i) squares += wide(r[i]) * wide(r[i]);
      const float scale = norm_scale(squares, size, eps);
      for (int64_t i = 0; i < size; ++i) n[i] = narrow(wide(r[i]) * scale * wide(weights[i]));
    }
  });
  return normed;
}

// sum = x + rms_norm(delta, delta_norm), normed = rms_norm(sum, next_norm); x and delta [rows, size].
std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& delta, const Tensor& delta_norm,
                                    const Tensor& next_norm, double eps) {
  glm::check_bf16(x, 2, "add_norm", "x");
  glm::check_bf16(delta, 2, "add_norm", "delta");
  const int64_t rows = x.size(0), size = x.size(1);
  glm::check_size(delta, 0, rows, "add_norm", "delta");
  glm::check_size(delta, 1, size, "add_norm", "delta");
  check_norm(delta_norm, size, "add_norm");
  check_norm(next_norm, size, "add_norm");
  Tensor sum = at::empty_like(x), normed = at::empty_like(x);
  const bf16 *xs = x.const_data_ptr<bf16>(), *deltas = delta.const_data_ptr<bf16>();
  const bf16 *delta_weight = delta_norm.const_data_ptr<bf16>(), *next_weight = next_norm.const_data_ptr<bf16>();
  bf16 *sums = sum.data_ptr<bf16>(), *norms = normed.data_ptr<bf16>();
  at::parallel_for(0, rows, ROWS_EACH, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * size; at < end * size; at += size) {
      const bf16 *__restrict d = deltas + at, *__restrict r = xs + at;
      bf16 *__restrict s = sums + at, *__restrict n = norms + at;
      float squares = 0;
      for (int64_t i = 0; i < size; ++i) squares += wide(d[i]) * wide(d[i]);
      const float delta_scale = norm_scale(squares, size, eps);
      squares = 0;
      for (int64_t i = 0; i < size; ++i) {
        s[i] = narrow(wide(r[i]) + rounded(wide(d[i]) * delta_scale * wide(delta_weight[i])));
        squares += wide(s[i]) * wide(s[i]);
      }
      const float next_scale = norm_scale(squares, size, eps);
      for (int64_t i = 0; i < size; ++i) n[i] = narrow(wide(s[i]) * next_scale * wide(next_weight[i]));
    }
  });
  return {sum, normed};
}

// Rotates queries and keys of qkv [rows, heads + 2 * kv_heads, dim] in place, and copies keys and values to the rows
// `slot_mapping` of kv [tokens, 2 * kv_heads, dim]. cos and sin [rows, heads + 2 * kv_heads, dim]; sin carries the sign of
// the swapped half.
void rotate_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& kv, const Tensor& slot_mapping) {
  glm::check_qkv(qkv, kv, "rotate_store");
  for (const Tensor* table : {&cos, &sin}) {
    glm::check_bf16(*table, 3, "rotate_store", "cos and sin");
    TORCH_CHECK(table->sizes() == qkv.sizes(), "rotate_store: cos and sin must be ", qkv.sizes(), ". Given: ", table->sizes());
  }
  glm::check_tensor(slot_mapping, at::kLong, 1, "rotate_store", "slot_mapping");
  glm::check_size(slot_mapping, 0, qkv.size(0), "rotate_store", "slot_mapping");
  glm::check_range(slot_mapping, 0, kv.size(0), "rotate_store", "slot_mapping");
  const int64_t rows = qkv.size(0), heads = qkv.size(1), dim = qkv.size(2), half = dim / 2, stored = kv.size(1);
  const int64_t rotated = heads - stored / 2;
  bf16 *x = qkv.data_ptr<bf16>(), *pool = kv.data_ptr<bf16>();
  const bf16 *all_cos = cos.const_data_ptr<bf16>(), *all_sin = sin.const_data_ptr<bf16>();
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  at::parallel_for(0, rows, ROWS_EACH, [&](int64_t begin, int64_t end) {
    float swapped[glm::MAX_DIM];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t at = row * heads * dim; at < (row * heads + rotated) * dim; at += dim) {
        bf16* __restrict h = x + at;
        const bf16 *__restrict c = all_cos + at, *__restrict s = all_sin + at;
        for (int64_t i = 0; i < half; ++i) swapped[i] = wide(h[i + half]);
        for (int64_t i = 0; i < half; ++i) swapped[i + half] = wide(h[i]);
        for (int64_t i = 0; i < dim; ++i) h[i] = narrow(rounded(wide(h[i]) * wide(c[i])) + swapped[i] * wide(s[i]));
      }
      std::copy_n(x + (row + 1) * heads * dim - stored * dim, stored * dim, pool + slots[row] * stored * dim);
    }
  });
}

// A product of few rows by the panels, one of more than `limit` rows by oneDNN, as ChosenLinear computes it. `packed` or
// `onednn` is empty where it is never used.
struct Matrix {
  const Tensor &packed, &onednn;
  int64_t limit;
};

Tensor onednn_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using Product = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto operation =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Product>();
  return operation.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor multiply(const Tensor& x, const Matrix& matrix, const std::optional<Tensor>& bias) {
  return x.size(0) > matrix.limit ? onednn_product(x, matrix.onednn, bias) : glm::product(x, matrix.packed, bias);
}

Tensor multiply_gated(const Tensor& x, const Matrix& matrix) {
  if (x.size(0) <= matrix.limit) return glm::gated_product(x, matrix.packed);
  const std::vector<Tensor> halves = onednn_product(x, matrix.onednn, std::nullopt).chunk(2, -1);
  return at::silu(halves[0]).mul_(halves[1]);
}

// All layers of the text model in one call, like Decoder._run_layers, but without waiting for Python's lock in between.
// `weights` are nine for each layer, in the order of their use. `onednn` and `limits` are four for each layer, one for each
// matrix. Each group of rows, one for each AttentionMetadata, ends at `ends`; those without `lengths` are prefill. -> the
// normed rows `logits_indices` [rows, hidden].
Tensor run_layers(const Tensor& inputs, const Tensor& first_norm, at::TensorList weights, at::TensorList onednn,
                  at::IntArrayRef limits, at::TensorList kv,
                  const Tensor& cos, const Tensor& sin, const Tensor& slot_mapping, at::IntArrayRef ends,
                  at::TensorList pages, at::TensorList lengths, at::IntArrayRef firsts,
                  const std::optional<Tensor>& logits_indices, double eps) {
  TORCH_CHECK(weights.size() == 9 * kv.size() && onednn.size() == 4 * kv.size() && limits.size() == onednn.size(),
              "run_layers: ", weights.size(), " weights for ", kv.size(), " layers");
  TORCH_CHECK(!ends.empty() && ends.size() == pages.size() && ends.size() == lengths.size() && ends.size() == firsts.size() &&
                  std::is_sorted(ends.begin(), ends.end()) && ends[0] > 0 && ends.back() == inputs.size(0),
              "run_layers: the groups do not fit ", inputs.sizes());
  Tensor x = inputs, normed = norm(x, first_norm, eps);
  for (size_t layer = 0; layer < kv.size(); ++layer) {
    const Tensor *w = &weights[9 * layer], *o = &onednn[4 * layer];
    const int64_t* limit = &limits[4 * layer];
    const auto bias = w[1].numel() ? std::optional<Tensor>(w[1]) : std::nullopt;
    Tensor qkv = multiply(normed, {w[0], o[0], limit[0]}, bias).view_as(cos);
    rotate_store(qkv, cos, sin, kv[layer], slot_mapping);
    std::vector<Tensor> groups;
    for (size_t i = 0; i < ends.size(); ++i) {
      const Tensor rows = qkv.slice(0, i ? ends[i - 1] : 0, ends[i]);
      groups.push_back(lengths[i].numel() ? glm::attend_decode(rows, kv[layer], pages[i], lengths[i])
                                          : glm::attend_prefill(rows, kv[layer], pages[i], firsts[i]));
    }
    Tensor attended = groups.size() == 1 ? groups[0] : at::cat(groups);
    if (logits_indices && layer + 1 == kv.size()) {
      if (!logits_indices->numel()) return at::empty({0, x.size(1)}, x.options());
      x = x.index_select(0, *logits_indices), attended = attended.index_select(0, *logits_indices);
    }
    std::tie(x, normed) = add_norm(x, multiply(attended, {w[2], o[1], limit[1]}, std::nullopt), w[3], w[4], eps);
    const Tensor hidden = multiply_gated(normed, {w[5], o[2], limit[2]});
    const Tensor delta = multiply(hidden, {w[6], o[3], limit[3]}, std::nullopt);
    std::tie(x, normed) = add_norm(x, delta, w[7], w[8], eps);
  }
  return normed;
}

// A block of the vision encoder before and after attention, like VisionEncoder._run. `onednn` and `limits` as in run_layers.
Tensor begin_block(const Tensor& inputs, const Tensor& norm1, const Tensor& qkv, const Tensor& onednn, int64_t limit,
                   const std::optional<Tensor>& bias, double eps) {
  return multiply(norm(inputs, norm1, eps), {qkv, onednn, limit}, bias);
}

Tensor end_block(const Tensor& inputs, const Tensor& attended, const Tensor& norm2, at::TensorList packed,
                 at::TensorList onednn, at::IntArrayRef limits, double eps) {
  TORCH_CHECK(packed.size() == 3 && onednn.size() == 3 && limits.size() == 3, "end_block: ", packed.size(), " matrices");
  const Tensor x = at::add(inputs, multiply(attended, {packed[0], onednn[0], limits[0]}, std::nullopt));
  const Tensor hidden = multiply_gated(norm(x, norm2, eps), {packed[1], onednn[1], limits[1]});
  return at::add(x, multiply(hidden, {packed[2], onednn[2], limits[2]}, std::nullopt));
}

}  // namespace

TORCH_LIBRARY(glm, library) {
  library.def("add_norm(Tensor x, Tensor delta, Tensor delta_norm, Tensor next_norm, float eps) -> (Tensor, Tensor)");
  library.def("rotate_store(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor(b!) kv, Tensor slot_mapping) -> ()");
  library.def("attend_decode(Tensor qkv, Tensor kv, Tensor pages, Tensor lengths) -> Tensor");
  library.def("attend_prefill(Tensor qkv, Tensor kv, Tensor pages, int first) -> Tensor");
  library.def("attend_image(Tensor qkv, Tensor cos, Tensor sin, int frames, int heads) -> Tensor");
  library.def("pack(Tensor weight, bool gated) -> Tensor");
  library.def("product(Tensor x, Tensor packed, Tensor? bias) -> Tensor");
  library.def("gated_product(Tensor x, Tensor packed) -> Tensor");
  library.def(
      "run_layers(Tensor inputs, Tensor first_norm, Tensor[] weights, Tensor[] onednn, int[] limits, Tensor(a!)[] kv, "
      "Tensor cos, Tensor sin, Tensor slot_mapping, int[] ends, Tensor[] pages, Tensor[] lengths, int[] firsts, Tensor? logits_indices, float eps) "
      "-> Tensor");
  library.def(
      "begin_block(Tensor inputs, Tensor norm1, Tensor qkv, Tensor onednn, int limit, Tensor? bias, float eps) -> Tensor");
  library.def(
      "end_block(Tensor inputs, Tensor attended, Tensor norm2, Tensor[] packed, Tensor[] onednn, int[] limits, float eps) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(glm, CPU, library) {
  library.impl("add_norm", add_norm);
  library.impl("rotate_store", rotate_store);
  library.impl("attend_decode", glm::attend_decode);
  library.impl("attend_prefill", glm::attend_prefill);
  library.impl("attend_image", glm::attend_image);
  library.impl("pack", glm::pack);
  library.impl("product", glm::product);
  library.impl("gated_product", glm::gated_product);
  library.impl("run_layers", run_layers);
  library.impl("begin_block", begin_block);
  library.impl("end_block", end_block);
}

// For calls with weights that are packed for oneDNN among the arguments.
TORCH_LIBRARY_IMPL(glm, MkldnnCPU, library) {
  library.impl("run_layers", run_layers);
  library.impl("begin_block", begin_block);
  library.impl("end_block", end_block);
}
