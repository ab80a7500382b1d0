#include "cpu/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace kpig::cpu {
namespace {

// Runs `body(data)` once on each thread of a team; GNU's and LLVM's runtimes both export it.
using Gomp = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Runtime {
  std::string name = "std::thread";
  Gomp run = nullptr;
};

const Runtime& runtime() {
  // Looked up at the first kernel, when torch has been imported: its tensors are what kernels work on.
  static const Runtime found = [] {
    Runtime runtime;
#if defined(__linux__)
    // Through torch, so that it is torch's own runtime, whatever else is loaded.
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    void* run = torch == nullptr ? nullptr : dlsym(torch, "GOMP_parallel");
    Dl_info library;
    if (run != nullptr && dladdr(run, &library) != 0) {
      const std::string path = library.dli_fname;
      runtime = {path.substr(path.rfind('/') + 1), reinterpret_cast<Gomp>(run)};
    }
#endif
    return runtime;
  }();
  return found;
}

struct Team {
  Team(std::int64_t n_tasks, const std::function<void(std::int64_t, int)>& each) : work(each), tasks(n_tasks) {}

  const std::function<void(std::int64_t, int)>& work;
  const std::int64_t tasks;
  std::atomic<std::int64_t> next_task = 0;
  std::atomic<int> next_worker = 0;
  std::exception_ptr error = nullptr;
  std::mutex error_lock;

  void take_part() {
    const int worker = next_worker++;
    try {
      for (std::int64_t task; (task = next_task++) < tasks;) work(task, worker);
    } catch (...) {
      // No exception may pass the OpenMP runtime.
      const std::scoped_lock lock(error_lock);
      error = std::current_exception();
      next_task = tasks;
    }
  }
};

}  // namespace

void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t, int)>& work) {
  const auto size = static_cast<int>(std::min<std::int64_t>(tasks, threads));
  Team team(tasks, work);
  if (size <= 1) {
    team.take_part();
  } else if (runtime().run != nullptr) {
    runtime().run([](void* shared) { static_cast<Team*>(shared)->take_part(); }, &team, static_cast<unsigned>(size), 0);
  } else {
    std::vector<std::jthread> others;
    for (int i = 1; i < size; ++i) others.emplace_back([&team] { team.take_part(); });
    team.take_part();
  }
  if (team.error) std::rethrow_exception(team.error);
}

const char* thread_source() { return runtime().name.c_str(); }

}  // namespace kpig::cpu
