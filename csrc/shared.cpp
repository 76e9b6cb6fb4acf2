// The binding of words and meetings in shared memory. Addresses are taken as they are.
#include "shared.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include "meeting.h"
#endif

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

std::int64_t* at(Address word) { return reinterpret_cast<std::int64_t*>(word); }

// Words that processes share: atomic for all of them, and a fence for what was stored before.
std::int64_t word_add(Address word, std::int64_t value) {
  return __atomic_fetch_add(at(word), value, __ATOMIC_SEQ_CST);
}

std::int64_t word_swap(Address word, std::int64_t value) {
  return __atomic_exchange_n(at(word), value, __ATOMIC_SEQ_CST);
}

std::int64_t word_load(Address word) { return __atomic_load_n(at(word), __ATOMIC_SEQ_CST); }

// Writes the value if the word is as expected; returns what it was.
std::int64_t word_exchange(Address word, std::int64_t expected, std::int64_t value) {
  __atomic_compare_exchange_n(at(word), &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

#ifdef __linux__
using mpilsgd::Meeting;

// Lets Python's handlers of signals run; one that raises ends the wait.
void handle_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals()) throw py::error_already_set();
}

py::array_t<double> table(Meeting& meeting, const std::vector<double>& row) {
  py::array_t<double> rows({py::ssize_t(meeting.size()), py::ssize_t(row.size())});
  double* into = rows.mutable_data();
  py::gil_scoped_release release;
  meeting.table(row.data(), row.size(), into, handle_signals);
  return rows;
}

void share(Meeting& meeting, py::array_t<double, py::array::c_style> row) {
  double* numbers = row.mutable_data();
  const std::size_t count = row.size();
  py::gil_scoped_release release;
  meeting.share(numbers, count, handle_signals);
}

void fence(Meeting& meeting) {
  py::gil_scoped_release release;
  meeting.fence(handle_signals);
}

void bind_meetings(py::module_& m) {
  m.def(
      "word_await",
      [](Address word, std::int64_t value, Address sleepers, bool spins, double seconds) {
        return mpilsgd::await_word(at(word), value, at(sleepers), spins, seconds);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("word_wake", [](Address word, std::int64_t value, Address sleepers) {
    mpilsgd::wake_word(at(word), value, at(sleepers));
  });
  py::class_<Meeting>(m, "Meeting")
      .def(py::init([](Address memory, int n, int seat, int numbers, bool spins, std::vector<int> names) {
             return new Meeting(at(memory), n, seat, numbers, spins, std::move(names));
           }),
           py::arg("memory"), py::arg("n"), py::arg("seat"), py::arg("numbers"), py::arg("spins"),
           py::arg("names"))
      .def_static("bytes", &Meeting::bytes, py::arg("n"), py::arg("numbers"))
      .def("table", &table)
      .def("share", &share, py::arg("row").noconvert())
      .def("fence", &fence)
      .def("look_after", [](Meeting& meeting) { meeting.look_after(false); });
}
#else
void bind_meetings(py::module_&) {}
#endif

}  // namespace

void bind_shared(py::module_& m) {
  m.def("word_add", &word_add);
  m.def("word_swap", &word_swap);
  m.def("word_load", &word_load);
  m.def("word_exchange", &word_exchange);
  bind_meetings(m);
}
