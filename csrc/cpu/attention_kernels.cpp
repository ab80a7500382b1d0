// Built once for each instruction set. Scores stand as [keys, queries of the block]: the queries that may see a key are
// one run of lanes, maxima and sums over keys need no step across lanes, and neither keys nor values are copied.
#include "cpu/attention_kernels.hpp"

#include <cmath>
#include <limits>

#include "cpu/tile.hpp"
#include "cpu/vec.hpp"

namespace kpig::KPIG_ISA {
namespace {

using cpu::Heads;
using cpu::kKeyChunk;
using cpu::TreeAttention;
using rowmath::maximum;

template <class T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

class Arena {
 public:
  explicit Arena(std::byte* free) : free_(free) {}

  template <class T>
  T* take(std::int64_t n) {
    auto* taken = reinterpret_cast<T*>(free_);
    constexpr std::int64_t kAlignment = 64;
    free_ += (n * std::int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }

 private:
  std::byte* free_;
};

// A block of queries and the keys that it sees: the path from the root to its first token, and what is in the block.
template <class T>
struct Block {
  const TreeAttention<T>& a;
  std::int64_t first = 0, queries = 0, n_keys = 0;
  std::int32_t* keys;
  std::int32_t deepest = 0;

  Block(const TreeAttention<T>& attention, Arena& arena)
      : a(attention), keys(arena.take<std::int32_t>(attention.tokens)) {}

  void move_to(std::int64_t block) {
    first = block * kQueryBlock;
    const auto stop = first + kQueryBlock < a.tokens ? first + kQueryBlock : a.tokens;
    queries = stop - first;
    std::int32_t highest = 0;
    if (a.window > 0) {
      highest = deepest = a.position[first];
      for (auto q = first; q < stop; ++q) {
        highest = a.position[q] < highest ? a.position[q] : highest;
        deepest = a.position[q] > deepest ? a.position[q] : deepest;
      }
    }
    n_keys = 0;
    for (std::int64_t key = 0; key < stop;) {
      if (a.subtree_end[key] <= first) {
        // Nothing in this subtree reaches the block.
        key = a.subtree_end[key] > key ? a.subtree_end[key] : key + 1;
        continue;
      }
      if (a.window == 0 || highest - a.position[key] < a.window) keys[n_keys++] = static_cast<std::int32_t>(key);
      ++key;
    }
  }

  // Hide the queries of the block that may not see `key` in its row of scores.
  void mask(std::int32_t key, T* scores) const {
    const auto from = key > first ? key - first : 0;
    const auto stop = a.subtree_end[key] - first;
    for (std::int64_t q = 0; q < from; ++q) scores[q] = kHidden<T>;
    for (std::int64_t q = stop; q < queries; ++q) scores[q] = kHidden<T>;
    if (a.window > 0 && deepest - a.position[key] >= a.window) {
      for (std::int64_t q = 0; q < queries; ++q) {
        if (a.position[first + q] - a.position[key] >= a.window) scores[q] = kHidden<T>;
      }
    }
  }
};

// [size, kQueryBlock] from the block's rows of `from`, times `factor`; zeros where there is no query.
template <class T>
void transpose(const Heads<const T>& from, std::int64_t head, const Block<T>& block, std::int64_t size, T factor,
               T* to) {
  const T* first = from.row(head, block.first);
  for (std::int64_t x = 0; x < size; ++x, to += kQueryBlock) {
    for (std::int64_t q = 0; q < block.queries; ++q) to[q] = first[q * from.token_stride + x] * factor;
    for (auto q = block.queries; q < kQueryBlock; ++q) to[q] = 0;
  }
}

// Pointers to the rows of `from` for `n` keys; the last one again up to a whole number of tiles.
template <class T>
std::int64_t point_at(const Heads<const T>& from, std::int64_t head, const std::int32_t* keys, std::int64_t n,
                      const T** rows) {
  for (std::int64_t i = 0; i < n; ++i) rows[i] = from.row(head, keys[i]);
  auto padded = n;
  for (; padded % kTileRows != 0; ++padded) rows[padded] = rows[n - 1];
  return padded;
}

// to[q] = sum over x of a[x, q] · b[x, q], added up as `products` does: for a query that sees one key, whose value is
// then its output, the two agree to the bit.
template <class T>
void column_products(const T* a, const T* b, std::int64_t size, T* to) {
  for (std::int64_t at = 0; at < kQueryBlock; at += kLanes<T>) {
    for (std::int64_t from = 0; from < size; from += kTerms) {
      Vec<T> sum = {};
      for (auto x = from; x < size && x < from + kTerms; ++x) {
        sum += load(a + x * kQueryBlock + at) * load(b + x * kQueryBlock + at);
      }
      store(to + at, from == 0 ? sum : load(to + at) + sum);
    }
  }
}

template <class T, class Function>
KPIG_ROWMATH void each_vector(T* values, std::int64_t n, Function function) {
  for (std::int64_t i = 0; i < n; i += kLanes<T>) store(values + i, function(load(values + i)));
}

// One chunk of keys into the running maximum, sum and mixture of every query; `scores` become weights.
template <class T>
void soften(T* scores, std::int64_t n, T* top, T* sum, T* factor) {
  for (std::int64_t at = 0; at < kQueryBlock; at += kLanes<T>) {
    const Vec<T> before = load(top + at);
    Vec<T> now = before;
    for (std::int64_t i = 0; i < n; ++i) now = maximum<Vec<T>>(now, load(scores + i * kQueryBlock + at));
    // A query that has seen no key yet: any finite maximum gives weights of 0.
    const Vec<T> finite = now > splat(kHidden<T>) ? now : Vec<T>{};
    const Vec<T> keep = rowmath::exp<Vec<T>>(before - finite);
    Vec<T> total = {};
    for (std::int64_t i = 0; i < n; ++i) {
      T* row = scores + i * kQueryBlock + at;
      const Vec<T> weight = rowmath::exp<Vec<T>>(load(row) - finite);
      store(row, weight);
      total += weight;
    }
    store(top + at, now);
    store(sum + at, load(sum + at) * keep + total);
    store(factor + at, keep);
  }
}

}  // namespace

template <class T>
void attention_block(const TreeAttention<T>& a, const cpu::AttentionResult<T>& result, std::int64_t block_index,
                     std::int64_t kv_head, std::byte* scratch) {
  Arena arena(scratch);
  Block<T> block(a, arena);
  T* columns = arena.take<T>(a.d * kQueryBlock);
  T* scores = arena.take<T>(kKeyChunk * kQueryBlock);
  T* mixed = arena.take<T>(kQueryBlock * a.dv);
  T *top = arena.take<T>(kQueryBlock), *sum = arena.take<T>(kQueryBlock), *factor = arena.take<T>(kQueryBlock);
  const T** k_rows = arena.take<const T*>(kKeyChunk);
  const T** v_rows = arena.take<const T*>(kKeyChunk);
  T** mixed_rows = arena.take<T*>(kQueryBlock);
  for (std::int64_t q = 0; q < kQueryBlock; ++q) mixed_rows[q] = mixed + q * a.dv;

  block.move_to(block_index);
  for (auto head = kv_head * a.groups(); head < (kv_head + 1) * a.groups(); ++head) {
    transpose(a.q, head, block, a.d, a.scale, columns);
    each_vector(mixed, kQueryBlock * a.dv, [](Vec<T>) { return Vec<T>{}; });
    // A sink is a key that everyone sees and that has no value.
    for (std::int64_t q = 0; q < kQueryBlock; ++q) {
      top[q] = a.sinks == nullptr ? kHidden<T> : a.sinks[head];
      sum[q] = a.sinks == nullptr ? 0 : 1;
    }
    for (std::int64_t start = 0; start < block.n_keys; start += kKeyChunk) {
      const auto n = block.n_keys - start < kKeyChunk ? block.n_keys - start : kKeyChunk;
      const std::int32_t* keys = block.keys + start;
      const auto padded = point_at(a.k, kv_head, keys, n, k_rows);
      point_at(a.v, kv_head, keys, n, v_rows);
      products(k_rows, padded, a.d, columns, scores);
      if (a.softcap != 0) {
        each_vector(scores, n * kQueryBlock,
                    [&](Vec<T> x) { return rowmath::tanh<Vec<T>>(x / a.softcap) * a.softcap; });
      }
      for (std::int64_t i = 0; i < n; ++i) block.mask(keys[i], scores + i * kQueryBlock);
      soften(scores, n, top, sum, factor);
      if (start > 0) {
        for (std::int64_t q = 0; q < block.queries; ++q) {
          each_vector(mixed_rows[q], a.dv, [&](Vec<T> x) { return x * factor[q]; });
        }
      }
      accumulate(block.queries, scores, 1, kQueryBlock, n, v_rows, mixed_rows, a.dv);
    }
    for (std::int64_t q = 0; q < block.queries; ++q) {
      T* out = result.out.row(head, block.first + q);
      for (std::int64_t x = 0; x < a.dv; x += kLanes<T>) store(out + x, load(mixed_rows[q] + x) / sum[q]);
      result.lse[head * a.tokens + block.first + q] = top[q] + std::log(sum[q]);
    }
  }
}

template <class T>
void attention_segment_backward(const TreeAttention<T>& a, const cpu::AttentionGradients<T>& g, std::int64_t segment,
                                std::int64_t kv_head, std::byte* scratch) {
  Arena arena(scratch);
  Block<T> block(a, arena);
  T *q_columns = arena.take<T>(a.d * kQueryBlock), *grad_columns = arena.take<T>(a.dv * kQueryBlock);
  T* out_columns = arena.take<T>(a.dv * kQueryBlock);
  T *scores = arena.take<T>(kKeyChunk * kQueryBlock), *dscores = arena.take<T>(kKeyChunk * kQueryBlock);
  T* dq = arena.take<T>(kQueryBlock * a.d);
  T *lse = arena.take<T>(kQueryBlock), *delta = arena.take<T>(kQueryBlock);
  const T **k_rows = arena.take<const T*>(kKeyChunk), **v_rows = arena.take<const T*>(kKeyChunk);
  T **dk_rows = arena.take<T*>(kKeyChunk), **dv_rows = arena.take<T*>(kKeyChunk);
  const T **q_rows = arena.take<const T*>(kQueryBlock), **grad_rows = arena.take<const T*>(kQueryBlock);
  T** dq_rows = arena.take<T*>(kQueryBlock);
  for (std::int64_t q = 0; q < kQueryBlock; ++q) dq_rows[q] = dq + q * a.d;

  const auto first_row = segment * a.tokens * a.kv_heads + kv_head;
  const auto blocks = a.query_blocks();
  for (auto index = segment * blocks / g.segments; index < (segment + 1) * blocks / g.segments; ++index) {
    block.move_to(index);
    for (auto head = kv_head * a.groups(); head < (kv_head + 1) * a.groups(); ++head) {
      transpose(a.q, head, block, a.d, a.scale, q_columns);
      transpose(g.grad, head, block, a.dv, T{1}, grad_columns);
      transpose(g.out, head, block, a.dv, T{1}, out_columns);
      column_products(out_columns, grad_columns, a.dv, delta);
      each_vector(dq, kQueryBlock * a.d, [](Vec<T>) { return Vec<T>{}; });
      for (std::int64_t q = 0; q < kQueryBlock; ++q) {
        const auto at = head * a.tokens + block.first + q;
        // Where there is no query, weights are 0.
        lse[q] = q < block.queries ? g.lse[at] : -kHidden<T>;
        if (q < block.queries) g.delta[at] = delta[q];
        q_rows[q] = q < block.queries ? a.q.row(head, block.first + q) : nullptr;
        grad_rows[q] = q < block.queries ? g.grad.row(head, block.first + q) : nullptr;
      }
      for (std::int64_t start = 0; start < block.n_keys; start += kKeyChunk) {
        const auto n = block.n_keys - start < kKeyChunk ? block.n_keys - start : kKeyChunk;
        const std::int32_t* keys = block.keys + start;
        const auto padded = point_at(a.k, kv_head, keys, n, k_rows);
        point_at(a.v, kv_head, keys, n, v_rows);
        for (std::int64_t i = 0; i < n; ++i) {
          dk_rows[i] = g.dk + (first_row + keys[i] * a.kv_heads) * a.d;
          dv_rows[i] = g.dv + (first_row + keys[i] * a.kv_heads) * a.dv;
        }
        products(k_rows, padded, a.d, q_columns, scores);
        products(v_rows, padded, a.dv, grad_columns, dscores);
        for (std::int64_t i = 0; i < n; ++i) {
          T *row = scores + i * kQueryBlock, *drow = dscores + i * kQueryBlock;
          for (std::int64_t at = 0; at < kQueryBlock; at += kLanes<T>) {
            Vec<T> difference = load(drow + at) - load(delta + at);
            if (a.softcap != 0) {
              const Vec<T> bent = rowmath::tanh<Vec<T>>(load(row + at) / a.softcap);
              store(row + at, bent * a.softcap);
              difference *= 1 - bent * bent;
            }
            store(drow + at, difference);
          }
          block.mask(keys[i], row);
          for (std::int64_t at = 0; at < kQueryBlock; at += kLanes<T>) {
            const Vec<T> weight = rowmath::exp<Vec<T>>(load(row + at) - load(lse + at));
            store(row + at, weight);
            store(drow + at, weight * load(drow + at) * a.scale);
          }
        }
        accumulate(n, scores, kQueryBlock, 1, block.queries, grad_rows, dv_rows, a.dv);
        accumulate(n, dscores, kQueryBlock, 1, block.queries, q_rows, dk_rows, a.d);
        accumulate(block.queries, dscores, 1, kQueryBlock, n, k_rows, dq_rows, a.d);
      }
      for (std::int64_t q = 0; q < block.queries; ++q) {
        T* to = g.dq.row(head, block.first + q);
        for (std::int64_t x = 0; x < a.d; x += kLanes<T>) store(to + x, load(dq_rows[q] + x));
      }
    }
  }
}

#define KPIG_INSTANTIATE(T)                                                                                          \
  template void attention_block(const TreeAttention<T>&, const cpu::AttentionResult<T>&, std::int64_t, std::int64_t, \
                                std::byte*);                                                                         \
  template void attention_segment_backward(const TreeAttention<T>&, const cpu::AttentionGradients<T>&, std::int64_t, \
                                           std::int64_t, std::byte*);
KPIG_INSTANTIATE(float)
KPIG_INSTANTIATE(double)

}  // namespace kpig::KPIG_ISA
