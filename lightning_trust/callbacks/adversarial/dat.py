"""Gradients averaged over the ranks by way of few bits an entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.futures import Future
from torch.optim import Optimizer

from lightning_trust.core.distributed import from_all_ranks, rank, world_size
from lightning_trust.core.host import named_parameters
from lightning_trust.core.step import Claim, HostCallback
from lightning_trust.functional.adversarial import (
    dequantise,
    pack_codes,
    quantisation_levels,
    quantise,
    unpack_codes,
)


@dataclass(frozen=True)
class _Layout:
    """The tensors of a bucket, each cut into as many chunks as there are rows.

    Cut by tensor, not by bucket: DDP groups the tensors anew after its first step, and after a resume.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    rows: int
    device: torch.device

    @cached_property
    def chunks(self) -> list[int]:
        return [-(-length // self.rows) for length in self.lengths]

    @cached_property
    def columns(self) -> int:
        return sum(self.chunks)

    @cached_property
    def _repeats(self) -> Tensor:
        return torch.tensor(self.chunks, device=self.device)

    def spread(self, flat: Tensor) -> Tensor:
        """``(n,)`` -> ``(rows, columns)``; row r has chunk r of every tensor, the last one filled up with zeros."""
        if self.rows == 1:
            return flat[None]
        parts = zip(flat.split(list(self.lengths)), self.chunks, strict=True)
        return torch.cat(
            [F.pad(part, (0, chunk * self.rows - len(part))).view(self.rows, -1) for part, chunk in parts], 1
        )

    def joined(self, spread: Tensor) -> Tensor:
        """``(rows, columns)`` -> ``(n,)``."""
        if self.rows == 1:
            return spread[0]
        parts = zip(spread.split(self.chunks, dim=1), self.lengths, strict=True)
        return torch.cat([part.reshape(-1)[:length] for part, length in parts])

    def norms(self, spread: Tensor) -> Tensor:
        """Norm of each tensor, float32, shape ``(tensors,)``."""
        return torch.stack([torch.linalg.vector_norm(part) for part in spread.split(self.chunks, dim=1)])

    def by_column(self, norms: Tensor) -> Tensor:
        """``(..., tensors)`` -> ``(..., columns)``."""
        return norms.repeat_interleave(self._repeats, dim=-1, output_size=self.columns)


class QuantizedAllReduce(HostCallback):
    r"""Average the gradients of the ranks by way of stochastically quantised codes, a fraction of the bytes.

    Each rank sends, for every parameter tensor :math:`g`, its norm and a code of :math:`b` bits an entry,

    .. math::
        Q(g)_i = \mathrm{sign}(g_i) \, \Vert g\Vert_2 \, \frac{l_i}{s}, \qquad
        l_i = \lfloor a_i \rfloor + \mathrm{Bernoulli}(a_i - \lfloor a_i \rfloor), \quad
        a_i = \frac{s |g_i|}{\Vert g\Vert_2}, \quad s = 2^{b-1} - 1

    which is right on average, and every rank takes the mean :math:`\frac1M \sum_r Q(g_r)` of what it received, in the
    same order: ranks stay equal bit for bit. It is a communication hook of DistributedDataParallel, so it comes before
    everything that sees the averaged gradient (clipping, edits of other callbacks, masks, the optimizer), claims
    nothing, and goes with all of them. Gradients that accumulate are sent once, with the last micro-batch.

    Bytes a rank sends for :math:`n` entries on :math:`M` ranks: :math:`(M-1) n b/8` one-sided, while a ring all-reduce
    in float32 sends :math:`8 n (M-1)/M`: with 8 bits a quarter at two ranks, and no gain from eight on. Two-sided it
    is :math:`2 n (M-1)/M \cdot b/8`, a quarter on any number: each rank averages one chunk of every tensor, quantises
    it again and sends it to the others. Two-sided exchanges wait for each other, so they overlap less with the
    backward pass. Codes of 2 to 4 bits share a byte, those of 9 to 16 take two.

    Logs ``trust/allreduce_bytes`` and ``trust/allreduce_bytes_float32`` each time gradients were sent.

    Paper: Distributed Adversarial Training to Robustify Deep Neural Networks at Scale (UAI 2022).

    Args:
        bits: Bits of a code, 2 to 16, the sign included.
        two_sided: Whether to average and quantise again on the way, for more than a few ranks.
        error_feedback: Whether what quantisation took off is added to the rank's next gradient; of two-sided exchanges
            that is the first quantisation, not that of the mean. For tensors of up to
            about :math:`s^2` entries; of larger ones :math:`Q` may take off more than there is, and it would grow.
        seed: Seed of the quantiser's draws; the one of ``seed_everything`` if None.
        name: Tells two callbacks of this class apart.

    Attributes:
        bytes_sent: Bytes that this rank has sent for gradients in the run.
        bytes_float32: Bytes that a ring all-reduce in float32 would have sent.

    Raises:
        ValueError: If ``bits`` is out of its range (at once), or a gradient is sparse or not finite (in training; not
            under precision 16-mixed, whose scaler skips the step).
        MisconfigurationException: If the strategy is neither DDP nor a single device, has a communication hook
            already, or does not average the gradients (a gradient source other than the backward pass), or a run is
            resumed on another number of ranks, or from a checkpoint saved while an exception was handled.

    Warns:
        UserWarning: On one rank, where there is nothing to send.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = QuantizedAllReduce(bits=8)
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback], logger=False)
        >>> callback.bytes_sent
        0

    """

    # the mean gradient is still that of the host's loss, and arrives before anything edits it
    claims: ClassVar[tuple[Claim, ...]] = ()

    def __init__(
        self,
        bits: int = 8,
        two_sided: bool = False,
        error_feedback: bool = False,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        quantisation_levels(bits)
        super().__init__(name=name, seed=seed)
        self.bits = bits
        self.two_sided = two_sided
        self.error_feedback = error_feedback
        self.bytes_sent = 0
        self.bytes_float32 = 0
        self._feedback: dict[str, Tensor] = {}
        self._failing = False
        self._forget()

    def _forget(self) -> None:
        """What belongs to one run of DDP."""
        self._active = False
        self._names: dict[int, str] = {}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._group: Any = None
        self._norms: list[tuple[tuple[str, ...], Tensor]] = []
        self._late: list[tuple[tuple[str, ...], Tensor]] = []
        self._copied: torch.cuda.Event | None = None
        self._draw = (-1, 0)
        self._logged = (0, 0)

    def __getstate__(self) -> dict[str, Any]:
        # names go by the identity of parameters, layouts and process groups by the process
        fresh = {
            "_active": False,
            "_names": {},
            "_layouts": {},
            "_group": None,
            "_norms": [],
            "_late": [],
            "_copied": None,
        }
        return {**super().__getstate__(), **fresh}

    # -- start and state -----------------------------------------------------------------------------------------------
    def begin(self, trainer: Any, host: Any) -> None:
        """Register the hook."""
        self.bytes_sent = self.bytes_float32 = 0
        self._feedback = {}
        self._failing = False
        self._forget()
        if world_size() == 1:
            rank_zero_warn("QuantizedAllReduce does nothing on one rank, for there is nobody to send gradients to.")
            return
        model = trainer.strategy.model
        if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
            raise MisconfigurationException(
                "QuantizedAllReduce is a communication hook of DDP, of which there can be one, but got"
                f" DDPStrategy(ddp_comm_hook={trainer.strategy._ddp_comm_hook!r}). Leave one of them out."
            )
        self._names = {id(parameter): name for name, parameter in named_parameters(host).items()}
        self._group = model.process_group
        # DDP reads the annotations of a hook as objects, which under postponed evaluation are strings: one without any
        model.register_comm_hook(None, lambda _, bucket: self._average(bucket))
        self._active = True

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Register the hook, and go on with what quantisation had taken off."""
        self.begin(trainer, host)
        self.bytes_sent, self.bytes_float32 = state["bytes_sent"], state["bytes_float32"]
        self._logged = (self.bytes_sent, self.bytes_float32)
        if not self.error_feedback or not state["feedback"]:
            return
        if len(state["feedback"]) != world_size():
            raise MisconfigurationException(
                "QuantizedAllReduce resumes error feedback on as many ranks as saved theirs"
                f" ({len(state['feedback'])}), but got {world_size()}. Use as many devices, an earlier checkpoint if"
                " this one was saved while an exception was handled, or error_feedback=False."
            )
        own = state["feedback"][rank()]
        self._feedback = {name: residual.to(host.device) for name, residual in own.items()}

    def state(self) -> dict[str, Any]:
        """Bytes sent, and what quantisation took off on every rank."""
        own = {name: residual.cpu() for name, residual in self._feedback.items()}
        ranks: list[dict[str, Tensor]] = []
        if self.error_feedback and self._active:
            # other ranks may never come to a collective while an exception is handled
            ranks = [own] if self._failing else from_all_ranks(own)
        return {"bytes_sent": self.bytes_sent, "bytes_float32": self.bytes_float32, "feedback": ranks}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A checkpoint that is saved now holds what this rank alone has."""
        self._failing = True
        super().on_exception(trainer, pl_module, exception)

    # -- the hook ------------------------------------------------------------------------------------------------------
    def _average(self, bucket: Any) -> Future[Tensor]:
        """Average one bucket of gradients over the ranks."""
        buffer = bucket.buffer()
        names = tuple(self._names[id(parameter)] for parameter in bucket.parameters())
        if buffer.layout is not torch.strided:
            raise ValueError(
                f"QuantizedAllReduce needs dense gradients, but that of '{names[0]}' is sparse. Use"
                " `Embedding(sparse=False)`."
            )
        layout = self._layouts.get(names)
        if layout is None:
            lengths = tuple(parameter.numel() for parameter in bucket.parameters())
            layout = _Layout(names, lengths, world_size() if self.two_sided else 1, buffer.device)
            self._layouts[names] = layout
        values = layout.spread(self._with_feedback(layout, buffer.to(torch.float32)))
        key = self._draw_key(bucket.is_last())
        codes, norms = self._encoded(layout, values, "send", *key)
        if self.error_feedback:
            self._keep_feedback(layout, values - dequantise(codes, layout.by_column(norms), self.bits))
        self.bytes_float32 += 8 * buffer.numel() * (world_size() - 1) // world_size()
        if self.two_sided:
            return self._two_sided(layout, buffer, self._message(codes, norms), key)
        return self._one_sided(layout, buffer, self._message(codes, norms)[0])

    def _one_sided(self, layout: _Layout, buffer: Tensor, message: Tensor) -> Future[Tensor]:
        received = message.new_empty(world_size(), len(message))
        self.bytes_sent += len(message) * (world_size() - 1)
        work: Any = dist.all_gather_into_tensor(received.view(-1), message, group=self._group, async_op=True)

        def mean(_: Any) -> Tensor:
            codes, norms = self._opened(layout, received)
            return buffer.copy_(self._mean(layout, codes, norms))

        return work.get_future().then(mean)

    def _two_sided(self, layout: _Layout, buffer: Tensor, messages: Tensor, key: tuple[int, int]) -> Future[Tensor]:
        # collectives of two buckets must come in one order on all ranks, so none waits in the background
        others = world_size() - 1
        received = torch.empty_like(messages)
        self.bytes_sent += messages.shape[1] * others
        dist.all_to_all_single(received.view(-1), messages.view(-1), group=self._group)
        codes, norms = self._opened(layout, received)
        mean = self._mean(layout, codes, norms)[None]
        again = self._message(*self._encoded(layout, mean, "return", *key))[0]
        gathered = again.new_empty(world_size(), len(again))
        self.bytes_sent += len(again) * others
        dist.all_gather_into_tensor(gathered.view(-1), again, group=self._group)
        codes, norms = self._opened(layout, gathered, check=False)
        buffer.copy_(layout.joined(dequantise(codes, layout.by_column(norms), self.bits)))
        done: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
        done.set_result(buffer)
        return done

    def _encoded(self, layout: _Layout, values: Tensor, *key: object) -> tuple[Tensor, Tensor]:
        """Codes of the shape of ``values``, and the norm of each tensor."""
        norms = layout.norms(values)
        uniform = [
            torch.rand(len(values), chunk, device=values.device, generator=self._generator(values, name, *key))
            for name, chunk in zip(layout.names, layout.chunks, strict=True)
        ]
        return quantise(values, layout.by_column(norms), torch.cat(uniform, dim=1), self.bits), norms

    def _generator(self, values: Tensor, *key: object) -> torch.Generator:
        return self.random.rank(*key, device=values.device)

    def _message(self, codes: Tensor, norms: Tensor) -> Tensor:
        """Bytes to be sent, one message a row: codes, then the norms of all tensors."""
        if self.bits <= 4:
            codes = F.pad(codes, (0, codes.shape[1] % 2))
        packed = pack_codes(codes, self.bits)
        return torch.cat([packed, norms.view(torch.uint8).expand(len(packed), -1)], dim=1).contiguous()

    def _opened(self, layout: _Layout, messages: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
        """Codes ``(ranks, columns)`` and norms ``(ranks, tensors)`` of received messages."""
        size = 4 * len(layout.lengths)
        codes = unpack_codes(messages[:, :-size], self.bits)[:, : layout.columns]
        norms = messages[:, -size:].clone().view(torch.float32)
        if check:
            self._norms.append((layout.names, norms))
        return codes, norms

    def _mean(self, layout: _Layout, codes: Tensor, norms: Tensor) -> Tensor:
        """Mean of the ranks' values, summed in the order of the ranks."""
        total = torch.zeros(layout.columns, device=codes.device)
        for row, norm in zip(codes, norms, strict=True):
            total += dequantise(row, layout.by_column(norm), self.bits)
        return total / len(codes)

    def _draw_key(self, last: bool) -> tuple[int, int]:
        """Key of the random draws: the batch, and how many backward passes it has had."""
        assert self.attachment is not None  # noqa: S101 (for mypy: the hook lives as long as the run)
        batch = self.attachment.trainer.fit_loop.total_batch_idx
        if self._draw[0] != batch:
            self._draw = (batch, 0)
        key = self._draw
        if last:
            self._draw = (batch, key[1] + 1)
        return key

    def _with_feedback(self, layout: _Layout, flat: Tensor) -> Tensor:
        if not self._feedback:
            return flat
        parts = zip(layout.names, flat.split(list(layout.lengths)), strict=True)
        return torch.cat([part + self._feedback[name] if name in self._feedback else part for name, part in parts])

    def _keep_feedback(self, layout: _Layout, residual: Tensor) -> None:
        # a step that a scaler skips must not spoil the next
        finite = torch.where(residual.isfinite(), residual, torch.zeros_like(residual))
        parts = layout.joined(finite).split(list(layout.lengths))
        self._feedback.update((name, part.clone()) for name, part in zip(layout.names, parts, strict=True))

    # -- around it -----------------------------------------------------------------------------------------------------
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Refuse gradients that are not finite, on all ranks alike, for all have seen all norms."""
        norms, self._norms = self._norms, []
        if not norms or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        if norms[0][1].is_cuda:
            for _, each in norms:
                # they were made on the stream of the exchange
                each.record_stream(torch.cuda.current_stream())
            # one step late, so that the host does not wait for the device to end this one
            norms, self._late = self._late, [(names, each.to("cpu", non_blocking=True)) for names, each in norms]
            if self._copied is not None:
                self._copied.synchronize()
            self._copied = torch.cuda.Event()
            self._copied.record()
        _check_finite(norms)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the last gradients, too, where the look comes a step late."""
        late, self._late = self._late, []
        if self._copied is not None:
            self._copied.synchronize()
        _check_finite(late)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Refuse gradients that did not come through DDP."""
        if self._active and self.bytes_sent == 0:
            raise MisconfigurationException(
                "QuantizedAllReduce takes part in the backward pass of DDP, but the optimizer is about to step and no"
                " gradient came that way: another callback, or the module itself, computes it. Remove"
                " QuantizedAllReduce from `callbacks`."
            )
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the bytes sent."""
        sent, exact = self.bytes_sent - self._logged[0], self.bytes_float32 - self._logged[1]
        if sent:
            self._logged = (self.bytes_sent, self.bytes_float32)
            pl_module.log("trust/allreduce_bytes", float(sent), on_step=True, on_epoch=False)
            pl_module.log("trust/allreduce_bytes_float32", float(exact), on_step=True, on_epoch=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _leave(self) -> None:
        self._forget()
        super()._leave()


def _check_finite(norms: Sequence[tuple[tuple[str, ...], Tensor]]) -> None:
    """Raise where a tensor of some rank was not finite.

    Raises:
        ValueError: Naming the parameters and the rank.

    """
    if not norms:
        return
    finite = torch.cat([each.isfinite() for _, each in norms], dim=1)
    if bool(finite.all()):
        return
    names = [name for group, _ in norms for name in group]
    found = sorted({names[column] for column in (~finite).any(dim=0).nonzero().flatten().tolist()})
    ranks = (~finite).any(dim=1).nonzero().flatten().tolist()
    raise ValueError(
        f"QuantizedAllReduce expected finite gradients, but got NaN or infinity in {', '.join(map(repr, found[:5]))}"
        f"{' and others' * (len(found) > 5)} on rank {', '.join(map(str, ranks))}."
    )
