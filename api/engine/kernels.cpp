// The operations between the matrix products of a decoder layer, in bfloat16 on the CPU: each in one sweep over its
// rows, where torch needs several, so that the threads which multiply do not fall asleep in between.
//
// Compiled and called by kernels.py. Numbers are computed in float32 and rounded where torch rounds them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "products.h"

namespace {

using at::Tensor;
using bf16 = c10::BFloat16;

constexpr int64_t PAGE = 16;       // tokens in a page of the KV cache
constexpr int64_t MOST_DIM = 256;  // of a head
constexpr int64_t ROWS_EACH = 4;   // fewer are not worth waking a thread

inline float wide(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline bf16 narrow(float number) {  // to nearest, ties to even; nothing here is a NaN unless all is lost anyway
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  bits += 0x7FFF + ((bits >> 16) & 1);
  return bf16(static_cast<uint16_t>(bits >> 16), bf16::from_bits());
}

inline float rounded(float number) { return wide(narrow(number)); }

// sum = x + rms_norm(part, after), normed = rms_norm(sum, before); x and part [rows, size].
std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& part, const Tensor& after, const Tensor& before,
                                    double eps) {
  const int64_t rows = x.size(0), size = x.size(1);
  Tensor sum = at::empty_like(x), normed = at::empty_like(x);
  const bf16 *xs = x.const_data_ptr<bf16>(), *parts = part.const_data_ptr<bf16>();
  const bf16 *after_weight = after.const_data_ptr<bf16>(), *before_weight = before.const_data_ptr<bf16>();
  bf16 *sums = sum.data_ptr<bf16>(), *norms = normed.data_ptr<bf16>();
  at::parallel_for(0, rows, ROWS_EACH, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * size; at < end * size; at += size) {
      const bf16 *__restrict p = parts + at, *__restrict r = xs + at;
      bf16 *__restrict s = sums + at, *__restrict n = norms + at;
      float squares = 0;
      for (int64_t i = 0; i < size; ++i) squares += wide(p[i]) * wide(p[i]);
      const float after_scale = 1 / std::sqrt(squares / size + static_cast<float>(eps));
      squares = 0;
      for (int64_t i = 0; i < size; ++i) {
        s[i] = narrow(wide(r[i]) + rounded(wide(p[i]) * after_scale * wide(after_weight[i])));
        squares += wide(s[i]) * wide(s[i]);
      }
      const float before_scale = 1 / std::sqrt(squares / size + static_cast<float>(eps));
      for (int64_t i = 0; i < size; ++i) n[i] = narrow(wide(s[i]) * before_scale * wide(before_weight[i]));
    }
  });
  return {sum, normed};
}

// Turn queries and keys of qkv [rows, heads + 2 * kv_heads, dim] where they are, and copy keys and values to `places`
// of kv [tokens, 2 * kv_heads, dim]. cos and sin [rows, heads + 2 * kv_heads, dim]; the sign of the swapped half is in sin.
void rotate_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& kv, const Tensor& places) {
  const int64_t rows = qkv.size(0), heads = qkv.size(1), dim = qkv.size(2), half = dim / 2, stored = kv.size(1);
  const int64_t turned = heads - stored / 2;
  bf16 *x = qkv.data_ptr<bf16>(), *pool = kv.data_ptr<bf16>();
  const bf16 *all_cos = cos.const_data_ptr<bf16>(), *all_sin = sin.const_data_ptr<bf16>();
  const int64_t* place = places.const_data_ptr<int64_t>();
  at::parallel_for(0, rows, ROWS_EACH, [&](int64_t begin, int64_t end) {
    float swapped[MOST_DIM];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t at = row * heads * dim; at < (row * heads + turned) * dim; at += dim) {
        bf16* __restrict h = x + at;
        const bf16 *__restrict c = all_cos + at, *__restrict s = all_sin + at;
        for (int64_t i = 0; i < half; ++i) swapped[i] = wide(h[i + half]);
        for (int64_t i = 0; i < half; ++i) swapped[i + half] = wide(h[i]);
        for (int64_t i = 0; i < dim; ++i) h[i] = narrow(rounded(wide(h[i]) * wide(c[i])) + swapped[i] * wide(s[i]));
      }
      std::copy_n(x + (row + 1) * heads * dim - stored * dim, stored * dim, pool + place[row] * stored * dim);
    }
  });
}

// Attention of one token. Heads are taken several at a time, because each waits for its own last sum.

using Lanes = float __attribute__((vector_size(4 * PAGE)));
using Bits = uint32_t __attribute__((vector_size(4 * PAGE)));
constexpr int64_t TOGETHER = 4;

// keys [DIM] of one lane for each token -> scores [N][room]
template <int64_t DIM, int64_t N>
inline void score(const float* q, const Lanes* keys, float* scores, int64_t room) {
  Lanes dots[N] = {};
  for (int64_t i = 0; i < DIM; ++i)
    for (int64_t n = 0; n < N; ++n) dots[n] += q[n * DIM + i] * keys[i];
  for (int64_t n = 0; n < N; ++n) std::memcpy(scores + n * room, &dots[n], sizeof(Lanes));
}

// sums [N][DIM] += weights [N][room] * values [PAGE][DIM]
template <int64_t DIM, int64_t N>
inline void weigh(const float* weights, int64_t room, const Lanes* values, Lanes* sums) {
  constexpr int64_t WIDTH = DIM / PAGE;
  Lanes sum[N][WIDTH];
  std::memcpy(sum, sums, sizeof sum);
  for (int64_t t = 0; t < PAGE; ++t)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < WIDTH; ++i) sum[n][i] += weights[n * room + t] * values[t * WIDTH + i];
  std::memcpy(sums, sum, sizeof sum);
}

// keys [PAGE][DIM], `stride` apart -> [DIM] of one lane for each token
template <int64_t DIM>
inline void turn_over(const bf16* keys, int64_t stride, Lanes* lanes) {
  alignas(64) uint32_t pairs[DIM / 2][PAGE];  // two neighbours of a key at once
  for (int64_t t = 0; t < PAGE; ++t)
    for (int64_t i = 0; i < DIM / 2; ++i) std::memcpy(&pairs[i][t], keys + t * stride + 2 * i, sizeof(uint32_t));
  for (int64_t i = 0; i < DIM / 2; ++i) {
    Bits pair;
    std::memcpy(&pair, pairs[i], sizeof pair);
    const Bits low = pair << 16, high = pair & 0xFFFF0000u;
    std::memcpy(&lanes[2 * i], &low, sizeof low);
    std::memcpy(&lanes[2 * i + 1], &high, sizeof high);
  }
}

inline void softmax(float* scores, int64_t length, int64_t room) {
  float most = std::numeric_limits<float>::lowest(), total = 0;
  for (int64_t t = 0; t < length; ++t) most = std::max(most, scores[t]);
  std::fill(scores + length, scores + room, std::numeric_limits<float>::lowest());
  for (int64_t t = 0; t < room; ++t) scores[t] = std::exp(scores[t] - most);
  for (int64_t t = 0; t < room; ++t) total += scores[t];
  for (int64_t t = 0; t < room; ++t) scores[t] /= total;
}

struct Head {  // what one key head and the query heads that share it work on
  int64_t shared, stride, values, room;
  std::vector<float> queries, scores;
  std::vector<Lanes> sums;
};

template <int64_t DIM>
void attend_head(Head& head, const bf16* q, const bf16* pool, const int64_t* pages, int64_t length, bf16* out) {
  constexpr int64_t WIDTH = DIM / PAGE;
  const int64_t used = (length + PAGE - 1) / PAGE, shared = head.shared, room = head.room;
  const float scale = 1 / std::sqrt(static_cast<float>(DIM));
  float *queries = head.queries.data(), *scores = head.scores.data();
  Lanes *sums = head.sums.data(), block[DIM];
  for (int64_t i = 0; i < shared * DIM; ++i) queries[i] = wide(q[i]) * scale;
  for (int64_t page = 0; page < used; ++page) {
    turn_over<DIM>(pool + pages[page] * PAGE * head.stride, head.stride, block);
    float* to = scores + page * PAGE;
    int64_t n = 0;
    for (; n + TOGETHER <= shared; n += TOGETHER) score<DIM, TOGETHER>(queries + n * DIM, block, to + n * room, room);
    for (; n < shared; ++n) score<DIM, 1>(queries + n * DIM, block, to + n * room, room);
  }
  for (int64_t n = 0; n < shared; ++n) softmax(scores + n * room, length, used * PAGE);
  std::fill_n(sums, shared * WIDTH, Lanes{});
  for (int64_t page = 0; page < used; ++page) {
    const bf16* values = pool + pages[page] * PAGE * head.stride + head.values;
    float* lanes = reinterpret_cast<float*>(block);
    for (int64_t t = 0; t < PAGE; ++t)
      for (int64_t i = 0; i < DIM; ++i) lanes[t * DIM + i] = wide(values[t * head.stride + i]);
    const float* weights = scores + page * PAGE;
    int64_t n = 0;
    for (; n + TOGETHER <= shared; n += TOGETHER) weigh<DIM, TOGETHER>(weights + n * room, room, block, sums + n * WIDTH);
    for (; n < shared; ++n) weigh<DIM, 1>(weights + n * room, room, block, sums + n * WIDTH);
  }
  const float* found = reinterpret_cast<const float*>(sums);
  for (int64_t i = 0; i < shared * DIM; ++i) out[i] = narrow(found[i]);
}

decltype(&attend_head<64>) for_heads_of(int64_t dim) {
  switch (dim) {
    case 16: return attend_head<16>;
    case 32: return attend_head<32>;
    case 48: return attend_head<48>;
    case 64: return attend_head<64>;
    case 96: return attend_head<96>;
    case 128: return attend_head<128>;
    default: return nullptr;
  }
}

// One new token for each of several requests: qkv [rows, heads + 2 * kv_heads, dim], kv [tokens, 2 * kv_heads, dim],
// pages [rows, pages], lengths [rows] in tokens -> [rows, heads * dim].
Tensor attend_pages(const Tensor& qkv, const Tensor& kv, const Tensor& pages, const Tensor& lengths) {
  const int64_t rows = qkv.size(0), all = qkv.size(1), dim = qkv.size(2), stored = kv.size(1), kv_heads = stored / 2;
  const int64_t heads = all - stored, shared = heads / kv_heads, room = pages.size(1) * PAGE;
  const auto attend = for_heads_of(dim);
  TORCH_CHECK(attend, "attend_pages: there is no kernel for heads of ", dim);
  Tensor out = at::empty({rows, heads * dim}, qkv.options());
  const bf16 *q = qkv.const_data_ptr<bf16>(), *pool = kv.const_data_ptr<bf16>();
  const int64_t *tables = pages.const_data_ptr<int64_t>(), *length = lengths.const_data_ptr<int64_t>();
  bf16* to = out.data_ptr<bf16>();
  at::parallel_for(0, rows * kv_heads, 1, [&](int64_t begin, int64_t end) {
    Head head{shared, stored * dim, kv_heads * dim, room, std::vector<float>(shared * dim),
              std::vector<float>(shared * room), std::vector<Lanes>(shared * dim / PAGE)};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / kv_heads, number = item % kv_heads;
      attend(head, q + (row * all + number * shared) * dim, pool + number * dim, tables + row * pages.size(1),
             length[row], to + (row * heads + number * shared) * dim);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(glm, library) {
  library.def("add_norm(Tensor x, Tensor part, Tensor after, Tensor before, float eps) -> (Tensor, Tensor)");
  library.def("rotate_store(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor(b!) kv, Tensor places) -> ()");
  library.def("attend_pages(Tensor qkv, Tensor kv, Tensor pages, Tensor lengths) -> Tensor");
#ifdef __AVX512BF16__
  library.def("pack(Tensor weight, bool gated) -> Tensor");
  library.def("product(Tensor x, Tensor packed, Tensor? bias) -> Tensor");
  library.def("gated_product(Tensor x, Tensor packed) -> Tensor");
#endif
}

TORCH_LIBRARY_IMPL(glm, CPU, library) {
  library.impl("add_norm", add_norm);
  library.impl("rotate_store", rotate_store);
  library.impl("attend_pages", attend_pages);
#ifdef __AVX512BF16__
  library.impl("pack", glm::pack);
  library.impl("product", glm::product);
  library.impl("gated_product", glm::gated_product);
#endif
}
