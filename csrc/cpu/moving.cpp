// Moving tokens on the CPU: runs of bytes from place to place, each read and written once.
//
// Tokens that stay next to each other move together, so a cache that loses one token in ten moves in pieces of ten. In
// place a task owns a lane, or some bytes of each of its tokens, and goes through it upwards: positions ascend, so no
// token is overwritten before it is read. Tasks share nothing; the order of threads changes no byte.
//
// Cost: bytes kept, read once and written once. Where tokens are few and far apart every row costs a walk through the
// page tables besides: one thread of an EPYC (Zen 4, 4 KB pages, virtual machine) takes 12 ns for a row of 256 bytes from
// caches that fit L3 and 46 ns from 400 MB, where a plain copy takes 6 and 14 ns. Tokens asked for 4 -> 16 ahead, into L2:
// 39 ns; their pages 96 ahead: 35 ns; stores past the caches (non-temporal): 46 ns. Two threads: 70 % of a plain copy's
// rate at best with rows of 256 or 512 bytes (66 to 69 % in the recorded run), all of it with runs or rows of 8 KB.

#include "cpu/moving.h"

#include <cstring>

#include "cpu/threads.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTaskBytes = 1 << 18;  // about what a task moves where it can be divided
constexpr int64_t kAhead = 16;           // tokens asked for before they are moved
constexpr int64_t kFarAhead = 96;        // and their pages before that
constexpr int64_t kLine = 64;

// Bytes begin..end of tokens first..last of one lane.
struct Task {
  const Job* job;
  int64_t lane, first, last, begin, end;
};

std::vector<Task> tasks_of(const Plan& plan) {
  std::vector<Task> tasks;
  for (const Job& job : plan.jobs) {
    const Form& form = plan.forms[job.form];
    const int64_t lanes = form.lanes(), count = plan.positions.count, width = form.width;
    // in place the tokens of a lane follow each other, and only their bytes can be divided
    const int64_t tokens = plan.in_place ? count : std::max<int64_t>(1, kTaskBytes / width);
    const int64_t bytes = plan.in_place ? std::max<int64_t>(16 * kLine, kTaskBytes / count / kLine * kLine) : width;
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
        whole_(task.end - task.begin == form_.width) {}

  int64_t length() const { return positions_.length(lane_.batch); }
  int64_t position(int64_t r) const { return positions_.keep[lane_.keep + r * positions_.keep_token]; }
  const char* from(int64_t r) const {
    return from_ + positions_.offset(form_, lane_.batch, position(r), form_.from_token);
  }
  char* to(int64_t r) const { return to_ + positions_.offset(form_, lane_.batch, r, form_.to_token); }

  // How many tokens from r on, before `last`, follow each other in memory where they come from and where they go.
  int64_t run(int64_t r, int64_t last) const {
    if (!whole_ || form_.from_token != form_.width || form_.to_token != form_.width) return 1;
    const int64_t start = position(r);
    if (positions_.table) {  // within a page
      const int64_t page = positions_.page;
      last = std::min({last, r + page - start % page, r + page - r % page});
    }
    int64_t count = 1;
    while (r + count < last && position(r + count) == start + count) ++count;
    return count;
  }

 private:
  const Form& form_;
  const Positions& positions_;
  Lane lane_;
  const char* from_;
  char* to_;
  bool whole_;
};

// As memmove, without a call where bytes are few.
inline void move(char* to, const char* from, int64_t bytes) {
  const auto fixed = [&]<class T>(T value) {
    std::memcpy(&value, from, sizeof(T));
    std::memcpy(to, &value, sizeof(T));
  };
  switch (bytes) {
    case 1: return fixed(uint8_t{});
    case 2: return fixed(uint16_t{});
    case 4: return fixed(uint32_t{});
    case 8: return fixed(uint64_t{});
    default: std::memmove(to, from, bytes);
  }
}

void run_task(const Plan& plan, const Task& task) {
  const Route route(plan, task);
  const int64_t bytes = task.end - task.begin, last = std::min(task.last, std::max(task.first, route.length()));
  for (int64_t r = task.first; r < last;) {
    const int64_t count = route.run(r, last);
    const char* from = route.from(r);
    char* to = route.to(r);
    if (const int64_t far = r + count + kFarAhead - 1; far < last) __builtin_prefetch(route.from(far), 0, 2);
    if (const int64_t next = r + count + kAhead - 1; next < last) {
      const char* ahead = route.from(next);
      for (int64_t byte = 0; byte < std::min<int64_t>(bytes, 16 * kLine); byte += kLine)
        __builtin_prefetch(ahead + byte, 0, 2);
    }
    if (from != to) move(to, from, count * bytes);
    r += count;
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
    moves::expect(0 <= length && length <= positions.count, "a length is out of range");
    const int64_t* own = positions.keep;
    if (keep.dim() > 1) own += b * keep.stride(0);
    if (keep.dim() == 3) own += row % heads * keep.stride(1);
    for (int64_t r = 0; r < length; ++r) {
      const int64_t position = own[r * positions.keep_token];
      moves::expect(0 <= position && position < limit, "a position is out of range");
      moves::expect(!plan.in_place || r == 0 || own[(r - 1) * positions.keep_token] < position,
                    "positions do not ascend");
    }
  }
}

void run(const Plan& plan) {
  const std::vector<Task> tasks = tasks_of(plan);
  int64_t bytes = 0;
  for (const Task& task : tasks) bytes += (task.last - task.first) * (task.end - task.begin);
  each(tasks.size(), 4 * bytes, [&](int64_t i) { run_task(plan, tasks[i]); });
}

}  // namespace pruneops
