// One row of the passes of rows.hpp, built for each instruction set; rows.cpp shares the rows out over threads.
#pragma once

#include <cstdint>

#include "cpu/isa.hpp"
#include "cpu/rows.hpp"

#define KPIG_DECLARE(isa)                                                                                            \
  namespace kpig::isa {                                                                                              \
  template <class T>                                                                                                 \
  void score_row(const cpu::Rows<T>& tile, std::int64_t i, std::int64_t first_column, const cpu::Scores<T>& scores); \
  template <class T>                                                                                                 \
  void logprob_row(const cpu::Rows<T>& z, std::int64_t i, const std::int64_t* target, const T* upstream, T* out);    \
  template <class T>                                                                                                 \
  void jsd_row(const cpu::Rows<T>& z, const cpu::Rows<T>& reference, std::int64_t i, const T* temperature,           \
               const T* upstream, T* out);                                                                           \
  }
KPIG_FOR_EACH_ISA(KPIG_DECLARE)
#undef KPIG_DECLARE
