"""A model's parameters, gradients and float buffers as views of one flat vector a dtype."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mpilsgd import forks
from mpilsgd.extension import place_of
from mpilsgd.layout import Place, Plan, digest, find_modules, float_buffers, padded
from mpilsgd.names import without_collector
from mpilsgd.pieces import Vectors, clear_gaps, grad_keeper, piece, seats

__all__ = ["Allocate", "FlatParameters", "digest", "find_modules", "float_buffers", "touched"]

Allocate = Callable[[torch.dtype, int], Tensor]


class FlatParameters:
    """Moves parameters and float buffers, in place and once, into one flat vector a dtype.

    Every tensor keeps its Python object, shape and strides; only its memory changes. So optimizers (with the
    state they have), schedulers, `state_dict`, `deepcopy`, gradient clipping and tied weights go on working.
    Each piece has a storage of its own that spans its own bytes alone: saving or copying one tensor does not
    drag the whole vector along.

    Args:
        parameters: tensors, or a Module, which stands for its parameters and float buffers, or a Plan that was
            made of them. Those that do not require a gradient are left out (but follow, if they are tied to one
            that does).
        buffers: more float tensors to lie behind the parameters.
        names: id of a tensor -> its name in the module, as `canonical` gives them.
        allocate: (dtype, numel) -> 1-D tensor of numel elements, on the parameters' device; called once a
            dtype, in the order of str(dtype). Default: torch.empty.
        grads: attach gradients at once (`attach_grads`).

    Attributes:
        data: dtype -> vector [parameters | buffers]; each tensor begins at a multiple of 64 bytes, gaps 0.
        n_parameters: dtype -> length of the parameter part.
        grads: dtype -> gradient vector of that length; empty until `attach_grads`.
        parameters, buffers: the tensors, in order, each once.

    Raises:
        ValueError: nothing to train, a tensor that cannot lie in a flat vector (it is named), tensors on several
            devices, or memory from `allocate` that does not fit. Nothing has been changed then.
        TypeError: something that is not a tensor.
    """

    @without_collector()
    def __init__(
        self,
        parameters: nn.Module | Iterable[Tensor] | Plan,
        buffers: Iterable[Tensor] = (),
        *,
        names: Mapping[int, str] | None = None,
        allocate: Allocate | None = None,
        grads: bool = False,
    ) -> None:
        plan = parameters if isinstance(parameters, Plan) else Plan(parameters, buffers, names)
        check_free(plan)
        self.name = plan.name
        self.parameters, self.buffers = plan.parameters, plan.buffers
        self.n_parameters = plan.n_parameters
        self.grads: Vectors = {}
        self._places, self._followers = plan.places, plan.followers
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._grad_views: dict[int, Tensor] = {}
        self.device = place_of(self.parameters[0])
        self.data = self._allocate(plan.sizes, allocate)
        for tensor in self._tensors():
            self._seat(tensor, copy=id(tensor) in plan.primaries)
        clear_gaps(self.data, [self._places[i] for i in plan.primaries])
        self._seats = seats(self._tensors())
        self._spans = {
            id(t): (
                t.data_ptr(),
                place.strides,
                slice(place.start, place.start + padded(place.numel, place.dtype)),
            )
            for t, place in ((t, self._places[id(t)]) for t in self.parameters)
            if place.slot == place.start and place.numel
        }
        for parameter in self.parameters:
            _flats[id(parameter)] = self
        forks.watch(self)
        if grads:
            self.attach_grads()

    @staticmethod
    def of(parameter: Tensor) -> FlatParameters | None:
        """The FlatParameters that holds this parameter now, if any."""
        return _flats.get(id(parameter))

    def view(self, tensor: Tensor, flats: Vectors) -> Tensor:
        """The piece of other vectors of this layout that stands for `tensor`, with its shape and strides."""
        place = self._place(tensor)
        start = place.slot if flats is self.grads else place.start
        return piece(flats[place.dtype], place, start)

    def span(self, parameter: Tensor) -> slice | None:
        """Where the parameter and its gap lie in the vector; None if it is not (or shares) its place."""
        address, strides, span = self._spans.get(id(parameter)) or (0, (), None)
        if span is None:
            self._place(parameter)
        return span if parameter.data_ptr() == address and parameter.stride() == strides else None

    def attach_grads(self, allocate: Allocate | None = None) -> None:
        """Lets every gradient, those that are there and those to come, be a view of `grads`.

        After `zero_grad(set_to_none=True)` a hook copies the next gradient into its place. Sparse gradients
        become dense. `allocate` is called as for `data`, with the lengths n_parameters (dtypes of buffers
        alone are left out).
        """
        if self.grads:
            raise RuntimeError("the gradients are attached already")
        grads = self._allocate({d: n for d, n in self.n_parameters.items() if n}, allocate)
        for vector in grads.values():
            vector.zero_()
        self.grads = grads
        for parameter in self.parameters:
            view = self.view(parameter, grads)
            self._grad_views[id(parameter)] = view
            keep = grad_keeper(view)
            keep(parameter)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(keep))

    def fill_missing_grads(self) -> list[Tensor]:
        """Makes `grads` right before it is read: 0 for parameters without a gradient, which are returned.

        A gradient that the user has put elsewhere is copied into its place.
        """
        missing = []
        for parameter in self.parameters:
            view, grad = self._grad_views[id(parameter)], parameter.grad
            if grad is None:
                view.zero_()
                missing.append(parameter)
            elif grad is not view:
                grad_keeper(view)(parameter)
        return missing

    def reseat(self) -> list[Tensor]:
        """Puts tensors whose memory was exchanged from outside (`tensor.data = ...`) back; returns them.

        RNN's `flatten_parameters` and `Module._apply` do that.
        """
        tensors = self._tensors()
        if seats(tensors) == self._seats:
            return []
        strays = [t for t in tensors if not self._seated(t)]
        for tensor in strays:
            place = self._places[id(tensor)]
            was = f"shape {tuple(place.shape)}, {place.dtype} on {self.device}"
            now = f"shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            if was != now:
                name = self.name(tensor)
                raise ValueError(f"{name} of {was} has become one of {now}: convert first, then lay flat")
        for tensor in strays:
            self._seat(tensor, copy=True)
        return strays

    def touched(self) -> None:
        """To be called when kernels or messages have written the parameters and buffers: `touched` of them all."""
        touched(self._tensors())
        forks.drop()

    def release(self) -> None:
        """Moves everything back to ordinary private memory; the vectors may be freed afterwards."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters:
            _flats.pop(id(parameter), None)
            view = self._grad_views.pop(id(parameter), None)
            if view is not None and parameter.grad is not None and _same_memory(parameter.grad, view):
                parameter.grad = view.clone(memory_format=torch.preserve_format)
        copies: dict[tuple[torch.dtype, int], Tensor] = {}
        for tensor in self._tensors():
            place = self._places[id(tensor)]
            if not self.data or not self._seated(tensor):
                continue
            key = (place.dtype, place.start if place.numel else -1 - id(tensor))
            if key not in copies:
                copies[key] = torch.empty_strided((place.numel,), (1,), dtype=place.dtype, device=self.device)
                copies[key].copy_(self.data[place.dtype][place.start : place.start + place.numel])
            tensor.data = copies[key].as_strided(place.shape, place.strides)
        self._hooks, self.data, self.grads = [], {}, {}
        forks.drop()

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters, *self.buffers, *self._followers]

    def _place(self, tensor: Tensor) -> Place:
        try:
            return self._places[id(tensor)]
        except KeyError:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not belong to these") from None

    def _seated(self, tensor: Tensor) -> bool:
        place = self._places[id(tensor)]
        vector = self.data.get(place.dtype)
        if vector is None or tensor.dtype != place.dtype or tensor.shape != place.shape:
            return False
        where = vector.data_ptr() + place.start * vector.element_size()
        return not place.numel or (tensor.data_ptr() == where and tensor.stride() == place.strides)

    def _seat(self, tensor: Tensor, copy: bool) -> None:
        place = self._places[id(tensor)]
        own = piece(self.data[place.dtype], place, place.start)
        if copy:
            own.copy_(tensor.detach())
        tensor.data = own  # the old memory is freed here, tensor by tensor: no second model at the peak

    def _allocate(self, sizes: dict[torch.dtype, int], allocate: Allocate | None) -> Vectors:
        vectors = {}
        for dtype in sorted(sizes, key=str):
            if allocate is None:
                vector = torch.empty(sizes[dtype], dtype=dtype, device=self.device)
            else:
                vector = allocate(dtype, sizes[dtype])
                self._check_memory(vector, dtype, sizes[dtype])
            vectors[dtype] = vector
        return vectors

    def _check_memory(self, vector: Tensor, dtype: torch.dtype, numel: int) -> None:
        right = isinstance(vector, Tensor) and vector.dtype == dtype and vector.shape == (numel,)
        if right and vector.is_contiguous() and place_of(vector) == self.device and not vector.requires_grad:
            return
        got = type(vector).__name__
        if isinstance(vector, Tensor):
            got = f"shape {tuple(vector.shape)}, {vector.dtype} on {vector.device}"
            got += ", not contiguous" * (not vector.is_contiguous()) + ", a leaf" * vector.requires_grad
        first = next(t for t in self._tensors() if t.dtype == dtype)
        raise ValueError(
            f"allocate({dtype}, {numel}) gave {got}; needed is a contiguous tensor of shape ({numel},), "
            f"{dtype} on {self.device} (for {self.name(first)} of shape {tuple(first.shape)} and on)"
        )


def touched(tensors: Sequence[Tensor]) -> None:
    """Tells autograd of writes behind its back, so that a graph from before them fails as after torch's own."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # older torches take one tensor at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


_flats: weakref.WeakValueDictionary[int, FlatParameters] = weakref.WeakValueDictionary()


def check_free(plan: Plan) -> None:
    """Two owners would carry the tensors to and fro, and free memory under each other."""
    if any(FlatParameters.of(p) for p in plan.parameters):
        gc.collect()  # the owner may be a dead optimizer in a cycle
    for parameter in plan.parameters:
        if FlatParameters.of(parameter):
            name = f"{plan.name(parameter)} of shape {tuple(parameter.shape)}"
            raise ValueError(f"{name} lies in another flat vector: close() or release() its owner first")


def _same_memory(one: Tensor, two: Tensor) -> bool:
    return one.data_ptr() == two.data_ptr() and one.layout == two.layout
