// The least that a test program needs: a check that prints what failed, and the program's exit code.
#pragma once

#include <cstdio>

namespace kpig::tests {

inline int failures = 0;

inline void expect(bool holds, const char* what, double found, double wanted) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: found %.17g, wanted %.17g\n", what, found, wanted);
}

inline int exit_code() { return failures == 0 ? 0 : 1; }

}  // namespace kpig::tests
