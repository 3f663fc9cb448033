// Attention in bfloat16 with the kernels of products.h: the keys of a head are packed as the weights by which queries are
// multiplied, its values as the weights by which probabilities are multiplied.

#pragma once

#include "products.h"

namespace glm {

constexpr int64_t PAGE = 16;           // tokens in a page of the KV cache
constexpr int64_t MAX_DIM = 256;       // of a head
constexpr int64_t AHEAD = 32;          // tokens prefetched: the hardware cannot predict the order of pages
constexpr int64_t QUERIES_EACH = 240;  // queries of one head that a thread takes at a time

// Epilogues of `multiply`: scores are stored as float32, sums of values are normalized and rounded.
struct StoreScores {
  void operator()(__m512 low, __m512 high, int64_t panel, int, float* row) const {
    _mm512_storeu_ps(row + panel * PANEL, low);
    _mm512_storeu_ps(row + panel * PANEL + LANES, high);
  }
};

struct NormalizeValues {
  int64_t dim;          // a head may end in the middle of a panel
  const float* totals;  // sum of the unnormalized probabilities of each row
  void operator()(__m512 low, __m512 high, int64_t panel, int r, bf16* row) const {
    const __m512 scale = _mm512_set1_ps(1 / totals[r]);
    store(row + panel * PANEL, _mm512_mul_ps(low, scale));
    if (panel * PANEL + LANES < dim) store(row + panel * PANEL + LANES, _mm512_mul_ps(high, scale));
  }
};

// Transposes 16 pairs of each of 16 rows, from `offset` on: one line of 16 for each pair, PANEL apart.
inline void transpose_pairs(const bf16* const* rows, int64_t offset, uint32_t* to) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  }
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_si512(to + j * PANEL, _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
    _mm512_storeu_si512(to + (j + 8) * PANEL, _mm512_shuffle_i32x4(t[j], t[j + 8], 0xDD));
  }
}

// One thread's buffers for the packed keys and values of one head and a tile of queries.
class HeadWorkspace {
 public:
  explicit HeadWorkspace(int64_t dim) : dim_(dim), value_panels_((dim + PANEL - 1) / PANEL), scale_(1 / std::sqrt(float(dim))) {}

  int64_t dim() const { return dim_; }

  // Allocates room for `length` tokens, and for as many rotated keys if `rotated`. Nothing else here allocates.
  void reserve(int64_t length, bool rotated) {
    const int64_t room = (length + PANEL - 1) / PANEL * PANEL;
    if (scores_.size() < static_cast<size_t>(TILE * room)) {
      keys_.resize(room * dim_);
      values_.resize(room * value_panels_ * PANEL);
      scores_.resize(TILE * room);
      probabilities_.resize(TILE * room);
    }
    if (rotated && rotated_.size() < static_cast<size_t>(length * dim_)) rotated_.resize(length * dim_);
  }

  bf16* rotated(int64_t token) { return rotated_.data() + token * dim_; }

  // Packs keys and values: key(t) and value(t) are [dim] each, for t from 0 to `length`, which has been reserved.
  template <class Key, class Value>
  void pack(int64_t length, const Key& key, const Value& value) {
    room_ = (length + PANEL - 1) / PANEL * PANEL;
    alignas(64) static const bf16 zeros[MAX_DIM] = {};
    for (int64_t t = 0; t < room_; t += LANES) {
      for (int64_t i = t + AHEAD; i < std::min(t + AHEAD + LANES, length); ++i) {
        for (int64_t at = 0; at < dim_; at += 64 / sizeof(bf16)) {
          _mm_prefetch(key(i) + at, _MM_HINT_T0);
          _mm_prefetch(value(i) + at, _MM_HINT_T0);
        }
      }
      const bf16* rows[LANES];
      for (int64_t i = 0; i < LANES; ++i) rows[i] = t + i < length ? key(t + i) : zeros;
      uint32_t* to = reinterpret_cast<uint32_t*>(keys_.data()) + t / PANEL * PANEL * dim_ / 2 + t % PANEL;
      const int64_t pairs = dim_ / 2;
      if (pairs % LANES == 0) {
        for (int64_t i = 0; i < pairs; i += LANES) transpose_pairs(rows, 2 * i, to + i * PANEL);
      } else {
        for (int64_t i = 0; i < pairs; ++i)
          for (int64_t j = 0; j < LANES; ++j) std::memcpy(to + i * PANEL + j, rows[j] + 2 * i, sizeof(uint32_t));
      }
      for (int64_t i = 0; i < LANES; i += 2)
        pack_values(t + i, t + i < length ? value(t + i) : zeros, t + i + 1 < length ? value(t + i + 1) : zeros);
    }
  }

  // Attention of queries [rows][dim], at most TILE rows, over the packed keys and values; row r attends to the first
  // lengths[r] tokens -> rows of `out`, `width` apart.
  void attend(const bf16* queries, int64_t rows, const int64_t* lengths, bf16* out, int64_t width) {
    static constexpr auto score = by_rows<StoreScores, float>(std::make_integer_sequence<int, TILE>());
    static constexpr auto combine = by_rows<NormalizeValues, bf16>(std::make_integer_sequence<int, TILE>());
    alignas(64) bf16 ordered[TILE * MAX_DIM];
    pack_rows(queries, rows, dim_, 0, 1, ordered);
    const int64_t panels = (*std::max_element(lengths, lengths + rows) + PANEL - 1) / PANEL;
    const Prefetch none{reinterpret_cast<const char*>(ordered), 0};
    for (int64_t panel = 0; panel < panels; ++panel)
      score[rows - 1](keys_.data() + panel * PANEL * dim_, ordered, dim_ / 2, nullptr, true, true, none, StoreScores{},
                      panel, scores_.data(), room_);
    float totals[TILE];
    for (int64_t r = 0; r < rows; ++r) totals[r] = softmax(scores_.data() + r * room_, lengths[r], panels * PANEL, r, rows);
    for (int64_t panel = 0; panel < value_panels_; ++panel)
      combine[rows - 1](values_.data() + panel * PANEL * room_, probabilities_.data(), panels * PANEL / 2, nullptr, true, true,
                        none, NormalizeValues{dim_, totals}, panel, out, width);
  }

 private:
  // Interleaves the values of two tokens: [value_panels][room / 2][PANEL][2]
  void pack_values(int64_t t, const bf16* even, const bf16* odd) {
    for (int64_t panel = 0; panel < value_panels_; ++panel) {
      uint32_t* to = reinterpret_cast<uint32_t*>(values_.data()) + (panel * room_ + t) * PANEL / 2;
      for (int64_t i = 0; i < PANEL; i += LANES) {
        const int64_t at = panel * PANEL + i;
        if (at >= dim_) {
          _mm512_storeu_si512(to + i, _mm512_setzero_si512());
          continue;
        }
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + at));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + at));
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_storeu_si512(to + i, pairs);
      }
    }
  }

  // Scores of row r -> its unnormalized probabilities [room / 2][rows][2]. Returns their sum.
  float softmax(const float* scores, int64_t length, int64_t room, int64_t r, int64_t rows) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    auto mask = [&](int64_t t) { return length - t >= LANES ? __mmask16(-1) : __mmask16((1 << std::max<int64_t>(length - t, 0)) - 1); };
    __m512 most = none;
    for (int64_t t = 0; t < length; t += LANES) most = _mm512_max_ps(most, _mm512_mask_loadu_ps(none, mask(t), scores + t));
    const __m512 scale = _mm512_set1_ps(scale_), offset = _mm512_set1_ps(_mm512_reduce_max_ps(most) * scale_);
    __m512 total = _mm512_setzero_ps();
    uint32_t* to = reinterpret_cast<uint32_t*>(probabilities_.data()) + r;
    for (int64_t t = 0; t < room; t += LANES) {
      const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + t), scale, offset);
      const __m512 e = _mm512_maskz_mov_ps(mask(t), exponential(x));
      total = _mm512_add_ps(total, e);
      alignas(32) uint32_t pairs[LANES / 2];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), narrowed(e));
      for (int64_t i = 0; i < LANES / 2; ++i, to += rows) *to = pairs[i];
    }
    return _mm512_reduce_add_ps(total);
  }

  int64_t dim_, value_panels_, room_ = 0;  // room_: tokens, rounded up to whole panels
  float scale_;
  std::vector<bf16, Aligned<bf16>> keys_;     // as packed weights: [room / PANEL][dim / 2][PANEL][2]
  std::vector<bf16, Aligned<bf16>> values_;   // [value_panels][room / 2][PANEL][2]
  std::vector<float> scores_;                       // [TILE][room]
  std::vector<bf16, Aligned<bf16>> probabilities_;  // in the layout of pack_rows: [room / 2][rows][2]
  std::vector<bf16> rotated_;                       // [tokens][dim]
};

// One workspace for each thread of a parallel region, with room for `length` tokens. They belong to the calling thread
// and are reused by its next call.
inline HeadWorkspace* workspaces(int64_t dim, int64_t length, bool rotated) {
  thread_local std::vector<HeadWorkspace> cached;
  if (cached.empty() || cached[0].dim() != dim) cached.clear();
  const size_t threads = at::get_num_threads();
  while (cached.size() < threads) cached.emplace_back(dim);
  for (HeadWorkspace& workspace : cached) workspace.reserve(length, rotated);
  return cached.data();
}

inline void check_head(int64_t dim) {
  TORCH_CHECK(dim > 0 && dim % LANES == 0 && dim <= MAX_DIM, "attention: heads of ", dim, " are not supported");
}

// qkv [rows, heads + 2 * kv_heads, dim] and kv [tokens, 2 * kv_heads, dim].
inline void check_qkv(const Tensor& qkv, const Tensor& kv, const char* operation) {
  check_bf16(qkv, 3, operation, "qkv");
  check_bf16(kv, 3, operation, "kv");
  check_head(qkv.size(2));
  check_size(kv, 2, qkv.size(2), operation, "kv");
  const int64_t stored = kv.size(1), heads = qkv.size(1) - stored;
  TORCH_CHECK(stored > 0 && stored % 2 == 0 && heads > 0 && heads % (stored / 2) == 0, operation, ": qkv ", qkv.sizes(),
              " does not fit kv ", kv.sizes());
}

// Decode, one new token of each of several sequences: qkv [rows, heads + 2 * kv_heads, dim], kv [tokens, 2 * kv_heads, dim],
// pages [rows, pages], lengths [rows] in tokens -> [rows, heads * dim].
inline Tensor attend_decode(const Tensor& qkv, const Tensor& kv, const Tensor& pages, const Tensor& lengths) {
  check_qkv(qkv, kv, "attend_decode");
  check_tensor(pages, at::kLong, 2, "attend_decode", "pages");
  check_tensor(lengths, at::kLong, 1, "attend_decode", "lengths");
  const int64_t rows = qkv.size(0), all = qkv.size(1), dim = qkv.size(2), stored = kv.size(1), kv_heads = stored / 2;
  check_size(pages, 0, rows, "attend_decode", "pages");
  check_size(lengths, 0, rows, "attend_decode", "lengths");
  check_range(pages, 0, kv.size(0) / PAGE, "attend_decode", "pages");
  check_range(lengths, 1, pages.size(1) * PAGE + 1, "attend_decode", "lengths");
  const int64_t heads = all - stored, shared = heads / kv_heads;
  Tensor out = at::empty({rows, heads * dim}, qkv.options());
  if (!rows) return out;
  const bf16 *q = qkv.const_data_ptr<bf16>(), *pool = kv.const_data_ptr<bf16>();
  const int64_t *tables = pages.const_data_ptr<int64_t>(), *length = lengths.const_data_ptr<int64_t>();
  bf16* to = out.data_ptr<bf16>();
  HeadWorkspace* const thread_workspaces = workspaces(dim, *std::max_element(length, length + rows), false);
  const int64_t table_size = pages.size(1);
  std::atomic<int64_t> next{0};
  in_parallel([&](int64_t thread, int64_t) {
    HeadWorkspace& workspace = thread_workspaces[thread];
    for (int64_t item; (item = next.fetch_add(1)) < rows * kv_heads;) {
      const int64_t row = item / kv_heads, number = item % kv_heads, *table = tables + row * table_size;
      auto key = [&](int64_t t) { return pool + ((table[t / PAGE] * PAGE + t % PAGE) * stored + number) * dim; };
      workspace.pack(length[row], key, [&](int64_t t) { return key(t) + kv_heads * dim; });
      int64_t visible[TILE];
      std::fill_n(visible, TILE, length[row]);
      for (int64_t first = 0; first < shared; first += TILE) {
        const int64_t at = number * shared + first;
        workspace.attend(q + (row * all + at) * dim, std::min(TILE, shared - first), visible, to + (row * heads + at) * dim, dim);
      }
    }
  });
  return out;
}

// Prefill, consecutive tokens of one sequence: qkv [rows, heads + 2 * kv_heads, dim], kv [tokens, 2 * kv_heads, dim],
// pages [pages]; row 0 attends to `first` + 1 tokens -> [rows, heads * dim].
inline Tensor attend_prefill(const Tensor& qkv, const Tensor& kv, const Tensor& pages, int64_t first) {
  check_qkv(qkv, kv, "attend_prefill");
  check_tensor(pages, at::kLong, 1, "attend_prefill", "pages");
  const int64_t rows = qkv.size(0), all = qkv.size(1), dim = qkv.size(2), stored = kv.size(1), kv_heads = stored / 2;
  check_range(pages, 0, kv.size(0) / PAGE, "attend_prefill", "pages");
  TORCH_CHECK(first >= 0 && first + rows <= pages.size(0) * PAGE, "attend_prefill: ", first, " + ", rows, " tokens in ",
              pages.size(0), " pages");
  const int64_t heads = all - stored, shared = heads / kv_heads;
  Tensor out = at::empty({rows, heads * dim}, qkv.options());
  const bf16 *q = qkv.const_data_ptr<bf16>(), *pool = kv.const_data_ptr<bf16>();
  const int64_t* table = pages.const_data_ptr<int64_t>();
  bf16* to = out.data_ptr<bf16>();
  const int64_t queries = rows * shared, blocks = (queries + QUERIES_EACH - 1) / QUERIES_EACH;
  HeadWorkspace* const thread_workspaces = workspaces(dim, first + rows, false);
  std::atomic<int64_t> next{0};
  in_parallel([&](int64_t thread, int64_t) {
    HeadWorkspace& workspace = thread_workspaces[thread];
    alignas(64) bf16 queries_of_tile[TILE * MAX_DIM], outputs[TILE * MAX_DIM];
    for (int64_t item; (item = next.fetch_add(1)) < blocks * kv_heads;) {
      const int64_t number = item % kv_heads, begin = item / kv_heads * QUERIES_EACH;
      const int64_t end = std::min(begin + QUERIES_EACH, queries);
      auto key = [&](int64_t t) { return pool + ((table[t / PAGE] * PAGE + t % PAGE) * stored + number) * dim; };
      workspace.pack(first + (end - 1) / shared + 1, key, [&](int64_t t) { return key(t) + kv_heads * dim; });
      for (int64_t start = begin; start < end; start += TILE) {
        const int64_t count = std::min(TILE, end - start);
        int64_t visible[TILE];
        auto row_and_head = [&](int64_t i) { return std::pair{(start + i) / shared, number * shared + (start + i) % shared}; };
        for (int64_t i = 0; i < count; ++i) {
          const auto [row, query_head] = row_and_head(i);
          std::copy_n(q + (row * all + query_head) * dim, dim, queries_of_tile + i * dim);
          visible[i] = first + row + 1;
        }
        workspace.attend(queries_of_tile, count, visible, outputs, dim);
        for (int64_t i = 0; i < count; ++i) {
          const auto [row, query_head] = row_and_head(i);
          std::copy_n(outputs + i * dim, dim, to + (row * heads + query_head) * dim);
        }
      }
    }
  });
  return out;
}

// x * cos + (x with its halves swapped) * sin, in float32; sin carries the sign of the swapped half.
inline void rotate(const bf16* x, const float* cos, const float* sin, int64_t dim, bf16* to) {
  alignas(64) bf16 swapped[MAX_DIM];
  const int64_t half = dim / 2;
  std::memcpy(swapped, x + half, half * sizeof(bf16));
  std::memcpy(swapped + half, x, half * sizeof(bf16));
  for (int64_t i = 0; i < dim; i += LANES) {
    const __m512 rotated = _mm512_mul_ps(load(swapped + i), _mm512_loadu_ps(sin + i));
    store(to + i, _mm512_fmadd_ps(load(x + i), _mm512_loadu_ps(cos + i), rotated));
  }
}

// Attention of an image's patches within their frame: qkv [patches, 3 * heads * dim], not yet rotated, float32 cos and sin
// [patches, dim] -> [patches, heads * dim].
inline Tensor attend_image(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t frames, int64_t heads) {
  check_bf16(qkv, 2, "attend_image", "qkv");
  const int64_t patches = qkv.size(0), width = qkv.size(1) / 3;
  TORCH_CHECK(frames > 0 && heads > 0 && patches % frames == 0 && qkv.size(1) % (3 * heads) == 0, "attend_image: qkv ",
              qkv.sizes(), " does not fit ", frames, " frames and ", heads, " heads");
  const int64_t dim = width / heads, each = patches / frames;
  check_head(dim);
  for (const Tensor* table : {&cos, &sin}) {
    check_tensor(*table, at::kFloat, 2, "attend_image", "cos and sin");
    check_size(*table, 0, patches, "attend_image", "cos and sin");
    check_size(*table, 1, dim, "attend_image", "cos and sin");
  }
  Tensor out = at::empty({patches, width}, qkv.options());
  const bf16* from = qkv.const_data_ptr<bf16>();
  const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  bf16* to = out.data_ptr<bf16>();
  const int64_t blocks = (each + QUERIES_EACH - 1) / QUERIES_EACH;
  HeadWorkspace* const thread_workspaces = workspaces(dim, each, true);
  std::atomic<int64_t> next{0};
  in_parallel([&](int64_t thread, int64_t) {
    HeadWorkspace& workspace = thread_workspaces[thread];
    alignas(64) bf16 queries[TILE * MAX_DIM];
    int64_t visible[TILE];
    std::fill_n(visible, TILE, each);
    for (int64_t item; (item = next.fetch_add(1)) < frames * heads * blocks;) {
      const int64_t block = item % blocks, number = item / blocks % heads, start = item / blocks / heads * each;
      auto row = [&](int64_t t, int64_t part) { return from + ((start + t) * 3 + part) * width + number * dim; };
      for (int64_t t = 0; t < each; ++t) rotate(row(t, 1), c + (start + t) * dim, s + (start + t) * dim, dim, workspace.rotated(t));
      workspace.pack(each, [&](int64_t t) { return workspace.rotated(t); }, [&](int64_t t) { return row(t, 2); });
      const int64_t end = std::min((block + 1) * QUERIES_EACH, each);
      for (int64_t first = block * QUERIES_EACH; first < end; first += TILE) {
        const int64_t count = std::min(TILE, end - first);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t patch = start + first + i;
          rotate(row(first + i, 0), c + patch * dim, s + patch * dim, dim, queries + i * dim);
        }
        workspace.attend(queries, count, visible, to + (start + first) * width + number * dim, width);
      }
    }
  });
  return out;
}

}  // namespace glm
