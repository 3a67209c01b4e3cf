// Moving tokens on the CPU: bytes from place to place, each read and written once.
//
// Cost: bytes kept, read once and written once. Where kept tokens are few and far apart nothing but a prefetch sees the
// next one coming, and all of its lines need one: without any, tokens of 256 bytes come at half the rate of a plain
// copy. They are asked for in groups, because a processor that waits for one token looks only a few tokens further, and
// before that each one's first line alone, for its page to be looked up (a tenth of the time). Stores past the caches
// spare reading what they overwrite: a quarter of the time in large results.
//
// In place a task owns a lane, or some bytes of each of its tokens, and goes through it upwards: positions ascend, so no
// token is overwritten before it is read. Tasks share nothing; the order of threads changes no byte.

#include "cpu/token_copy.h"

#include <cstring>

#include "cpu/threads.h"

#define PRUNEOPS_KERNEL "cpu/token_copy_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTaskBytes = 1 << 18;   // about what a task moves where it can be divided
constexpr int64_t kGroup = 16;            // tokens asked for together, a group before they are moved
constexpr int64_t kPageAhead = 64;        // and their pages so many tokens before that
constexpr int64_t kPastCaches = 1 << 24;  // results of so many bytes would drive more useful ones out of the caches
constexpr int64_t kLine = 64;
constexpr int64_t kAskedBytes = 16 * kLine;  // of a token; the rest comes by itself

// Bytes begin..end of tokens first..last of one lane.
struct Task {
  const Job* job;
  int64_t lane, first, last, begin, end;
};

std::vector<Task> tasks_of(const Plan& plan) {
  int64_t all_lanes = 0;
  for (const Job& job : plan.jobs) all_lanes += plan.forms[job.form].lanes();
  // in place the tokens of a lane follow each other, and only their bytes can be divided, when lanes are few
  const int64_t pieces = 1 + 4 * torch::stable::get_num_threads() / std::max<int64_t>(1, all_lanes);
  std::vector<Task> tasks;
  for (const Job& job : plan.jobs) {
    const Form& form = plan.forms[job.form];
    const int64_t lanes = form.lanes(), count = plan.positions.count, width = form.width;
    const int64_t tokens = plan.in_place ? count : std::max<int64_t>(1, kTaskBytes / width);
    const int64_t bytes = plan.in_place ? std::max(kAskedBytes, width / pieces / kLine * kLine) : width;
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t first = 0; first < count; first += tokens)
        for (int64_t begin = 0; begin < width; begin += bytes)
          tasks.push_back(
              {&job, lane, first, std::min(first + tokens, count), begin, std::min(begin + bytes, width)});
  }
  return tasks;
}

// Where the tokens of a task lie.
class Route {
 public:
  Route(const Plan& plan, const Task& task)
      : form_(plan.forms[task.job->form]), positions_(plan.positions), lane_(form_.lane(task.lane)),
        from_(task.job->from + lane_.from + task.begin), to_(task.job->to + lane_.to + task.begin),
        bytes_(task.end - task.begin) {}

  int64_t bytes() const { return bytes_; }
  int64_t length() const { return positions_.length(lane_.batch); }
  int64_t position(int64_t r) const { return positions_.keep[lane_.keep + r * positions_.keep_token]; }
  const char* from(int64_t r) const {
    return from_ + positions_.offset(form_, lane_.batch, position(r), form_.from_token);
  }
  char* to(int64_t r) const { return to_ + positions_.offset(form_, lane_.batch, r, form_.to_token); }

 private:
  const Form& form_;
  const Positions& positions_;
  Lane lane_;
  const char* from_;
  char* to_;
  int64_t bytes_;
};

// Whether every token of a job's target is a number of whole lines.
bool in_lines(const Form& form, const Job& job) {
  uint64_t bits = uint64_t(form.width) | uint64_t(form.to_token) | reinterpret_cast<uintptr_t>(job.to);
  for (int i = 0; i < form.rank; ++i) bits |= uint64_t(form.dims[i].to);
  return bits % kLine == 0;
}

// How a token is copied: so many bytes, any number, or whole lines past the caches. It never overlaps with its place.
template <int64_t kBytes>
struct Few {
  void operator()(char* to, const char* from) const { std::memcpy(to, from, kBytes); }
};

struct Any {
  int64_t bytes;
  void operator()(char* to, const char* from) const { std::memcpy(to, from, bytes); }
};

struct PastCaches {
  int64_t bytes;
  void (*copy)(char*, const char*, int64_t) = PRUNEOPS_DISPATCH(copy_past_caches);
  void operator()(char* to, const char* from) const { copy(to, from, bytes); }
  ~PastCaches() {
#if defined(__x86_64__)
    _mm_sfence();  // before other threads read
#endif
  }
};

// Tokens first..last, in groups: while one is moved the next is on its way.
template <class Copy>
void move_tokens(const Route& route, int64_t first, int64_t last, const Copy& copy) {
  const char* from[2 * kGroup];
  const int64_t bytes = std::min(route.bytes(), kAskedBytes);
  const auto ask = [&](int64_t begin) {
    for (int64_t r = begin; r < std::min(begin + kGroup, last); ++r) {
      const char* token = from[r % (2 * kGroup)] = route.from(r);
      for (int64_t byte = 0; byte < bytes; byte += kLine) __builtin_prefetch(token + byte, 0, 2);
      if (r + kPageAhead < last) __builtin_prefetch(route.from(r + kPageAhead), 0, 2);
    }
  };
  ask(first);
  for (int64_t begin = first; begin < last; begin += kGroup) {
    ask(begin + kGroup);
    for (int64_t r = begin; r < std::min(begin + kGroup, last); ++r) {
      const char* token = from[r % (2 * kGroup)];
      char* to = route.to(r);
      if (token != to) copy(to, token);
    }
  }
}

void run_task(const Plan& plan, const Task& task, bool past_caches) {
  const Route route(plan, task);
  const int64_t bytes = route.bytes(), first = task.first, last = std::min(task.last, std::max(first, route.length()));
  switch (bytes) {
    case 1: move_tokens(route, first, last, Few<1>{}); break;
    case 2: move_tokens(route, first, last, Few<2>{}); break;
    case 4: move_tokens(route, first, last, Few<4>{}); break;
    case 8: move_tokens(route, first, last, Few<8>{}); break;
    case 16: move_tokens(route, first, last, Few<16>{}); break;
    case 32: move_tokens(route, first, last, Few<32>{}); break;
    default:
      if (past_caches && in_lines(plan.forms[task.job->form], *task.job))
        move_tokens(route, first, last, PastCaches{bytes});
      else
        move_tokens(route, first, last, Any{bytes});
  }
  if (plan.in_place) return;
  for (int64_t r = last; r < task.last; ++r) std::memset(route.to(r), 0, bytes);
}

}  // namespace

void expect_values(const Plan& plan, const Tensor& keep, int64_t limit) {
  const Positions& positions = plan.positions;
  const int64_t heads = keep.dim() == 3 ? keep.size(1) : 1, rows = keep.dim() == 1 ? 1 : keep.size(0) * heads;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / heads, length = positions.length(b);
    token_copy::expect(0 <= length && length <= positions.count, "a length is out of range");
    const int64_t* own = positions.keep;
    if (keep.dim() > 1) own += b * keep.stride(0);
    if (keep.dim() == 3) own += row % heads * keep.stride(1);
    for (int64_t r = 0; r < length; ++r) {
      const int64_t position = own[r * positions.keep_token];
      token_copy::expect(0 <= position && position < limit, "a position is out of range");
      token_copy::expect(!plan.in_place || r == 0 || own[(r - 1) * positions.keep_token] < position,
                    "positions do not ascend");
    }
  }
}

void run(const Plan& plan) {
  const std::vector<Task> tasks = tasks_of(plan);
  int64_t bytes = 0;
  for (const Task& task : tasks) bytes += (task.last - task.first) * (task.end - task.begin);
  const bool past_caches = !plan.in_place && bytes >= kPastCaches;
  each(tasks.size(), 4 * bytes, [&](int64_t i) { run_task(plan, tasks[i], past_caches); });
}

}  // namespace pruneops
