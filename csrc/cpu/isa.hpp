// Which of the instruction sets that the kernels are built for are used.
#pragma once

#include <string>
#include <vector>

namespace kpig::cpu {

enum class Isa { portable, avx2, avx512 };

bool supports(Isa isa);

// Names of what this machine supports, the fastest first.
std::vector<std::string> supported_isas();

// The one in use: the one that the variable KPIG_CPU_ISA names, else the fastest, until `use_isa` names another. Throws
// std::invalid_argument for one that is not supported. Not to be changed while a kernel runs.
Isa isa_in_use();
const char* isa_name();
void use_isa(const std::string& name);

}  // namespace kpig::cpu

// For sources that are built once for each instruction set (see vec.hpp): declare the functions of all of them, and
// take the one in use.
#if defined(__x86_64__)
#define KPIG_FOR_EACH_ISA(declare) declare(portable) declare(avx2) declare(avx512)
#define KPIG_IN_USE(function)                                                  \
  (kpig::cpu::isa_in_use() == kpig::cpu::Isa::avx512 ? &kpig::avx512::function \
   : kpig::cpu::isa_in_use() == kpig::cpu::Isa::avx2 ? &kpig::avx2::function   \
                                                     : &kpig::portable::function)
#else
#define KPIG_FOR_EACH_ISA(declare) declare(portable)
#define KPIG_IN_USE(function) (&kpig::portable::function)
#endif
