"""The bank: M members over one frozen encoder, as a plain ``nn.Module``.

A batch enters once, as a packed row of tokens, and runs through the encoder for all members together. Everything that
members train is one matrix with a row per member, so that one optimiser step, one clip, one all-reduce and one NaN
check serve the bank, and no row can touch another.

Axes: M members, B examples in a batch, T tokens of all of them, H hidden width, R largest rank at a layer, C outputs of
a head, P trained numbers per member (zeros included).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lora_ensemble.bank.encode import Adapters, PackedEncoder, product_dtype
from lora_ensemble.bank.families import family_of, freeze, target_paths
from lora_ensemble.bank.lora import Adapter, Member, derived_seed, linear_layers
from lora_ensemble.bank.padded import PaddedEncoder
from lora_ensemble.tasks import Task


class _Encoded(nn.Module):
    """Stands where the encoder was in a classification model, and answers with hidden states already computed."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.pooled: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=self.pooled)


class Bank(nn.Module):
    """M members over one encoder, with a head per task.

    ``classifier``: an ``AutoModelForSequenceClassification`` of any supported family, consumed. ``fresh``: names of its
    weights that are not pretrained; those of the head are drawn from each member's seed, as the family draws them.
    ``init_std``: standard deviation of A. ``train_encoder``: full fine-tuning, for one member without adapters.
    ``frozen_dropout``: whether the encoder's dropout also acts for members that leave the encoder as it is.

    Raises ``UserError`` for targets that the family cannot do.
    """

    def __init__(
        self,
        classifier: Any,
        *,
        members: Sequence[Member],
        tasks: Sequence[Task],
        fresh: set[str],
        init_std: float = 0.02,
        train_encoder: bool = False,
        frozen_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.members, self.tasks = list(members), list(tasks)
        self.prefix: str = classifier.base_model_prefix
        self.config = classifier.config
        self.encoder = classifier.base_model
        self.train_encoder = train_encoder
        self.paths = [target_paths(self.encoder, self.config.model_type, m.targets) for m in self.members]
        """Adapted linear layers of each member, in the encoder's order."""
        self.layers = linear_layers(self.encoder)
        """Every linear layer by its path, adapted or not."""
        # ModuleList: a task's name may hold a dot, which ModuleDict refuses.
        self.heads = nn.ModuleList(_skeleton(classifier, task.num_outputs) for task in self.tasks)
        if not train_encoder:
            freeze(self.encoder)
        freeze(self.heads)

        self._shapes = self.row_shapes(range(len(self.members)))
        self._adapted = [path for path in self.layers if f"{path}.A" in self._shapes]

        family = family_of(self.config.model_type)
        pooler = {family.pooler} if getattr(self.encoder, "pooler", None) is not None else set()
        frozen = [not train_encoder and not set(paths) - pooler for paths in self.paths]
        self.deep = [i for i, unchanged in enumerate(frozen) if frozen_dropout or not unchanged]
        """Members for which the encoder runs with their adapters and dropout; for the others it is what it was, up to
        the pooler, and runs once without dropout."""
        self.packs = family.packs
        """Whether examples share a row, or batches are padded."""
        self._inside = [path for path in self._adapted if path not in pooler]
        self._encode: PackedEncoder | PaddedEncoder = (
            PackedEncoder(self.encoder)
            if family.packs
            else PaddedEncoder(self.encoder, self._inside, members=max(1, len(self.deep)))
        )
        self._scaling: Tensor | None = None
        self.weights = nn.Parameter(torch.zeros(len(self.members), row_width(self._shapes)))  # (M, P)
        for i, member in enumerate(self.members):
            self.load_member(i, self._drawn_adapter(i, init_std), self._drawn_heads(member, classifier, fresh))
        # from_pretrained leaves dropout off.
        self.train()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """What a row of ``weights`` holds, in order: name to shape."""
        return dict(self._shapes)

    def row_shapes(self, members: Sequence[int]) -> dict[str, torch.Size]:
        """What a row of ``weights`` holds in a bank of these members alone, in order: name to shape."""
        shapes: dict[str, torch.Size] = {}
        for path, layer in self.layers.items():
            ranks = [self.members[i].rank or 0 for i in members if path in self.paths[i]]
            if ranks:
                shapes[f"{path}.A"] = torch.Size((max(ranks), layer.in_features))
                shapes[f"{path}.B"] = torch.Size((layer.out_features, max(ranks)))
        for task, head in zip(self.tasks, self.heads, strict=True):
            shapes.update({f"{task.name}/{name}": p.shape for name, p in head.named_parameters()})
        return shapes

    def _drawn_adapter(self, index: int, init_std: float) -> Adapter:
        member, generator = self.members[index], torch.Generator()
        generator.manual_seed(derived_seed(member.seed, "adapter"))
        layers, rank = self.layers, member.rank or 0
        a = {p: torch.randn(rank, layers[p].in_features, generator=generator) * init_std for p in self.paths[index]}
        return Adapter(A=a, B={p: torch.zeros(layers[p].out_features, rank) for p in self.paths[index]})

    def _drawn_heads(self, member: Member, classifier: Any, fresh: set[str]) -> dict[str, dict[str, Tensor]]:
        pretrained = {n: p for n, p in classifier.named_parameters() if n not in fresh}
        drawn = {}
        for task, head in zip(self.tasks, self.heads, strict=True):
            _draw(head, derived_seed(member.seed, f"head/{task.name}"))
            drawn[task.name] = {
                name: pretrained[name] if name in pretrained and pretrained[name].shape == p.shape else p
                for name, p in head.named_parameters()
            }
        return drawn

    def _views(self, weights: Tensor) -> dict[str, Tensor]:
        """Slices of the weight matrix (M, P) as (M, *shape), by name; no copies."""
        # One split: its gradient is one concatenation, where separate slices would each make a whole matrix of zeros.
        pieces = torch.split(weights, [math.prod(s) for s in self._shapes.values()], dim=1)
        return {
            name: piece.view(len(weights), *shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def forward(
        self, batches: Mapping[str, Mapping[str, Any]], frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Task name to logits (M, B, C).

        ``batches``: task name to a packed row: ``input_ids`` (T,), ``token_type_ids`` (T,) where the encoder takes
        them, and :func:`packing.layout`. ``frozen``: task name to :meth:`read_frozen` of the same batch, where it is
        known already.
        """
        dtype = product_dtype(self.weights)
        views = self._views(self.weights)
        everybody = range(len(self.members))
        pooler = self._adapters(self.weights, everybody, dtype, [p for p in self._adapted if p not in self._inside])
        logits = {}
        for name, batch in batches.items():
            if batch["examples"] == 0:
                # A process without an example of a small last batch still takes part in the backward pass.
                outputs = self.tasks[self._index(name)].num_outputs
                logits[name] = self.weights.sum() * 0 + self.weights.new_zeros(len(self.members), 0, outputs)
                continue
            read = self._read(batch, (frozen or {}).get(name), dtype)
            logits[name] = self._head(name, read, self._pool(read, pooler, dtype), views)
        return logits

    def _index(self, task: str) -> int:
        return [t.name for t in self.tasks].index(task)

    def _adapters(
        self, weights: Tensor, members: Sequence[int], dtype: torch.dtype, paths: Sequence[str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Adapters of some members, from their rows of the weight matrix, as :data:`encode.Adapters`."""
        # Not a buffer: a change of the module's precision would round it for good.
        if self._scaling is None or (self._scaling.device, self._scaling.dtype) != (weights.device, weights.dtype):
            with torch.inference_mode(False):  # or an evaluation's would be no use to training
                self._scaling = weights.new_tensor([m.scaling or 0.0 for m in self.members]).view(-1, 1, 1)
        scaling = self._scaling if len(members) == len(self.members) else self._scaling[list(members)]
        views = self._views(weights)
        return {p: (views[f"{p}.A"].to(dtype), (views[f"{p}.B"] * scaling).to(dtype)) for p in paths}

    def _read(self, batch: Mapping[str, Any], frozen: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What the heads read of each example, (M, B, H)."""
        parts: list[Tensor] = []
        if self.deep:
            rows = self.weights if len(self.deep) == len(self.members) else self.weights[self.deep]
            adapters = self._adapters(rows, self.deep, dtype, self._inside)
            read = self._encode(batch, adapters, members=len(self.deep), dropout=self.training)
            parts.append(read.expand(len(self.deep), -1, -1))
        others = [i for i in range(len(self.members)) if i not in self.deep]
        if others:
            once = self.read_frozen(batch) if frozen is None else frozen
            parts.append(once.expand(len(others), -1, -1))
        if len(parts) == 1:
            return parts[0]
        order = [*self.deep, *others]
        return torch.cat(parts)[[order.index(i) for i in range(len(order))]]

    @torch.no_grad()
    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """The encoder's output that each member's head reads, the first token's, (M, B, H)."""
        return self._read(batch, None, product_dtype(self.weights))

    @torch.no_grad()
    def read_frozen(self, batch: Mapping[str, Any]) -> Tensor:
        """What the untouched encoder, without dropout, gives the heads to read of each example, (1, B, H)."""
        return self._encode(batch, {}, members=1, dropout=False)

    def _pool(self, read: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor | None:
        """BERT's pooler, which belongs to the encoder: (M, B, H), or None where there is none."""
        pooler = getattr(self.encoder, "pooler", None)
        if pooler is None or isinstance(self._encode, PaddedEncoder):
            return None
        with torch.autocast(read.device.type, enabled=False):
            (pooled,) = self._encode.project(read, [pooler.dense], adapters, dtype)
            return pooler.activation(pooled)

    def _head(self, name: str, read: Tensor, pooled: Tensor | None, views: Mapping[str, Tensor]) -> Tensor:
        head = self.heads[self._index(name)]
        parameters = {n: views[f"{name}/{n}"] for n, _ in head.named_parameters()}
        stub = getattr(head, self.prefix)
        mask = read.new_ones(read.shape[1], 1)

        def one(parameters: dict[str, Tensor], read: Tensor, pooled: Tensor | None) -> Tensor:
            # One token an example: the one that the head reads.
            stub.hidden, stub.pooled = read[:, None], pooled
            return functional_call(head, parameters, (), {"inputs_embeds": stub.hidden, "attention_mask": mask}).logits

        try:
            # "different": each member draws its own dropout masks.
            many = vmap(one, in_dims=(0, 0, None if pooled is None else 0), randomness="different")
            return many(parameters, read, pooled)
        finally:
            stub.hidden = stub.pooled = None  # keep no activations alive

    @torch.no_grad()
    def member_state(self, index: int) -> tuple[Adapter, dict[str, dict[str, Tensor]]]:
        """A member's adapter at its own rank and its heads (task to parameter name to tensor), float32, on the CPU."""
        views = {n: view[0] for n, view in self._views(self.weights[index : index + 1].float().cpu()).items()}
        rank = self.members[index].rank or 0
        adapter = Adapter(
            A={p: views[f"{p}.A"][:rank].clone() for p in self.paths[index]},
            B={p: views[f"{p}.B"][:, :rank].clone() for p in self.paths[index]},
        )
        heads = {
            task.name: {n: views[f"{task.name}/{n}"].clone() for n, _ in head.named_parameters()}
            for task, head in zip(self.tasks, self.heads, strict=True)
        }
        return adapter, heads

    @torch.no_grad()
    def load_member(self, index: int, adapter: Adapter, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of :meth:`member_state`. Raises ``ValueError`` where a name or a shape is not the member's."""
        rank = self.members[index].rank or 0
        if set(adapter.A) != set(self.paths[index]) or set(adapter.B) != set(self.paths[index]):
            raise ValueError(f"adapters of member {index} sit on other layers: {sorted(adapter.A)[:3]}...")
        given = {f"{p}.{k}": t for k, part in (("A", adapter.A), ("B", adapter.B)) for p, t in part.items()}
        given.update({f"{task}/{n}": t for task, head in heads.items() for n, t in head.items()})
        for name, view in self._views(self.weights).items():
            place = view[index].zero_()
            if name not in given:
                if "/" in name:
                    raise ValueError(f"the head of member {index} lacks {name}")
                continue
            if name.endswith(".A") and name.removesuffix(".A") in adapter.A:
                place = place[:rank]
            elif name.endswith(".B") and name.removesuffix(".B") in adapter.B:
                place = place[:, :rank]
            tensor = given.pop(name)
            if tensor.shape != place.shape:
                raise ValueError(f"{name} of member {index} has shape {tuple(tensor.shape)}, not {tuple(place.shape)}")
            place.copy_(tensor)
        if given:
            raise ValueError(f"unknown weights for member {index}: {sorted(given)[:3]}")

    def head_names(self) -> list[str]:
        """Children of the classification model that hold the head: PEFT's ``modules_to_save``."""
        return [name for name, child in self.heads[0].named_children() if any(True for _ in child.parameters())]

    def zero_adapter(self) -> Adapter:
        """An adapter of rank 1 on the encoder's last linear layer that changes nothing."""
        path, layer = list(self.layers.items())[-1]
        return Adapter(A={path: torch.zeros(1, layer.in_features)}, B={path: torch.zeros(layer.out_features, 1)})

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`encoder_state`. Raises ``RuntimeError`` where names or shapes differ."""
        self.encoder.load_state_dict({n.removeprefix(self.prefix + "."): t for n, t in state.items()}, strict=True)

    def let_go(self) -> None:
        """Give up all numbers: weights, the encoder, and what was kept of it."""
        self.to("meta")
        del self._encode, self._scaling

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's weights under the classification model's names, for a fully fine-tuned member."""
        return {f"{self.prefix}.{n}": p.detach().float().cpu().clone() for n, p in self.encoder.named_parameters()}


def row_width(shapes: Mapping[str, torch.Size]) -> int:
    """P: how many numbers a row of these shapes has."""
    return sum(math.prod(shape) for shape in shapes.values())


def _skeleton(classifier: Any, num_labels: int) -> Any:
    """The classification model around its encoder, for another number of outputs, on the CPU, weights undefined."""
    config = copy.deepcopy(classifier.config)
    config.num_labels = num_labels
    with torch.device("meta"):  # the encoder inside it is thrown away
        head = type(classifier)(config)
    setattr(head, head.base_model_prefix, _Encoded())
    return head.to_empty(device="cpu")


def _draw(head: Any, seed: int) -> None:
    """Initialise the head as its family does, from a seed, leaving the global random state alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in head.parameters():
            # transformers skips what it has initialised before; NaN shows what it would leave out.
            parameter.fill_(float("nan"))
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
        modules = [m for m in head.modules() if not isinstance(m, _Encoded)]
        for module in reversed(modules):  # children first, the model itself last, as transformers does
            head._init_weights(module)
    if any(torch.isnan(p).any() for p in head.parameters()):
        raise RuntimeError(f"{type(head).__name__} does not initialise its whole head")
