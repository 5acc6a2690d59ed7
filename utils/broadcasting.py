"""Objects with large tensors that process 0 builds and the others receive.

Eight processes that read a checkpoint of 30 GB at once ask the disk, or the network behind it, for 240. Here
process 0 reads it. The others get the object itself by pickle, with empty tensors in it, and then the values,
many small tensors or one large one at a time: so they hold one copy, and no file is opened there.
Read next: utils/distributed.py"""

import io
import pickle

import torch
import torch.distributed as dist
import torch.nn as nn

from utils import distributed


class StructurePickler(pickle.Pickler):
    """Pickles an object without the values of its tensors, which are collected in `tensors`. A tensor that
    occurs twice, as tied weights do, is one tensor."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors, self.numbers = [], {}

    def persistent_id(self, item):
        if not isinstance(item, torch.Tensor):
            return None
        if id(item) not in self.numbers:
            self.numbers[id(item)] = len(self.tensors)
            self.tensors.append(item)
        kind = nn.Parameter if isinstance(item, nn.Parameter) else torch.Tensor
        return self.numbers[id(item)], kind, item.requires_grad, tuple(item.shape), item.dtype

    def reducer_override(self, item):
        """Models of transformers register themselves when they are made, and without that return no hidden
        states: the other process makes them anew from their config, on the meta device."""
        from transformers import PreTrainedModel
        if isinstance(item, PreTrainedModel):
            return make_on_meta, (type(item), item.config), item.__dict__
        return NotImplemented


def make_on_meta(model_cls, config):
    with torch.device("meta"):
        return model_cls(config)


class StructureUnpickler(pickle.Unpickler):
    """The other end: the same object with empty tensors on the CPU."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors = []

    def persistent_load(self, description):
        number, kind, requires_grad, shape, dtype = description
        if number == len(self.tensors):
            tensor = torch.empty(shape, dtype=dtype)
            if kind is nn.Parameter:
                tensor = nn.Parameter(tensor, requires_grad)
            self.tensors.append(tensor)
        return self.tensors[number]


def build_on_rank0(build_fn):
    """build_fn() of process 0, in every process; with one process just build_fn(). All processes must call it
    together. An error of process 0 is raised in all of them. The random numbers that torch draws afterwards
    on the CPU are those of process 0, whatever build_fn has drawn."""
    if distributed.get_world_size() == 1:
        return build_fn()
    result, tensors, message, error = None, [], [None, None, None], None
    if distributed.get_rank() == 0:
        try:
            result = build_fn()
            file = io.BytesIO()
            pickler = StructurePickler(file)
            pickler.dump(result)
            tensors, message = pickler.tensors, [file.getvalue(), torch.get_rng_state(), None]
        except Exception as caught:    # whatever it is, the others must not wait for the object
            error, message[2] = caught, str(caught)
    dist.broadcast_object_list(message, 0)
    structure, rng_state, failure = message
    if error is not None:
        raise error
    if failure is not None:
        raise OSError(failure)
    if distributed.get_rank() > 0:
        unpickler = StructureUnpickler(io.BytesIO(structure))    # from process 0 of this program
        result, tensors = unpickler.load(), unpickler.tensors
        torch.set_rng_state(rng_state)
    broadcast_values(tensors)
    return result


@torch.no_grad()
def broadcast_values(tensors):
    """Give the tensors of all processes the values of those of process 0."""
    rank, device = distributed.get_rank(), distributed.get_device()
    for bucket in distributed.make_buckets(tensors):
        sizes = [tensor.numel() for tensor in bucket]
        if rank == 0:
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket]).to(device)
        else:
            flat = torch.empty(sum(sizes), dtype=bucket[0].dtype, device=device)
        dist.broadcast(flat, 0)
        if rank > 0:
            for tensor, values in zip(bucket, flat.split(sizes)):
                tensor.copy_(values.view_as(tensor))
