// The parts of tree attention that are built for each instruction set; attention.cpp shares them out over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention.hpp"
#include "cpu/isa.hpp"

namespace kpig::cpu {

// Bytes of working memory that one worker needs; it starts at a multiple of 64.
template <class T>
std::int64_t attention_scratch_bytes(const TreeAttention<T>& a) {
  const auto wider = a.d > a.dv ? a.d : a.dv;
  const auto values = kQueryBlock * (a.d + 2 * a.dv + wider + 5) + 2 * kKeyChunk * kQueryBlock;
  const auto pointers = 4 * kKeyChunk + 3 * kQueryBlock;
  constexpr std::int64_t kAlignment = 64, kPieces = 18;
  return values * std::int64_t{sizeof(T)} + pointers * std::int64_t{sizeof(void*)} +
         a.tokens * std::int64_t{sizeof(std::int32_t)} + kPieces * kAlignment;
}

}  // namespace kpig::cpu

#define KPIG_DECLARE(isa)                                                                                         \
  namespace kpig::isa {                                                                                           \
  /* One block of queries for the query heads of one key/value head. */                                           \
  template <class T>                                                                                              \
  void attention_block(const cpu::TreeAttention<T>& a, const cpu::AttentionResult<T>& result, std::int64_t block, \
                       std::int64_t kv_head, std::byte* scratch);                                                 \
  /* The query blocks of one segment, likewise. */                                                                \
  template <class T>                                                                                              \
  void attention_segment_backward(const cpu::TreeAttention<T>& a, const cpu::AttentionGradients<T>& gradients,    \
                                  std::int64_t segment, std::int64_t kv_head, std::byte* scratch);                \
  }
KPIG_FOR_EACH_ISA(KPIG_DECLARE)
#undef KPIG_DECLARE
