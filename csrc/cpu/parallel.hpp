// Work on several threads: those of the OpenMP runtime that torch has loaded, so that there is no second set of them.
#pragma once

#include <cstdint>
#include <functional>

namespace kpig::cpu {

// work(task, worker) for every task below `tasks`, on at most `threads` workers: 0 <= worker < threads. Each worker
// takes the next task that nobody has, so which worker runs a task must not change its result.
void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t, int)>& work);

// Which threads `parallel_for` uses: the file name of an OpenMP runtime, or "std::thread" where none is loaded.
const char* thread_source();

}  // namespace kpig::cpu
