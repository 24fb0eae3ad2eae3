// Work on XLA's threads, in pieces.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

// Calls work(0) … work(count - 1) on XLA's threads. The caller takes part, and waits only for pieces that another thread
// has begun: there is no deadlock if all threads of the pool wait here.
inline void InParallel(xla::ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t count, done = 0;
    const std::function<void(int64_t)>* work;  // valid until all pieces are done
    std::string error;
    std::mutex mutex;
    std::condition_variable finished;
    void TakePieces() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        std::string failure;
        try {
          (*work)(i);
        } catch (const std::exception& e) {
          failure = e.what();
        }
        std::lock_guard<std::mutex> lock(mutex);
        if (!failure.empty()) error = failure;
        if (++done == count) finished.notify_all();
      }
    }
  };
  auto state = std::make_shared<State>();
  state->count = count;
  state->work = &work;
  for (int64_t i = 1; i < std::min(count, pool.num_threads()); ++i) pool.Schedule([state] { state->TakePieces(); });
  state->TakePieces();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == state->count; });
  if (!state->error.empty()) throw std::runtime_error(state->error);
}
