"""The bank: M members over one frozen encoder, as a plain ``nn.Module``.

A batch enters once, as a packed row, and runs through the encoder for all members together. Everything that members
train is one matrix with a row per member: one step, one clip, one all-reduce and one NaN check serve the bank, and no
row can touch another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ensemble.bank.dropout import MemberDropout
from lora_ensemble.bank.encode import Adapters, PackedEncoder, States, product_dtype
from lora_ensemble.bank.families import depth_of, family_of, layer_number, target_paths
from lora_ensemble.bank.heads import drawn_head, head_logits, head_of
from lora_ensemble.bank.lora import Adapter, Member, derived_seed, linear_layers, single
from lora_ensemble.bank.padded import PaddedEncoder
from lora_ensemble.tasks import Task


class Bank(nn.Module):
    """M members over one encoder, with a head per task.

    ``classifier``: an ``AutoModelForSequenceClassification``, consumed. ``members``: expanded. ``fresh``: names of its
    weights that are not pretrained; those of the head are drawn from each member's seed, as the family draws them.
    ``init_std``: standard deviation of A where it starts normal. ``train_encoder``: full fine-tuning, for one member
    without adapters. ``frozen_dropout``: the encoder's dropout also acts for members that leave the encoder as it is.
    Raises ``UserError`` for targets that the family cannot do.
    """

    _generators: Mapping[int, torch.Generator] = {}  # of LoRA's dropout, by the number of a member that has it

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
        self.rates = [single(m.lr) for m in members]  # learning rate of each member
        self.ranks = [single(m.rank) if m.adapted else 0 for m in members]
        self.prefix: str = classifier.base_model_prefix
        self.config = classifier.config
        self.encoder = classifier.base_model
        self.train_encoder = train_encoder
        kind, family = self.config.model_type, family_of(self.config.model_type)
        self.paths = [target_paths(self.encoder, kind, single(m.targets), m.own_layers) for m in members]
        """Adapted linear layers of each member, in the encoder's order."""
        self.layers = linear_layers(self.encoder)  # every linear layer by its path, adapted or not
        # ModuleList: a task's name may hold a dot, which ModuleDict refuses.
        self.heads = nn.ModuleList(head_of(classifier, task.num_outputs) for task in tasks)
        self._by_task: dict[str, Any] = {task.name: head for task, head in zip(tasks, self.heads, strict=True)}
        if not train_encoder:
            self.encoder.requires_grad_(False)
        self.shapes = self.row_shapes(range(len(members)))  # what a row of ``weights`` holds, in order: name to shape
        pooler = {family.pooler} if getattr(self.encoder, "pooler", None) is not None else set()
        adapted = [path for path in self.layers if f"{path}.A" in self.shapes]
        self._inside = [path for path in adapted if path not in pooler]
        self._in_pooler = [path for path in adapted if path in pooler]
        self.packs = family.packs  # whether examples share a row, or batches are padded
        self.depth = depth_of(self.encoder, kind)  # layers of the encoder
        lowest = [[layer_number(p, kind) or 0 for p in paths if p not in pooler] for paths in self.paths]
        all_of_it = train_encoder or frozen_dropout
        self.starts = [
            0 if all_of_it or (numbers and not family.packs) else min(numbers, default=self.depth) for numbers in lowest
        ]
        """The layer at which each member leaves the encoder as it was: what lies below runs once for all, and without
        dropout. 0: with the embeddings; the number of layers: it reads the encoder's output."""
        self._everyone = list(range(len(members)))
        running = sum(start < self.depth for start in self.starts)  # those for which the encoder runs
        self._encode: PackedEncoder | PaddedEncoder = (
            PackedEncoder(self.encoder) if family.packs else PaddedEncoder(self.encoder, self._inside, members=running)
        )
        self._scaling: Tensor | None = None
        self._dropped = {p: {i for i, m in enumerate(members) if m.dropout and p in self.paths[i]} for p in adapted}
        self.weights = nn.Parameter(torch.zeros(len(members), row_width(self.shapes)))  # (M, P)
        pretrained = {n: p for n, p in classifier.named_parameters() if n not in fresh}
        for index, seed in enumerate(single(m.seed) for m in members):
            heads = {t: drawn_head(h, derived_seed(seed, f"head/{t}"), pretrained) for t, h in self._by_task.items()}
            self.load_member(index, self._drawn_adapter(index, seed, init_std), heads)
        # from_pretrained leaves dropout off.
        self.train()

    def row_shapes(self, members: Sequence[int]) -> dict[str, torch.Size]:
        """What a row of ``weights`` holds in a bank of these members alone, in order: name to shape."""
        shapes: dict[str, torch.Size] = {}
        for path, layer in self.layers.items():
            ranks = [self.ranks[i] for i in members if path in self.paths[i]]
            if ranks:
                shapes[f"{path}.A"] = torch.Size((max(ranks), layer.in_features))
                shapes[f"{path}.B"] = torch.Size((layer.out_features, max(ranks)))
        for task, head in self._by_task.items():
            shapes |= {f"{task}/{name}": p.shape for name, p in head.named_parameters()}
        return shapes

    def _drawn_adapter(self, index: int, seed: int, init_std: float) -> Adapter:
        generator, rank = torch.Generator().manual_seed(derived_seed(seed, "adapter")), self.ranks[index]
        adapter = {}
        for path in self.paths[index]:
            layer, a = self.layers[path], torch.empty(rank, self.layers[path].in_features)
            if self.members[index].init == "kaiming":
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # PEFT's own call
            else:
                a.normal_(generator=generator).mul_(init_std)
            adapter[path] = a, torch.zeros(layer.out_features, rank)
        return adapter

    def _views(self, weights: Tensor) -> dict[str, Tensor]:
        """Slices of the weight matrix (M, P) as (M, *shape), by name; no copies."""
        # One split: its gradient is one concatenation, where separate slices would each make a whole matrix of zeros.
        pieces = torch.split(weights, [math.prod(s) for s in self.shapes.values()], dim=1)
        shapes = self.shapes.items()
        return {name: p.view(len(weights), *shape) for (name, shape), p in zip(shapes, pieces, strict=True)}

    def forward(
        self,
        batches: Mapping[str, Mapping[str, Any]],
        states: Mapping[str, States] | None = None,
        members: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Task name to logits (M, B, C), from task name to a packed row, see :meth:`PackedEncoder.__call__`.

        ``states``: task name to :meth:`frozen_states` of the same batch, where they are known already. ``members``:
        those that are asked, by number; None: all.
        """
        dtype, asked = product_dtype(self.weights), self._everyone if members is None else list(members)
        weights = self._rows(asked)
        views = self._views(weights)
        pooler = self._adapters(asked, dtype, self._in_pooler)
        logits = {}
        for name, batch in batches.items():
            head = self._by_task[name]
            if batch["examples"] == 0:
                # A process without an example of a small last batch still takes part in the backward pass.
                logits[name] = weights.sum() * 0 + weights.new_zeros(len(asked), 0, head.config.num_labels)
                continue
            read = self._read(batch, (states or {}).get(name), dtype, asked)
            own = {n: views[f"{name}/{n}"] for n, _ in head.named_parameters()}
            logits[name] = head_logits(head, own, read, self._pool(read, pooler, dtype))
        return logits

    def seed_dropout(self, seed: int, step: str) -> None:
        """Seed dropout for a step: LoRA's by each member's own seed, whoever is beside it, all other by ``seed``."""
        torch.manual_seed(derived_seed(seed, step))
        self._seed_members(step)

    def _seed_members(self, step: str) -> None:
        seeds = {i: derived_seed(single(m.seed), f"dropout/{step}") for i, m in enumerate(self.members) if m.dropout}
        device = self.weights.device
        self._generators = {i: torch.Generator(device).manual_seed(own) for i, own in seeds.items()}

    def _dropout(self, path: str, members: Sequence[int]) -> MemberDropout | None:
        """LoRA's dropout before the adapters at a path; None where no member has it now."""
        if not self.training or not (own := self._dropped[path]):
            return None
        if not self._generators:
            self._seed_members("")
        p = [single(self.members[i].dropout) if i in own else 0.0 for i in members]
        return MemberDropout(p, [self._generators.get(i) for i in members])

    def _rows(self, members: list[int]) -> Tensor:
        """The weights of some members, a row for each."""
        return self.weights if members == self._everyone else self.weights[members]

    def _adapters(self, members: list[int], dtype: torch.dtype, paths: Sequence[str]) -> Adapters:
        """Adapters of some members, as :data:`encode.Adapters`."""
        if not paths:
            return {}  # where members are asked for, their rows are a copy
        weights = self.weights
        # Not a buffer: a change of the module's precision would round it for good.
        if self._scaling is None or (self._scaling.device, self._scaling.dtype) != (weights.device, weights.dtype):
            with torch.inference_mode(False):  # or an evaluation's would be no use to training
                self._scaling = weights.new_tensor([single(m.scaling) for m in self.members]).view(-1, 1, 1)
        scaling = self._scaling if members == self._everyone else self._scaling[members]
        views = self._views(self._rows(members))
        return {
            p: (views[f"{p}.A"].to(dtype), (views[f"{p}.B"] * scaling).to(dtype), self._dropout(p, members))
            for p in paths
        }

    def _read(self, batch: Mapping[str, Any], states: States | None, dtype: torch.dtype, members: list[int]) -> Tensor:
        """What the heads of some members read of each example, (M, B, H)."""
        states = self.frozen_states(batch) if states is None else states
        parts: list[Tensor] = []
        order = sorted(range(len(members)), key=lambda place: self.starts[members[place]])  # as they start
        starts = [start for place in order if (start := self.starts[members[place]]) < self.depth]
        if starts:
            adapters = self._adapters([members[place] for place in order[: len(starts)]], dtype, self._inside)
            read = self._encode(batch, adapters, starts=starts, states=states, dropout=self.training)
            parts.append(read.expand(len(starts), -1, -1))
        if rest := len(members) - len(starts):
            parts.append(states[self.depth].expand(rest, -1, -1))
        read = parts[0] if len(parts) == 1 else torch.cat(parts)
        return read if order == sorted(order) else read[sorted(order, key=order.__getitem__)]

    @torch.no_grad()
    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """The encoder's output that each member's head reads, the first token's, (M, B, H)."""
        return self._read(batch, None, product_dtype(self.weights), self._everyone)

    @property
    def frozen_layers(self) -> list[int]:
        """The layers, above 0, at which members start; the number of layers stands for the encoder's output."""
        return sorted(set(self.starts) - {0})

    def frozen_states(self, batch: Mapping[str, Any]) -> dict[int, Tensor]:
        """What reaches each of :attr:`frozen_layers`, see :meth:`PackedEncoder.frozen_states`."""
        return self._encode.frozen_states(batch, self.frozen_layers) if self.frozen_layers else {}

    def _pool(self, read: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor | None:
        """BERT's pooler, which belongs to the encoder: (M, B, H), or None where there is none."""
        pooler = getattr(self.encoder, "pooler", None)
        if pooler is None or isinstance(self._encode, PaddedEncoder):
            return None
        with torch.autocast(read.device.type, enabled=False):
            (pooled,) = self._encode.project(read, [pooler.dense], adapters, dtype)
            return pooler.activation(pooled)

    def _own_views(self, index: int, row: Tensor) -> dict[str, Tensor]:
        """What a member trains in its row (P,), at its own rank, by name; the rest of a row is zeros."""
        rank, views = self.ranks[index], {n: view[0] for n, view in self._views(row[None]).items()}
        own = {f"{p}.A": views[f"{p}.A"][:rank] for p in self.paths[index]}
        own |= {f"{p}.B": views[f"{p}.B"][:, :rank] for p in self.paths[index]}
        return own | {name: view for name, view in views.items() if "/" in name}

    @torch.no_grad()
    def member_state(self, index: int) -> tuple[Adapter, dict[str, dict[str, Tensor]]]:
        """A member's adapter at its own rank and its heads (task to parameter name to tensor), float32, on the CPU."""
        own = {name: view.clone() for name, view in self._own_views(index, self.weights[index].float().cpu()).items()}
        adapter = {p: (own[f"{p}.A"], own[f"{p}.B"]) for p in self.paths[index]}
        return adapter, {t: {n: own[f"{t}/{n}"] for n, _ in h.named_parameters()} for t, h in self._by_task.items()}

    @torch.no_grad()
    def load_member(self, index: int, adapter: Adapter, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of :meth:`member_state`. Raises ``ValueError`` where a name or a shape is not the member's."""
        given = {f"{p}.{side}": t for p, ab in adapter.items() for side, t in zip("AB", ab, strict=True)}
        given |= {f"{task}/{n}": t for task, head in heads.items() for n, t in head.items()}
        own = self._own_views(index, self.weights[index])
        for names, what in ((own.keys() - given.keys(), "lacks"), (given.keys() - own.keys(), "has no place for")):
            if names:
                raise ValueError(f"member {index} {what} {', '.join(sorted(names)[:3])}")
        for name, view in own.items():
            if (shape := given[name].shape) != view.shape:
                raise ValueError(f"{name} of member {index} has shape {tuple(shape)}, not {tuple(view.shape)}")
        self.weights[index].zero_()
        for name, view in own.items():
            view.copy_(given[name])

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's weights under the classification model's names, for a fully fine-tuned member."""
        return {f"{self.prefix}.{n}": p.detach().float().cpu().clone() for n, p in self.encoder.named_parameters()}

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`encoder_state`. Raises ``RuntimeError`` where names or shapes differ."""
        self.encoder.load_state_dict({n.removeprefix(self.prefix + "."): t for n, t in state.items()}, strict=True)

    def release(self) -> None:
        """Give up the memory of all numbers: weights, the encoder, and what was kept of it."""
        self.to("meta")
        del self._encode, self._scaling


def row_width(shapes: Mapping[str, torch.Size]) -> int:
    """P: how many numbers a row of these shapes has."""
    return sum(math.prod(shape) for shape in shapes.values())
