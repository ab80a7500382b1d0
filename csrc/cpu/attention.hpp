// Attention on a token tree: what its kernels take. The Python operator kpig_fast.ops.tree_attention is their user.
//
//     out[h, q] = sum_k softmax_k(cap(scale · q·k))[k] · v[k]      over k with  k <= q < subtree_end[k]
//
// H query heads, Hkv key/value heads, T tokens in depth-first order, d and dv head sizes.
#pragma once

#include <cstdint>

namespace kpig::cpu {

// Queries are taken in blocks of this many consecutive tokens, the keys that a block sees in chunks.
inline constexpr std::int64_t kQueryBlock = 64;
inline constexpr std::int64_t kKeyChunk = 192;
// Rows that a matrix tile keeps in registers; buffers of rows are padded to a multiple of it.
inline constexpr std::int64_t kTileRows = 6;
// Head sizes are multiples of this many elements: whole vectors of every instruction set.
inline constexpr std::int64_t kHeadMultiple = 16;

// [heads, T, size] with the last dimension contiguous.
template <class T>
struct Heads {
  T* data;
  std::int64_t head_stride, token_stride;

  T* row(std::int64_t head, std::int64_t token) const { return data + head * head_stride + token * token_stride; }
};

template <class T>
struct TreeAttention {
  Heads<const T> q;                 // [H, T, d]
  Heads<const T> k;                 // [Hkv, T, d]
  Heads<const T> v;                 // [Hkv, T, dv]
  const std::int32_t* subtree_end;  // [T]
  const std::int32_t* position;     // [T]
  std::int64_t heads, kv_heads, tokens, d, dv;
  T scale;
  T softcap;            // 0: none
  std::int32_t window;  // 0: none
  const T* sinks;       // [H] or null

  std::int64_t groups() const { return heads / kv_heads; }
  std::int64_t query_blocks() const { return (tokens + kQueryBlock - 1) / kQueryBlock; }
};

template <class T>
struct AttentionResult {
  Heads<T> out;  // [H, T, dv]
  T* lse;        // [H, T], log of the sum of exponentials, the sink's too
};

// Both gradients of keys and values are sums over query blocks. Each of `segments` runs of consecutive query blocks has
// its own, so that their order of addition does not depend on the number of threads.
template <class T>
struct AttentionGradients {
  Heads<const T> grad;  // [H, T, dv]
  Heads<const T> out;   // [H, T, dv]
  const T* lse;         // [H, T]
  T* delta;             // [H, T], becomes the sum of grad · out
  Heads<T> dq;          // [H, T, d]
  T* dk;                // [segments, T, Hkv, d], zeros before
  T* dv;                // [segments, T, Hkv, dv], zeros before
  std::int64_t segments;
};

template <class T>
void tree_attention(const TreeAttention<T>& attention, const AttentionResult<T>& result, int threads);
template <class T>
void tree_attention_backward(const TreeAttention<T>& attention, const AttentionGradients<T>& gradients, int threads);

}  // namespace kpig::cpu
