// The binding: gathers the arguments of an operation, releases the GIL, runs it, returns its tally. All
// checks are done in mpilsgd/kernels.py: the addresses that come in here are taken as they are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "beats.h"
#include "kernels.h"
#include "shared.h"
#ifdef MPILSGD_WITH_CUDA
#include "cuda_results.h"
#include "device.h"
#include "device_module.h"
#endif
#ifdef MPILSGD_EMULATED
#include "emulated/binding.h"
#endif

namespace py = pybind11;
using mpilsgd::DType;
using mpilsgd::Tally;
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

namespace {

// What every function takes first. device is -1 for the CPU, where queue is the number of threads; else the
// CUDA device, where queue is the stream.
struct Where {
  DType dtype;
  std::int64_t n;
  int device;
  Address queue;
  bool stats;
  std::uint32_t seed;
};

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

py::tuple as_tuple(const Tally& tally, const py::tuple& bad_peers) {
  return py::make_tuple(tally.squared_distance, tally.finite, tally.source_finite, bad_peers);
}

#ifdef MPILSGD_WITH_CUDA
using mpilsgd::cuda::Pending;

// Lets Python's handlers of signals run; one that raises ends the wait.
void handle_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals()) throw py::error_already_set();
}

py::tuple result(Pending& pending) {
  {
    py::gil_scoped_release release;
    pending.wait(handle_signals);
  }
  return as_tuple(pending.tally(), py::tuple(py::cast(pending.bad_peers())));
}

template <class Op>
py::object on_device(const Op& op, const Where& where) {
  std::shared_ptr<Pending> found;
  {
    py::gil_scoped_release release;
    found = mpilsgd::cuda::run(op, {where.device, at(where.queue)});
  }
  return py::cast(found);
}
#else
template <class Op>
py::object on_device(const Op&, const Where&) {
  throw std::runtime_error("mpilsgd was built without CUDA");
}
#endif

// None, or (squared_distance, finite, source_finite, bad_peers), on a device to come (Pending).
template <class Op>
py::object finish(Op& op, const Where& where, const std::vector<unsigned char>& bad = {}) {
  op.dtype = where.dtype;
  op.n = where.n;
  op.stats = where.stats;
  op.seed = where.seed;
  if (where.device >= 0) return on_device(op, where);
  Tally tally;
  {
    py::gil_scoped_release release;
    tally = mpilsgd::cpu::run(op, int(where.queue));
  }
  if (!op.stats) return py::none();
  py::list indices;
  for (std::size_t i = 0; i < bad.size(); ++i) {
    if (bad[i]) indices.append(i);
  }
  return as_tuple(tally, py::tuple(indices));
}

template <class Op>
py::object finish(Op& op, const Where& where, const Addresses& peers) {
  std::vector<void*> pointers;
  for (Address peer : peers) pointers.push_back(at(peer));
  std::vector<unsigned char> bad(peers.size());
  op.peers = pointers.data();
  op.n_peers = int(peers.size());
  op.bad_peers = bad.data();
  return finish(op, where, bad);
}

py::object pull(const Where& where, const Addresses& peers, Address leader, double rate, Address other,
                double other_rate) {
  mpilsgd::Pull op;
  op.leader = at(leader);
  op.other = at(other);
  op.rate = rate;
  op.other_rate = other_rate;
  return finish(op, where, peers);
}

py::object elastic(const Where& where, Address center, const Addresses& peers, double moving_rate,
                   double rate, bool gauss_seidel) {
  mpilsgd::Elastic op;
  op.center = at(center);
  op.moving_rate = moving_rate;
  op.rate = rate;
  op.gauss_seidel = gauss_seidel;
  return finish(op, where, peers);
}

py::object elastic_sum(const Where& where, Address total, Address center, const Addresses& peers,
                       double moving_rate) {
  mpilsgd::ElasticSum op;
  op.total = at(total);
  op.center = at(center);
  op.moving_rate = moving_rate;
  return finish(op, where, peers);
}

py::object elastic_apply(const Where& where, Address center, const Addresses& peers, Address total,
                         double moving_rate, double rate) {
  mpilsgd::ElasticApply op;
  op.center = at(center);
  op.total = at(total);
  op.moving_rate = moving_rate;
  op.rate = rate;
  return finish(op, where, peers);
}

py::object total(const Where& where, Address out, const Addresses& peers) {
  mpilsgd::Total op;
  op.out = at(out);
  return finish(op, where, peers);
}

py::object assign(const Where& where, const Addresses& peers, Address total, double scale) {
  mpilsgd::Assign op;
  op.total = at(total);
  op.scale = scale;
  return finish(op, where, peers);
}

py::object average(const Where& where, const Addresses& peers) {
  mpilsgd::Average op;
  return finish(op, where, peers);
}

py::object msgd(const Where& where, Address x, Address grad, Address velocity, double lr, double momentum,
                bool nesterov, double weight_decay, Address leader, double rate, Address other,
                double other_rate, Address lr_at, bool lr_is_double) {
  mpilsgd::Msgd op;
  op.x = at(x);
  op.grad = at(grad);
  op.velocity = at(velocity);
  op.lr = lr;
  op.lr_at = at(lr_at);
  op.lr_is_double = lr_is_double;
  op.momentum = momentum;
  op.nesterov = nesterov;
  op.weight_decay = weight_decay;
  op.leader = at(leader);
  op.rate = rate;
  op.other = at(other);
  op.other_rate = other_rate;
  return finish(op, where);
}

py::object iterate(const Where& where, Address x, Address velocity, double step) {
  mpilsgd::Iterate op;
  op.x = at(x);
  op.velocity = at(velocity);
  op.step = step;
  return finish(op, where);
}

py::object push(const Where& where, Address center, Address x, Address anchor, double rate, Address velocity,
                double momentum) {
  mpilsgd::Push op;
  op.center = at(center);
  op.x = at(x);
  op.anchor = at(anchor);
  op.rate = rate;
  op.velocity = at(velocity);
  op.momentum = momentum;
  return finish(op, where);
}

py::object outer(const Where& where, Address center, Address velocity, Address mean, double momentum,
                 double kept, double look) {
  mpilsgd::Outer op;
  op.center = at(center);
  op.velocity = at(velocity);
  op.mean = at(mean);
  op.momentum = momentum;
  op.kept = kept;
  op.look = look;
  return finish(op, where);
}

py::object check(const Where& where, Address x) {
  mpilsgd::Check op;
  op.x = at(x);
  return finish(op, where);
}

void encode(const Where& where, Address x, Address codes, int bits, Address residual, Address base,
            double weight) {
  mpilsgd::Encode op;
  op.x = at(x);
  op.codes = at<unsigned char>(codes);
  op.bits = bits;
  op.residual = at(residual);
  op.base = at(base);
  op.weight = weight;
  finish(op, where);
}

void decode(const Where& where, Address codes, Address out, int bits, Address base, double weight, bool add,
            bool follow) {
  mpilsgd::Decode op;
  op.codes = at<unsigned char>(codes);
  op.out = at(out);
  op.bits = bits;
  op.base = at(base);
  op.weight = weight;
  op.add = add;
  op.follow = follow;
  finish(op, where);
}

py::object triad(const Where& where, Address a, Address b, Address c, double scale, bool streaming) {
  mpilsgd::Triad op;
  op.a = at(a);
  op.b = at(b);
  op.c = at(c);
  op.scale = scale;
  op.streaming = streaming;
  return finish(op, where);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (mpilsgd::cpu::has_instruction_set(name)) names.push_back(name);
  }
  return names;
}

void select_instruction_set(const std::string& name) {
  if (!mpilsgd::cpu::select_instruction_set(name.c_str())) {
    throw py::value_error("no instruction set '" + name + "' on this CPU");
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The kernels of mpilsgd; use them through mpilsgd.kernels, which checks its arguments.";

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float64", DType::kFloat64)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);

  py::class_<Where>(m, "Where")
      .def(py::init([](DType dtype, std::int64_t n, int device, Address queue, bool stats,
                       std::uint32_t seed) { return Where{dtype, n, device, queue, stats, seed}; }),
           py::arg("dtype"), py::arg("n"), py::arg("device"), py::arg("queue"), py::arg("stats"),
           py::arg("seed"));

  m.def("pull", &pull);
  m.def("elastic", &elastic);
  m.def("elastic_sum", &elastic_sum);
  m.def("elastic_apply", &elastic_apply);
  m.def("total", &total);
  m.def("assign", &assign);
  m.def("average", &average);
  m.def("msgd", &msgd);
  m.def("iterate", &iterate);
  m.def("push", &push);
  m.def("outer", &outer);
  m.def("check", &check);
  m.def("encode", &encode);
  m.def("decode", &decode);
  m.def("triad", &triad);

  bind_shared(m);

  py::class_<mpilsgd::Beats>(m, "Beats")
      .def(py::init([](Address isend, Address test, bool int_handles, Address comm, Address byte,
                       std::vector<int> peers, Address words, std::size_t n_words, double every) {
             const mpilsgd::MpiCalls mpi{at(isend), at(test), int_handles, comm, byte};
             return mpilsgd::start_beats(mpi, std::move(peers), at<std::int64_t>(words), n_words, every);
           }),
           py::arg("isend"), py::arg("test"), py::arg("int_handles"), py::arg("comm"), py::arg("byte"),
           py::arg("peers"), py::arg("words"), py::arg("n_words"), py::arg("every"))
      .def("stop", &mpilsgd::Beats::stop, py::call_guard<py::gil_scoped_release>());

  m.def("instruction_set", &mpilsgd::cpu::instruction_set);
  m.def("instruction_sets", &instruction_sets, "Those that are built in and that this CPU has.");
  m.def("select_instruction_set", &select_instruction_set, "For tests.");

#ifdef MPILSGD_WITH_CUDA
  m.attr("cuda") = true;
  m.def("cuda_device_count", &mpilsgd::device::count);
  py::class_<Pending, std::shared_ptr<Pending>>(m, "Pending", "Statistics on their way from the device.")
      .def("ready", &Pending::ready)
      .def("get", &result, "Waits: (squared_distance, finite, source_finite, bad_peers).");
  bind_device(m);
#else
  m.attr("cuda") = false;
  m.def("cuda_device_count", [] { return 0; });
#endif
#ifdef MPILSGD_EMULATED
  bind_emulated(m);
#endif
}
