#include "cpu/isa.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace kpig::cpu {
namespace {

constexpr std::array<std::pair<Isa, const char*>, 3> kFastestFirst{
    {{Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::portable, "portable"}}};

Isa named(const std::string& name) {
  for (const auto& [isa, known] : kFastestFirst) {
    if (name == known && supports(isa)) return isa;
  }
  std::string choice;
  for (const auto& known : supported_isas()) choice += (choice.empty() ? "" : ", ") + known;
  throw std::invalid_argument("this machine has no instruction set '" + name + "'; give one of " + choice);
}

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa = [] {
    const char* wanted = std::getenv("KPIG_CPU_ISA");
    return named(wanted == nullptr ? supported_isas().front() : wanted);
  }();
  return isa;
}

}  // namespace

bool supports(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& [isa, name] : kFastestFirst) {
    if (supports(isa)) names.emplace_back(name);
  }
  return names;
}

Isa isa_in_use() { return in_use(); }

const char* isa_name() {
  for (const auto& [isa, name] : kFastestFirst) {
    if (isa == in_use()) return name;
  }
  return "";
}

void use_isa(const std::string& name) { in_use() = named(name); }

}  // namespace kpig::cpu
