// Tasks shared out over threads: each one once, on workers that have numbers of their own, errors brought home.
#include "cpu/parallel.hpp"

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/check.hpp"

namespace {

using kpig::cpu::parallel_for;
using kpig::tests::expect;

void test_each_task_once(std::int64_t tasks, int threads) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
  std::vector<std::atomic<int>> inside(static_cast<std::size_t>(threads));
  std::atomic<bool> alone = true, known = true;
  parallel_for(tasks, threads, [&](std::int64_t task, int worker) {
    if (worker < 0 || worker >= threads) {
      known = false;
      return;
    }
    auto& of_worker = inside[static_cast<std::size_t>(worker)];
    if (of_worker++ != 0) alone = false;
    ++runs[static_cast<std::size_t>(task)];
    --of_worker;
  });
  for (const auto& count : runs) expect(count == 1, "runs of a task", count, 1);
  expect(known, "number of a worker", threads, threads);
  expect(alone, "two threads are one worker", 2, 1);
}

void test_an_error_is_thrown_where_the_work_was_asked_for(int threads) {
  std::string said;
  try {
    parallel_for(100, threads, [](std::int64_t task, int) {
      if (task == 37) throw std::runtime_error("task 37");
    });
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  expect(said == "task 37", "the error of a task", static_cast<double>(said.size()), 7);
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 7}) {
    for (const std::int64_t tasks : {0, 1, 2, 1000}) test_each_task_once(tasks, threads);
    test_an_error_is_thrown_where_the_work_was_asked_for(threads);
  }
  return kpig::tests::exit_code();
}
