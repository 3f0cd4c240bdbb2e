#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace moqa {
namespace {

// Waking a sleeping thread takes about ten microseconds, a tenth of a small product. So a thread without work polls for
// about as long, and only then sleeps.
constexpr int LOOKS = 500;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

template <class Condition>
void look(Condition holds) {
    for (int looked = 0; looked < LOOKS && !holds(); ++looked) relax();
}

class Pool {
  public:
    void run(int threads, int items, const std::function<void(int)>& work) {
        const std::lock_guard<std::mutex> one_caller(callers_);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (; workers_ < threads - 1; ++workers_) std::thread([this, id = workers_] { serve(id); }).detach();
            work_ = &work;
            helpers_ = threads - 1;
            if (int(shares_.size()) < threads) shares_ = std::vector<Share>(threads);
            for (int t = 0; t < threads; ++t) {
                shares_[t].next = int64_t(items) * t / threads;
                shares_[t].end = int64_t(items) * (t + 1) / threads;
            }
            open_ = true;
            ++round_;
        }
        start_.notify_all();
        take(0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            open_ = false;  // threads that wake up from now on are not waited for
        }
        look([this] { return active_ == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    // A thread takes neighbouring items one after the other, so that the memory that it prefetches belongs to its own
    // next item. A thread that has finished its share helps with the others.
    struct alignas(64) Share {
        std::atomic<int> next{0};
        int end = 0;
    };

    void take(int thread) {
        const int threads = helpers_ + 1;
        for (int t = 0; t < threads; ++t) {
            Share& share = shares_[(thread + t) % threads];
            for (int item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) (*work_)(item);
        }
    }

    void serve(int id) {
        for (long seen = 0;;) {
            look([&] { return round_ != seen; });
            std::unique_lock<std::mutex> lock(mutex_);
            start_.wait(lock, [&] { return open_ && round_ != seen && id < helpers_; });
            seen = round_;
            ++active_;
            lock.unlock();
            take(id + 1);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex callers_, mutex_;
    std::condition_variable start_, done_;
    const std::function<void(int)>* work_ = nullptr;
    std::vector<Share> shares_;
    std::atomic<int> active_{0};
    std::atomic<long> round_{0};
    int helpers_ = 0, workers_ = 0;
    bool open_ = false;
};

// A forked child has none of its parent's threads: it gets a pool of its own. Pools are never destroyed, since their
// threads may outlive main.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (current == nullptr || owner != getpid()) {
        current = new Pool();
        owner = getpid();
    }
    return *current;
}

}  // namespace

void parallel(int threads, int items, const std::function<void(int)>& work) {
    threads = threads < items ? threads : items;
    if (threads > 1) return pool().run(threads, items, work);
    for (int item = 0; item < items; ++item) work(item);
}

}  // namespace moqa
