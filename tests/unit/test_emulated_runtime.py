"""The stand-in for the CUDA runtime, and the layer for Python above it: late, in any order, between processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_memory import device_bytes

from mpilsgd import extension

pytestmark = pytest.mark.gpu
core, emulated = extension.core, extension.emulated
__test__ = emulated is not None  # on a GPU there is nothing to be tested here
if emulated is not None:
    device = core.device
UNKNOWN, OUT_OF_MEMORY, INVALID = 999, 2, 1
LONG = 1e6  # work does not start unless somebody waits for it


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    emulated.clear()
    yield
    emulated.clear()


def view(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=np.uint8)


@pytest.fixture
def stream() -> Iterator[int]:
    made = device.new_stream(0)
    yield made
    device.drop_stream(0, made)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_fresh_memory_is_nan_and_of_its_device() -> None:
    address = device.allocate(0, 4000)
    assert address % 256 == 0
    for dtype in (np.float16, np.float32, np.float64):
        assert np.isnan(view(address, 4000).view(dtype)).all()
    assert torch.frombuffer(view(address, 4000), dtype=torch.bfloat16).isnan().all()
    assert [emulated.owner(address + k) for k in (-1, 0, 3999, 4000)] == [-1, 0, 0, -1]
    device.release(0, address)
    assert emulated.owner(address) == -1
    with pytest.raises(RuntimeError, match="mpilsgd: CUDA: cudaFree: invalid argument"):
        device.release(0, address)
    device.release(0, device.allocate(0, 0))


def test_memory_as_a_tensor() -> None:
    address = device.allocate(0, 64)
    x = torch.from_dlpack(device.vector(0, address, 48)).view(torch.float32)
    assert (x.data_ptr(), x.numel()) == (address, 12) and x.isnan().all()
    del x
    device.vector(0, address, 48)  # nobody takes it
    device.release(0, address)


def test_memory_is_counted_and_ends() -> None:
    free, total = device.memory(0)
    address = device.allocate(0, 1 << 20)
    assert device.memory(0) == (free - (1 << 20), total)
    with pytest.raises(
        MemoryError, match=rf"device 0 has no {total} bytes: {free - (1 << 20)} are free of {total}"
    ):
        device.allocate(0, total)
    assert emulated.last_error() == 0
    device.release(0, address)
    assert device.memory(0) == (free, total)
    emulated.fail("cudaMalloc", 1, OUT_OF_MEMORY)
    with pytest.raises(MemoryError):
        device.allocate(0, 1)


def test_host_memory_is_pinned_once() -> None:
    host = np.zeros(10_000, dtype=np.uint8)
    address = host.ctypes.data
    device.pin(address, 10_000)
    with pytest.raises(RuntimeError, match="already mapped"):
        device.pin(address + 100, 10)
    device.unpin(address)
    with pytest.raises(RuntimeError, match="this is not pinned"):
        device.unpin(address)
    device.pin(address + 100, 10, 0)
    device.unpin(address + 100)
    emulated.fail("cudaHostGetDevicePointer", 1, INVALID)
    with pytest.raises(RuntimeError, match="cudaHostGetDevicePointer"):
        device.pin(address, 10)
    device.pin(address, 10)
    device.unpin(address)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_work_is_late_and_in_order(stream: int) -> None:
    emulated.delay(LONG)
    memory = device_bytes(1000).numpy()
    at = memory.ctypes.data
    device.fill(0, at, 1, 1000, stream)
    device.fill(0, at, 2, 500, stream)
    device.copy(0, at + 750, at, 250, stream)
    time.sleep(0.01)
    assert (memory == 0xFF).all()
    device.synchronize(0, stream)
    assert (memory[:500] == 2).all() and (memory[500:750] == 1).all() and (memory[750:] == 2).all()


def test_copies_from_pageable_memory_are_read_at_once(stream: int) -> None:
    emulated.delay(LONG)
    memory, host = device_bytes(100).numpy(), np.full(100, 7, dtype=np.uint8)
    pinned = np.full(100, 7, dtype=np.uint8)
    device.pin(pinned.ctypes.data, 100)
    for source, later in ((host, 7), (pinned, 8)):
        source[:] = 7
        device.copy(0, memory.ctypes.data, source.ctypes.data, 100, stream)
        source[:] = 8
        device.synchronize(0, stream)
        assert (memory == later).all()
    back = np.zeros(100, dtype=np.uint8)
    device.copy(0, back.ctypes.data, memory.ctypes.data, 100, stream)  # to pageable memory it waits
    assert (back == 8).all()
    pinned[:] = 0
    device.copy(0, pinned.ctypes.data, memory.ctypes.data, 100, stream)
    assert (pinned == 0).all()
    device.synchronize(0, stream)
    assert (pinned == 8).all()
    device.unpin(pinned.ctypes.data)
    with pytest.raises(RuntimeError, match="invalid argument"):
        device.copy(0, memory.ctypes.data + 50, host.ctypes.data, 51, stream)
    with pytest.raises(RuntimeError, match="invalid argument"):
        device.fill(0, host.ctypes.data, 0, 10, stream)


def test_an_event_orders_streams() -> None:
    emulated.delay(LONG)
    memory = device_bytes(100).numpy()
    at, (a, b) = memory.ctypes.data, (device.new_stream(0), device.new_stream(0))
    event = device.Event(0, False)
    event.wait(b)  # never recorded: no wait
    assert event.passed()
    device.fill(0, at, 1, 100, a)
    event.record(a)
    event.wait(b)
    device.copy(0, at + 50, at, 50, b)
    device.fill(0, at, 3, 50, a)  # behind the record: not waited for
    event.record(a)
    assert not event.passed() and emulated.last_error() == 0
    device.synchronize(0, b)
    assert (memory == 1).all()  # the first record, and what it needed, and no more
    assert not event.passed()
    device.synchronize(0, a)
    assert event.passed() and (memory[:50] == 3).all() and (memory[50:] == 1).all()
    for one in (a, b):
        device.drop_stream(0, one)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        device.synchronize(0, a)


def test_without_an_event_streams_have_no_order() -> None:
    memory, a, b = device_bytes(10).numpy(), device.new_stream(0), device.new_stream(0)
    seen = set()
    emulated.delay(1e-3)
    for seed in range(100):
        emulated.seed(seed)
        device.fill(0, memory.ctypes.data, 1, 10, a)
        device.fill(0, memory.ctypes.data, 2, 10, b)
        time.sleep(3e-3)
        device.synchronize(0, a)
        device.synchronize(0, b)
        seen.add(int(memory[0]))
        if seen == {1, 2}:
            break
    assert seen == {1, 2}
    device.drop_stream(0, a)
    device.drop_stream(0, b)


def test_freeing_waits_for_the_work(stream: int) -> None:
    emulated.delay(LONG)
    host, address = np.zeros(100, dtype=np.uint8), device.allocate(0, 100)
    device.pin(host.ctypes.data, 100)
    device.fill(0, address, 5, 100, stream)
    device.copy(0, host.ctypes.data, address, 100, stream)
    device.release(0, address)
    assert (host == 5).all()
    device.unpin(host.ctypes.data)


# --- launches ---------------------------------------------------------------------------------------------------------


def test_a_barrier_that_not_all_threads_reach_is_found_out() -> None:
    emulated.uneven_barrier()
    told = "unspecified launch failure: a barrier that not all threads reach: of 64 threads of block 0, 61 wait at a"
    with pytest.raises(RuntimeError, match=told):
        emulated.drain()
    with pytest.raises(RuntimeError, match="not all threads reach"):  # the device is lost
        device.memory(0)
    emulated.clear()
    device.memory(0)


def turns(seed: int, blocks: int = 4) -> np.ndarray:
    memory = device_bytes(4 * (1 + 32 * blocks)).numpy().view(np.uint32)
    memory[:] = 0
    emulated.seed(seed)
    emulated.order(memory.ctypes.data, blocks)
    emulated.drain()
    assert memory[0] == 32 * blocks
    return memory[1:].copy()


def test_seeds_give_orders_of_blocks_and_threads() -> None:
    found = [turns(seed).reshape(4, 32) for seed in range(10)]
    assert (turns(3).reshape(4, 32) == found[3]).all()
    assert len({tuple(np.argsort(one.min(1))) for one in found}) > 3  # of blocks
    assert len({tuple(np.argsort(one[0])) for one in found}) == 10  # of threads
    for one in found:
        assert (np.ptp(one, axis=1) == 31).all()  # a block after the other


# --- calls that fail, and the log -------------------------------------------------------------------------------------


def test_any_call_can_fail_once() -> None:
    emulated.fail("cudaMemGetInfo", 2, UNKNOWN)
    device.memory(0)
    with pytest.raises(RuntimeError, match="mpilsgd: CUDA: cudaMemGetInfo: unknown error"):
        device.memory(0)
    device.memory(0)
    assert emulated.log()["cudaMemGetInfo"] == 3
    emulated.clear()
    assert emulated.log() == {} and emulated.launches() == []


def test_every_call_that_fails_says_so() -> None:
    event, address = device.Event(0, True), device.allocate(0, 64)
    for name, call in {
        "cudaGetDeviceProperties": lambda: device.identity(0),
        "cudaDriverGetVersion": device.versions,
        "cudaRuntimeGetVersion": device.versions,
        "cudaMalloc": lambda: device.allocate(0, 1),
        "cudaIpcGetMemHandle": lambda: device.memory_handle(0, address),
        "cudaMemcpyAsync": lambda: device.copy(0, address, address, 0, 0),
        "cudaMemsetAsync": lambda: device.fill(0, address, 0, 64, 0),
        "cudaStreamCreateWithFlags": lambda: device.new_stream(0),
        "cudaStreamSynchronize": lambda: device.synchronize(0, 0),
        "cudaHostRegister": lambda: device.pin(id(event), 1),
        "cudaEventCreateWithFlags": lambda: device.Event(0, False),
        "cudaEventRecord": lambda: event.record(0),
        "cudaStreamWaitEvent": lambda: event.wait(0),
        "cudaEventQuery": event.passed,
        "cudaIpcGetEventHandle": event.handle,
        "cudaGetDevice": lambda: device.memory(0),
        "cudaFree": lambda: device.release(0, address),
    }.items():
        emulated.fail(name, 1, UNKNOWN)
        with pytest.raises(RuntimeError, match=f"mpilsgd: CUDA: {name}: unknown error"):
            call()
        assert emulated.last_error() == 0, name
    emulated.fail("cudaGetDeviceCount", 1, UNKNOWN)
    assert device.count() == 0 and device.count() == 1
    for call in (lambda: device.memory(5), lambda: device.identity(-1)):
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            call()
    with pytest.raises(RuntimeError, match="wrong length"):
        device.open_memory(0, b"short")


# --- between processes ------------------------------------------------------------------------------------------------

PREAMBLE = """
import ctypes, importlib.machinery, importlib.util, os, sys, time
loader = importlib.machinery.ExtensionFileLoader("mpilsgd._core", sys.argv[1])
core = importlib.util.module_from_spec(importlib.util.spec_from_loader("mpilsgd._core", loader))
loader.exec_module(core)
device, emulated = core.device, core.emulated
def view(address, n): return (ctypes.c_ubyte * n).from_address(address)
def say(*words): print(*words, flush=True)
def ask(): return sys.stdin.readline().strip()
"""


class Process:
    """Another process with the extension, told and asked by lines."""

    def __init__(self, script: str, **environment: str):
        self.run = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), core.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def tell(self, line: str) -> None:
        assert self.run.stdin is not None
        self.run.stdin.write(line + "\n")
        self.run.stdin.flush()

    def hear(self) -> str:
        assert self.run.stdout is not None
        return self.run.stdout.readline().strip()

    def end(self, status: int = 0) -> None:
        self.run.communicate(timeout=30)
        assert self.run.returncode == status


def files(pid: int) -> list[Path]:
    return [path for path in Path("/dev/shm").glob("mpilsgd-cuda-*") if path.name.split("-")[3] == str(pid)]


def test_memory_is_opened_by_another_process() -> None:
    other = Process("""
        at = device.open_memory(0, bytes.fromhex(ask()))
        assert device.open_memory(0, bytes.fromhex(ask())) == at
        say(view(at, 100)[7], emulated.owner(at), emulated.owner(at + 99), emulated.owner(at + 100))
        device.fill(0, at, 9, 100, 0)
        device.synchronize(0, 0)
        say("filled")
        ask()
        say(view(at, 100)[7])
        for _ in range(2):
            assert emulated.owner(at) == 0
            device.close_memory(0, at)
        assert emulated.owner(at) == -1
        try:
            device.close_memory(0, at)
        except RuntimeError as error:
            say(error)
    """)
    address = device.allocate(0, 100)
    memory = view(address, 100)
    memory[:] = 5
    handle = device.memory_handle(0, address)
    assert len(handle) == 64
    with pytest.raises(RuntimeError, match="invalid argument"):
        device.memory_handle(0, address + 1)
    with pytest.raises(RuntimeError, match="invalid device context"):
        device.open_memory(0, handle)
    other.tell(handle.hex())
    other.tell(handle.hex())
    assert other.hear() == "5 0 0 -1"
    assert other.hear() == "filled" and (memory == 9).all()
    del memory
    device.release(0, address)
    other.tell("freed")
    assert other.hear() == "255"  # poisoned, as it was freed under its feet
    assert "invalid argument" in other.hear()
    other.end()
    late = Process("""
        try:
            device.open_memory(0, bytes.fromhex(ask()))
        except RuntimeError as error:
            say(error)
    """)
    late.tell(handle.hex())
    assert "mapping of buffer object failed" in late.hear()
    late.end()


def test_an_event_orders_processes() -> None:
    other = Process("""
        at, event = device.open_memory(0, bytes.fromhex(ask())), device.Event.opened(0, bytes.fromhex(ask()))
        mine = device.Event(0, True)
        say(mine.handle().hex())
        say(event.passed())
        event.wait(0)
        device.copy(0, at + 50, at, 50, 0)
        mine.record(0)
        say("queued", mine.passed())
        ask()
    """)
    address = device.allocate(0, 100)
    memory, event = view(address, 100), device.Event(0, True)
    handle = event.handle()
    with pytest.raises(RuntimeError, match="invalid device context"):
        device.Event.opened(0, handle)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        device.Event(0, False).handle()
    emulated.delay(LONG)
    device.fill(0, address, 4, 100, 0)
    event.record(0)
    other.tell(device.memory_handle(0, address).hex())
    other.tell(handle.hex())
    theirs = device.Event.opened(0, bytes.fromhex(other.hear()))
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        theirs.handle()
    assert other.hear() == "False"
    assert other.hear() == "queued False"
    theirs.wait(stream := device.new_stream(0))
    device.fill(0, address, 6, 50, stream)
    time.sleep(0.05)
    assert (memory == 0xFF).all() and not theirs.passed()
    device.synchronize(0, 0)  # of our own; the rest follows
    device.synchronize(0, stream)
    assert theirs.passed() and (memory[:50] == 6).all() and (memory[50:] == 4).all()
    other.tell("end")
    other.end()
    device.drop_stream(0, stream)
    del memory
    device.release(0, address)


def test_a_wait_for_a_process_that_died_ends() -> None:
    other = Process("""
        event = device.Event(0, True)
        emulated.delay(1e6)
        event.record(0)
        say(event.handle().hex())
        ask()
        os._exit(3)
    """)
    event = device.Event.opened(0, bytes.fromhex(other.hear()))
    event.wait(0)
    other.tell("die")
    device.synchronize(0, 0)
    assert not event.passed()
    other.end(3)


def test_shared_memory_goes_with_its_process() -> None:
    for end, status in (("pass", 0), ("raise ValueError", 1), ("sys.exit(4)", 4), ("os._exit(5)", 5)):
        one = Process(f"""
            kept = device.allocate(0, 100), device.Event(0, True)
            device.fill(0, kept[0], 1, 100, device.new_stream(0))
            sys.stderr = open(os.devnull, "w")
            say("ready")
            ask()
            {end}
        """)
        assert one.hear() == "ready" and len(files(one.run.pid)) == 2
        one.tell("go on")
        one.end(status)
        assert len(files(one.run.pid)) == (2 if "_exit" in end else 0)
    again = Process("device.release(0, device.allocate(0, 1))")  # whoever starts next finds what was left
    again.end()
    assert not files(one.run.pid) and not files(again.run.pid)


def test_a_fork_does_not_hang_and_takes_nothing_along() -> None:
    one = Process("""
        emulated.owner(0)
        if (child := os.fork()) == 0:  # nothing was called yet: it may begin
            device.release(0, device.allocate(0, 10))
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        at, event = device.allocate(0, 100), device.Event(0, True)
        emulated.delay(1e6)
        device.fill(0, at, 1, 100, 0)
        if (child := os.fork()) == 0:
            for call in (lambda: device.memory(0), lambda: device.synchronize(0, 0), emulated.drain):
                try:
                    call()
                except RuntimeError as error:
                    assert "initialization error" in str(error), error
                else:
                    os._exit(9)
            assert emulated.owner(at) == 0
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        device.synchronize(0, 0)
        say(view(at, 100)[0])
        ask()
    """)
    assert one.hear() == "1" and len(files(one.run.pid)) == 2
    one.tell("end")
    one.end()


def test_several_devices_and_little_memory() -> None:
    one = Process(
        """
        names = {device.identity(i) for i in range(3)}
        say(device.count(), len(names), device.can_access(0, 2), device.can_access(1, 1))
        device.enable_access(0, 1)
        device.enable_access(0, 1)
        device.enable_access(2, 2)
        a, b = device.allocate(1, 50000), device.allocate(2, 50000)
        say(emulated.owner(a), emulated.owner(b), emulated.last_error())
        say(*(device.memory(i)[1] for i in range(3)), device.memory(0)[0] > device.memory(1)[0])
        try:
            device.allocate(1, 60000)
        except MemoryError as error:
            say(error)
        event = device.Event(1, False)
        device.fill(1, a, 3, 50000, 0)
        event.record(0)
        other = device.Event(2, False)
        device.synchronize(2, 0)
        stream = device.new_stream(2)
        event.wait(stream)
        device.copy(2, b, a, 50000, stream)
        device.synchronize(2, stream)
        say(view(b, 50000)[49999])
        try:
            device.fill(1, a, 3, 1, stream), event.record(stream)
        except RuntimeError as error:
            say(error)
        say(device.versions()[0] > 0)
        """,
        MPILSGD_EMULATED_DEVICES="3",
        MPILSGD_EMULATED_MEMORY="100000",
    )
    assert one.hear() == "3 3 True True"
    assert one.hear() == "1 2 0"
    assert one.hear() == "100000 100000 100000 True"
    assert "device 1 has no 60000 bytes" in one.hear()
    assert one.hear() == "3"
    assert "invalid resource handle" in one.hear()
    assert one.hear() == "True"
    one.end()
    none = Process("say(device.count(), core.cuda_device_count(), core.cuda)", MPILSGD_EMULATED_DEVICES="0")
    assert none.hear() == "0 0 True"
    none.end()
