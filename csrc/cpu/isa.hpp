// Which of the instruction sets that the kernels are built for are used.
#pragma once

#include <string>
#include <vector>

namespace kpig::cpu {

enum class Isa { portable, avx2, avx512 };

bool supports(Isa isa);

// Names of what this machine supports, the fastest first.
std::vector<std::string> supported_isas();

// The one in use: the fastest, until `use_isa` names another. Throws std::invalid_argument for one that is not
// supported. Not to be changed while a kernel runs.
Isa isa_in_use();
void use_isa(const std::string& name);

}  // namespace kpig::cpu
