#include "cpu/attention.hpp"

#include <cstddef>
#include <memory>

#include "cpu/attention_kernels.hpp"
#include "cpu/parallel.hpp"

namespace kpig::cpu {
namespace {

constexpr std::int64_t kAlignment = 64;

// Working memory of every worker, each at a multiple of kAlignment.
class Scratch {
 public:
  Scratch(std::int64_t bytes, int workers)
      : each_((bytes + kAlignment - 1) / kAlignment * kAlignment),
        memory_(new(std::align_val_t{kAlignment}) std::byte[static_cast<std::size_t>(each_ * workers)]) {}

  std::byte* of(int worker) const { return memory_.get() + each_ * worker; }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kAlignment}); }
  };
  std::int64_t each_;
  std::unique_ptr<std::byte[], Free> memory_;
};

}  // namespace

template <class T>
void tree_attention(const TreeAttention<T>& a, const AttentionResult<T>& result, int threads) {
  const Scratch scratch(attention_scratch_bytes(a), threads);
  const auto kernel = KPIG_IN_USE(attention_block<T>);
  parallel_for(a.query_blocks() * a.kv_heads, threads, [&](std::int64_t task, int worker) {
    // Head after head, so that one head's keys and values stay in the cache.
    kernel(a, result, task % a.query_blocks(), task / a.query_blocks(), scratch.of(worker));
  });
}

template <class T>
void tree_attention_backward(const TreeAttention<T>& a, const AttentionGradients<T>& gradients, int threads) {
  const Scratch scratch(attention_scratch_bytes(a), threads);
  const auto kernel = KPIG_IN_USE(attention_segment_backward<T>);
  parallel_for(gradients.segments * a.kv_heads, threads, [&](std::int64_t task, int worker) {
    kernel(a, gradients, task / a.kv_heads, task % a.kv_heads, scratch.of(worker));
  });
}

#define KPIG_INSTANTIATE(T)                                                              \
  template void tree_attention(const TreeAttention<T>&, const AttentionResult<T>&, int); \
  template void tree_attention_backward(const TreeAttention<T>&, const AttentionGradients<T>&, int);
KPIG_INSTANTIATE(float)
KPIG_INSTANTIATE(double)

}  // namespace kpig::cpu
