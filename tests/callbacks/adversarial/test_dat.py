"""QuantizedAllReduce on two gloo ranks: equal ranks, the mean, the bytes, feedback, resume, refusals."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.attacks import FGSM
from lightning_trust.callbacks import AdversarialTraining, ExactResume, QuantizedAllReduce
from tests.callbacks.adversarial.test_adversarial_training import in_a_box
from tests.conformance import BATCH, CallbackConformance, Data, Host, Kill, PartnerGradient, rows
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks

ENTRIES = 6 * 16 + 16 + 16 * 3 + 3
TENSORS = 4
MODES = list(itertools.product([4, 8, 13], [False, True], [False, True]))


class TestOneSided(CallbackConformance):
    callback = QuantizedAllReduce
    arguments: ClassVar = {"bits": 8}
    equal_to_one_rank = False


class TestTwoSided(CallbackConformance):
    callback = QuantizedAllReduce
    arguments: ClassVar = {"bits": 16, "two_sided": True, "error_feedback": True, "seed": 3}
    # 16 bits are nearly exact
    tolerance = 1e-3


class Still(Host):
    """Never moves, so that every step has the same gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OneBatch(Data):
    """One global batch, again and again."""

    def __init__(self, steps):
        super().__init__(batch_size=BATCH // 2)
        self.steps = steps

    def train_dataloader(self):
        inputs, targets = (column[:BATCH] for column in rows().tensors)
        repeated = TensorDataset(inputs.repeat(self.steps, 1), targets.repeat(self.steps))
        return DataLoader(repeated, batch_size=self.batch_size, sampler=DistributedSampler(repeated, shuffle=False))


class Gradients(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()]))


def gradients(folder, steps, callback=None):
    """The averaged gradients of steps at the same weights and batch, shape ``(steps, entries)``; equal on ranks."""
    record = Gradients()
    callbacks = [record] if callback is None else [callback, record]
    first, second = fit_on_two_ranks(
        folder, Still(), OneBatch(steps), callbacks, lambda *_: torch.stack(record.seen), max_epochs=1
    )
    assert torch.equal(first, second)
    return first


def parts(flat):
    """The parameter tensors in a flat gradient."""
    return flat.split([96, 16, 48, 3])


# -- what it gives -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("two_sided", [False, True])
def test_sixteen_bits_equal_one_rank_with_the_whole_batch(tmp_path, two_sided):
    callback = QuantizedAllReduce(bits=16, two_sided=two_sided)
    first, second = fit_on_two_ranks(tmp_path, Host(), Data(batch_size=BATCH // 2), [callback], max_epochs=2)
    assert_equal_states(first, second)
    host = Host()
    pl.Trainer(**QUIET, max_epochs=2).fit(host, datamodule=Data())
    assert_equal_states(host.state_dict(), first, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize(("bits", "two_sided", "error_feedback"), MODES)
def test_ranks_stay_equal_bit_for_bit(tmp_path, bits, two_sided, error_feedback):
    callback = QuantizedAllReduce(bits, two_sided, error_feedback)
    data = Data(batch_size=BATCH // 2, shuffle=True)
    first, second = fit_on_two_ranks(
        tmp_path, Host(dropout=0.3), data, [callback, PartnerGradient()], max_epochs=1, gradient_clip_val=0.5
    )
    assert_equal_states(first, second)
    assert not torch.equal(first["net.0.weight"], Host().state_dict()["net.0.weight"])


@pytest.mark.parametrize("two_sided", [False, True])
def test_mean_over_many_steps_is_the_exact_gradient(tmp_path, two_sided):
    exact = gradients(tmp_path / "exact", 1)[0]
    seen = gradients(tmp_path / "quantised", 250, QuantizedAllReduce(bits=4, two_sided=two_sided))
    assert seen.std(0).max() > 0.01 * exact.norm()
    error = seen.std(0) / 250**0.5
    assert ((seen.mean(0) - exact).abs() <= 4.5 * error + 1e-6).all()


def test_error_of_a_step_is_within_one_level(tmp_path):
    """The mean of the ranks' errors, each at most the norm of the rank's own tensor over s."""
    inputs, targets = (column[:BATCH] for column in rows().tensors)
    net = Host().net
    own = [
        torch.autograd.grad(F.cross_entropy(net(inputs[rank::2]), targets[rank::2]), list(net.parameters()))
        for rank in range(2)
    ]
    for quantised in gradients(tmp_path, 5, QuantizedAllReduce(bits=8)):
        for found, *exact in zip(parts(quantised), *own, strict=True):
            bound = sum(each.norm() for each in exact) / 2 / 127
            assert (found - sum(exact).flatten() / 2).abs().max() <= bound * (1 + 1e-4)
            assert not torch.allclose(found, sum(exact).flatten() / 2, rtol=1e-4)


def test_same_seed_gives_the_same_draws_and_another_seed_others(tmp_path):
    one, two, three = (
        gradients(tmp_path / str(place), 3, QuantizedAllReduce(bits=4, seed=seed))
        for place, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert not torch.equal(one[0], one[1])


def test_error_feedback_makes_up_for_what_was_taken_off(tmp_path):
    """The sum of what was sent parts from the sum of the gradients by one residual, however many steps there were."""
    steps = 60
    exact = gradients(tmp_path / "exact", 1)[0]
    plain = gradients(tmp_path / "plain", steps, QuantizedAllReduce(bits=6))
    repaid = gradients(tmp_path / "repaid", steps, QuantizedAllReduce(bits=6, error_feedback=True))
    for mean, true in zip(parts(repaid.mean(0)), parts(exact), strict=True):
        # at most a level of a tensor that is about as long as the gradient
        assert (mean - true).abs().max() <= 6.0 * true.norm() / 31 / steps
    assert (repaid.mean(0) - exact).norm() < 0.5 * (plain.mean(0) - exact).norm()


@pytest.mark.parametrize("two_sided", [False, True])
def test_draws_do_not_depend_on_how_ddp_groups_the_tensors(tmp_path, two_sided):
    """One bucket for all tensors or one for each: the same numbers, and so the same weights, bit for bit."""
    weights, buckets = [], []
    for place, megabytes in enumerate((25, 1e-4)):
        folder = tmp_path / str(place)
        folder.mkdir()
        callback = QuantizedAllReduce(4, two_sided, error_feedback=True)
        strategy: Any = DDPStrategy(start_method="fork", bucket_cap_mb=megabytes)
        trainer = pl.Trainer(
            **QUIET, devices=2, strategy=strategy, callbacks=[callback, Layouts(folder, callback)], max_epochs=1
        )
        host = Host()
        trainer.fit(host, datamodule=Data(batch_size=BATCH // 2))
        weights.append(host.state_dict())
        buckets.append(torch.load(folder / "layouts.pt", weights_only=True))
    assert_equal_states(*weights)
    assert max(map(len, buckets[0])) == TENSORS
    assert len(buckets[1]) > len(buckets[0])


class Layouts(Callback):
    """Brings the names of the tensors in each bucket out of rank 0."""

    def __init__(self, folder, callback):
        self.path, self.callback = folder / "layouts.pt", callback

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save([list(names) for names in self.callback._layouts], self.path)


# -- bytes -------------------------------------------------------------------------------------------------------------
class Counts:
    """Bytes that collectives put on the wire, counted where torch is called."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        gather, exchange = dist.all_gather_into_tensor, dist.all_to_all_single

        def counted_gather(output, message, **settings):
            self.bytes += message.numel() * message.element_size()
            return gather(output, message, **settings)

        def counted_exchange(output, message, **settings):
            self.bytes += message.numel() * message.element_size() // 2
            return exchange(output, message, **settings)

        monkeypatch.setattr(dist, "all_gather_into_tensor", counted_gather)
        monkeypatch.setattr(dist, "all_to_all_single", counted_exchange)


@pytest.mark.parametrize(("bits", "bytes_an_entry"), [(4, 0.5), (8, 1.0), (16, 2.0)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_bytes_sent_are_those_counted(tmp_path, monkeypatch, bits, bytes_an_entry, two_sided):
    counts, logged = Counts(monkeypatch), []

    class Logged(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(
                tuple(trainer.logged_metrics[f"trust/allreduce_bytes{kind}"].item() for kind in ("", "_float32"))
            )

    callback = QuantizedAllReduce(bits, two_sided)
    found = fit_on_two_ranks(
        tmp_path,
        Host(),
        Data(batch_size=BATCH // 2),
        [callback, Logged()],
        lambda *_: (callback.bytes_sent, counts.bytes, callback.bytes_float32, logged),
        max_epochs=1,
    )
    for sent, counted, exact, log in found:
        assert sent == counted
        # a ring all-reduce on two ranks sends each entry once, in four bytes
        assert exact == 6 * 4 * ENTRIES
        norms = 4 * TENSORS * (2 if two_sided else 1)
        assert sent == pytest.approx(6 * (ENTRIES * bytes_an_entry + norms), abs=6 * 4)
        assert log == [(sent / 6, exact / 6)] * 6


def test_eight_bits_are_a_quarter_of_the_bytes_of_a_larger_network(tmp_path):
    class Larger(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 3))

    for two_sided in (False, True):
        callback = QuantizedAllReduce(8, two_sided)
        found = fit_on_two_ranks(
            tmp_path / str(two_sided),
            Larger(),
            Data(batch_size=BATCH // 2),
            [callback],
            lambda *_, callback=callback: callback.bytes_sent / callback.bytes_float32,
            max_epochs=1,
        )
        assert found == pytest.approx([0.25, 0.25], abs=0.002)


def test_accumulated_gradients_are_sent_once(tmp_path):
    callback = QuantizedAllReduce(bits=16)
    result = fit_on_two_ranks(
        tmp_path,
        Host(),
        Data(batch_size=BATCH // 4),
        [callback],
        lambda trainer, module: (trainer.global_step, callback.bytes_float32, module.state_dict()),
        max_epochs=1,
        accumulate_grad_batches=2,
    )
    assert [found[:2] for found in result] == [(6, 6 * 4 * ENTRIES)] * 2
    host = Host()
    pl.Trainer(**QUIET, max_epochs=1).fit(host, datamodule=Data())
    assert_equal_states(host.state_dict(), result[0][2], rtol=0.0, atol=1e-3)


# -- resume and composition --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("two_sided", "error_feedback"), [(False, True), (True, False), (True, True)])
def test_two_ranks_killed_and_resumed_equal_uninterrupted(tmp_path, two_sided, error_feedback):
    def run(folder, *extra, **settings):
        torch.manual_seed(11)
        callback = QuantizedAllReduce(8, two_sided, error_feedback)
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        trainer = pl.Trainer(
            **{**QUIET, "enable_checkpointing": True, "max_epochs": 2, "devices": 2, "strategy": "ddp_fork"},
            callbacks=[callback, ExactResume(), saver, *extra],
        )
        trainer.fit(Host(dropout=0.3), datamodule=Data(batch_size=BATCH // 2, shuffle=True), **settings)
        return torch.load(folder / "last.ckpt", weights_only=True)

    whole = run(tmp_path / "whole")
    with pytest.raises(ProcessRaisedException, match="killed"):
        run(tmp_path / "killed", Kill(4))
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_states(whole["state_dict"], resumed["state_dict"])
    states = [each["callbacks"]["QuantizedAllReduce"] for each in (whole, resumed)]
    assert states[0]["bytes_sent"] == states[1]["bytes_sent"] > 0
    assert len(states[0]["feedback"]) == 2 * error_feedback
    for one, two in zip(states[0]["feedback"], states[1]["feedback"], strict=True):
        assert_equal_states(one, two)
        assert list(one) == list(dict.fromkeys(one))
        assert sum(residual.abs().sum() for residual in one.values()) > 0


def test_feedback_of_another_number_of_ranks_is_refused(tmp_path):
    callback = QuantizedAllReduce(error_feedback=True)
    residual = {"net.0.weight": torch.zeros(96)}

    class Resumes(QuantizedAllReduce):
        def begin(self, trainer, host):
            super().begin(trainer, host)
            self.begin = lambda *_: None
            self.resume(trainer, host, {"bytes_sent": 1, "bytes_float32": 4, "feedback": [residual]})

    with pytest.raises(ProcessRaisedException, match=r"as many ranks as saved theirs \(1\), but got 2"):
        fit_on_two_ranks(tmp_path, Host(), Data(), [Resumes(error_feedback=True)], max_epochs=1)
    assert callback.state()["feedback"] == []


def test_goes_with_adversarial_training(tmp_path):
    callbacks = [AdversarialTraining(FGSM(eps=0.1)), QuantizedAllReduce(bits=16)]
    first, second = fit_on_two_ranks(tmp_path, Host(), in_a_box(Data(batch_size=BATCH // 2)), callbacks, max_epochs=1)
    assert_equal_states(first, second)
    host = Host()
    pl.Trainer(**QUIET, max_epochs=1, callbacks=callbacks[:1]).fit(host, datamodule=in_a_box(Data()))
    assert_equal_states(host.state_dict(), first, rtol=0.0, atol=1e-3)


# -- refusals ----------------------------------------------------------------------------------------------------------
class Breaks(Host):
    """Has a gradient that is not finite, on rank 1."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_rank == 1 and batch_idx == 2:
            loss = loss + self.net[3].bias.sum() * torch.nan
        return loss


@pytest.mark.parametrize("two_sided", [False, True])
def test_nan_is_refused_by_name(tmp_path, two_sided):
    with pytest.raises(ProcessRaisedException, match=r"got NaN or infinity in 'net\.3\.bias' on rank 1"):
        fit_on_two_ranks(tmp_path, Breaks(), Data(batch_size=BATCH // 2), [QuantizedAllReduce(two_sided=two_sided)])


def test_step_that_a_scaler_skips_leaves_no_trace(tmp_path):
    """Under a gradient scaler what is not finite is the scaler's to skip, and feedback does not keep it."""
    callback = QuantizedAllReduce(error_feedback=True)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    found = fit_on_two_ranks(
        tmp_path,
        Breaks(),
        Data(batch_size=BATCH // 2),
        [callback],
        lambda trainer, module: (trainer.precision_plugin.scaler.get_scale(), module.state_dict(), callback._feedback),
        max_epochs=1,
        plugins=[plugin],
    )
    for scale, weights, feedback in found:
        assert scale == 128.0
        assert all(value.isfinite().all() for value in (*weights.values(), *feedback.values()))
    assert_equal_states(found[0][1], found[1][1])


def test_sparse_gradients_are_refused(tmp_path):
    class Sparse(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Embedding(50, 3, sparse=True)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[1]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SparseAdam(list(self.parameters()))

    with pytest.raises(ProcessRaisedException, match=r"dense gradients, but that of 'net\.weight' is sparse"):
        fit_on_two_ranks(tmp_path, Sparse(), Data(), [QuantizedAllReduce()], max_epochs=1, limit_val_batches=0)


def test_second_hook_is_refused(tmp_path):
    strategy: Any = DDPStrategy(start_method="fork", ddp_comm_hook=lambda *_: None)
    trainer = pl.Trainer(**QUIET, devices=2, strategy=strategy, callbacks=[QuantizedAllReduce()], max_epochs=1)
    with pytest.raises(ProcessRaisedException, match="of which there can be one, but got DDPStrategy"):
        trainer.fit(Host(), Data())


def test_gradient_from_elsewhere_is_refused(tmp_path):
    class ByHand(Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for parameter in self.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.optimizers().step()

    with pytest.raises(ProcessRaisedException, match="no gradient came that way"):
        fit_on_two_ranks(tmp_path, ByHand(), Data(), [QuantizedAllReduce()], max_epochs=1)


def test_one_rank_warns_and_trains_as_without(tmp_path):
    hosts = [Host(), Host()]
    with pytest.warns(UserWarning, match="does nothing on one rank"):
        pl.Trainer(**QUIET, max_epochs=1, callbacks=[QuantizedAllReduce(bits=2)]).fit(hosts[0], datamodule=Data())
    pl.Trainer(**QUIET, max_epochs=1).fit(hosts[1], datamodule=Data())
    assert_equal_states(hosts[0].state_dict(), hosts[1].state_dict())


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"`bits` to be an integer in \[2, 16\], but got {bits}"):
        QuantizedAllReduce(bits=bits)


def test_unsupported_strategy_names_the_fix(tmp_path):
    trainer = pl.Trainer(**QUIET, callbacks=[QuantizedAllReduce()])
    trainer.strategy.__class__ = type("DeepSpeedStrategy", (type(trainer.strategy),), {})
    with pytest.raises(MisconfigurationException, match="QuantizedAllReduce supports .* got DeepSpeedStrategy"):
        trainer.fit(Host(), datamodule=Data())
