"""What test_two_ranks.py runs on two gloo ranks: gradients of one process, made by two."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_torchtitan_losses import B, Decoder, batches
from test_torchtitan_losses import eager as eager_decoder
from test_transformers_trainer import EIGHT, ROWS, Distiller, Gradients, arguments, eager
from tiny_models import gradients, llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from cl_fast.integrations.torchtitan import DivergenceLoss, LinearDivergenceLoss
from cl_fast.integrations.transformers import head_of, last_hidden, next_labels, run_inside
from cl_fast.losses import Logits, linear_divergence


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, gradient in expected.items():
        given = found[name]
        whole = given.full_tensor() if isinstance(given, DTensor) else given
        tolerance = 1e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(whole, gradient, rtol=1e-4, atol=tolerance, msg=name)


def wanted_of(student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    eager(student, teacher).backward()
    wanted = gradients(student)
    student.zero_grad()
    return wanted


def trainer_of_transformers(folder: Path, **changes: Any) -> None:
    """DDP averages; the tokens of both ranks are the denominator."""
    student, teacher = llama(0), llama(1)
    wanted = wanted_of(student, teacher)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **changes}
    trainer = Distiller(
        student,
        arguments(folder, **options),
        train_dataset=ROWS,
        teacher=teacher,
        kind="reverse_kl",
        temperature=2.0,
    )
    keeper = Gradients()
    trainer.add_callback(keeper)
    trainer.train()
    assert_same({k.removeprefix("module."): v for k, v in keeper.seen.items()}, wanted)


def fsdp() -> None:
    """The head is in the root's group: gathered within run_inside, its gradient reduced."""
    student, teacher = llama(0), llama(1).eval()
    wanted = wanted_of(student, teacher)
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    inputs = {k: EIGHT[k][mine] for k in ("input_ids", "attention_mask")}
    labels = next_labels(EIGHT["labels"])
    with torch.no_grad():
        z = teacher(**inputs).logits

    def loss_of(inner: Any, **inputs: Any) -> Tensor:
        head = head_of(inner)
        assert not isinstance(head.weight, DTensor)
        return linear_divergence(
            **head.keywords(last_hidden(inner, **inputs)),
            teacher=Logits(z),
            kind="reverse_kl",
            temperature=2.0,
            labels=labels[mine],
            denom=(labels != -100).sum() / dist.get_world_size(),
        )

    run_inside(student, loss_of, **inputs).backward()
    assert_same(gradients(student), wanted)


def torchtitan_with_a_sharded_head() -> None:
    student, teacher = Decoder(0), Decoder(1)
    eager_decoder(student, teacher).backward()
    wanted = gradients(student)
    student.zero_grad()
    fully_shard(student.lm_head)
    fully_shard(student)
    loss_fn = LinearDivergenceLoss.Config(kind="reverse_kl").build(compile_config=None)
    loss_fn.set_lm_head(student.lm_head)
    loss_fn.set_teacher_head(teacher.lm_head)
    student._skip_lm_head = True
    made = batches(teacher, "teacher_hidden")
    valid = sum((labels != -100).sum() for _, labels, _ in made)
    row = slice(dist.get_rank(), dist.get_rank() + 1)
    assert dist.get_world_size() == B
    for tokens, labels, inputs in made:
        mine = {k: v[row] for k, v in inputs.items()}
        # torchtitan sums gradients over ranks, plain FSDP averages them.
        loss, _ = loss_fn(student(tokens[row]), labels[row], valid / 2, **mine)
        loss.backward()
    assert isinstance(student.lm_head.weight, DTensor)
    assert_same(gradients(student), wanted)


def titan(kind: str, form: str, hooks: Any, told: bool = True) -> None:
    """The ids of student and teacher are split over two ranks, which see the same tokens."""
    student, teacher = Decoder(0), Decoder(1)
    eager_decoder(student, teacher).backward()
    wanted = gradients(student)
    student.zero_grad()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    made = batches(teacher, form)
    if form == "teacher_logits":
        for _, _, inputs in made:
            inputs[form] = inputs[form].tensor_split([31], -1)[dist.get_rank()]
    if hooks:  # as torchtitan does with its loss parallel
        local = isinstance(hooks, Replicate)
        style = ColwiseParallel(output_layouts=hooks, use_local_output=local)
        parallelize_module(student.lm_head, mesh, style)
    for model in (student, teacher):
        weight = model.lm_head.weight
        if not isinstance(weight, DTensor):
            model.lm_head.weight = nn.Parameter(distribute_tensor(weight.data, mesh, [Shard(0)]))
    make = LinearDivergenceLoss if kind == "linear" else DivergenceLoss
    loss_fn = make.Config(kind="reverse_kl").build(compile_config=None)
    loss_fn.set_teacher_head(teacher.lm_head)
    if kind == "linear":
        loss_fn.set_lm_head(student.lm_head)
        student._skip_lm_head = True
    if told:
        loss_fn.set_process_group(mesh if hooks else mesh.get_group())
    valid = sum((labels != -100).sum() for _, labels, _ in made)
    for tokens, labels, inputs in made:
        loss, _ = loss_fn(student(tokens), labels, valid, **inputs)
        assert loss.shape == ()
        assert not isinstance(loss, DTensor)
        loss.backward()
    assert_same(gradients(student), wanted)


def torchtitan_with_a_split_vocabulary() -> None:
    columns = Shard(-1)
    for form in ("teacher_hidden", "teacher_ids", "teacher_logits"):
        titan("linear", form, None)
        titan("linear", form, columns)
        titan("leaf", form, columns)
    titan("linear", "teacher_hidden", Replicate())
    for kind in ("linear", "leaf"):
        with pytest.raises(ValueError, match="process_group="):
            titan(kind, "teacher_ids", columns, told=False)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    fsdp()
    torchtitan_with_a_sharded_head()
    torchtitan_with_a_split_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        trainer_of_transformers(Path(folder))
        trainer_of_transformers(Path(folder), ddp_find_unused_parameters=True)
    if dist.get_rank() == 0:
        sys.stdout.write("all equal\n")
    dist.barrier()
    sys.stdout.flush()
    # gloo's threads may abort a process that ends while they wait: no end, then.
    os._exit(0)


if __name__ == "__main__":
    main()
