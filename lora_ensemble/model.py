"""The bank: M members over one frozen encoder, as a plain ``nn.Module``.

A batch enters once and runs through the encoder M times as one batch of M·B rows; only the adapters and the heads know
that the leading axis is M. Everything that members train is one matrix with a row per member, so that one optimiser
step, one clip, one all-reduce and one NaN check serve the bank, and no row can touch another.

Axes: M members, B examples in a batch, L tokens, H hidden width, R largest rank at a layer, C outputs of a head, P
trained numbers per member (zeros included).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lora_ensemble.families import accepts_token_types, family_of, freeze, prepare_encoder, replace_layer, target_paths
from lora_ensemble.lora import Adapter, BankLinear, Member, derived_seed, linear_layers
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
        self._token_types = accepts_token_types(self.encoder)

        self._adapters: dict[str, BankLinear] = {}
        self._shapes: dict[str, torch.Size] = {}
        for path, layer in self.layers.items():
            ranks = [m.rank or 0 for m, paths in zip(self.members, self.paths, strict=True) if path in paths]
            if ranks:
                self._adapters[path] = BankLinear(layer)
                replace_layer(self.encoder, path, self._adapters[path])
                self._shapes[f"{path}.A"] = torch.Size((max(ranks), layer.in_features))
                self._shapes[f"{path}.B"] = torch.Size((layer.out_features, max(ranks)))
        for task, head in zip(self.tasks, self.heads, strict=True):
            self._shapes.update({f"{task.name}/{name}": p.shape for name, p in head.named_parameters()})
        prepare_encoder(self.encoder, self.config.model_type, len(self.members))

        self._scaling: Tensor | None = None
        self._attention: str = self.encoder.config._attn_implementation
        width = sum(math.prod(s) for s in self._shapes.values())
        self.weights = nn.Parameter(torch.zeros(len(self.members), width))  # (M, P)
        for i, member in enumerate(self.members):
            self.load_member(i, self._drawn_adapter(i, init_std), self._drawn_heads(member, classifier, fresh))
        # from_pretrained leaves dropout off.
        self.train()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """What a row of ``weights`` holds, in order: name to shape."""
        return dict(self._shapes)

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
            name: piece.view(len(self.members), *shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def forward(self, batches: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Task name to batch (``input_ids`` and ``attention_mask`` (B, L), ``token_type_ids`` (B, L) where the encoder
        takes them). Returns task name to logits (M, B, C)."""
        self._choose_attention()
        views = self._views(self.weights)
        # Not a buffer: a change of the module's precision would round it for good.
        if (
            self._scaling is None
            or self._scaling.device != self.weights.device
            or self._scaling.dtype != self.weights.dtype
        ):
            self._scaling = self.weights.new_tensor([m.scaling or 0.0 for m in self.members]).view(-1, 1, 1)
        for path, adapter in self._adapters.items():
            adapter.A, adapter.B, adapter.scaling = views[f"{path}.A"], views[f"{path}.B"], self._scaling
        return {name: self._logits(name, batch, views) for name, batch in batches.items()}

    def _choose_attention(self) -> None:
        # On a CPU, torch's fused attention is up to twice as slow as plain matrix products at BERT's short lengths when
        # gradients are wanted, and has no advantage with dropout. Evaluation keeps it: it saves memory there.
        eager = self.training and self.weights.device.type == "cpu" and family_of(self.config.model_type).eager
        wanted = "eager" if eager else self._attention
        if self.encoder.config._attn_implementation != wanted:
            self.encoder.set_attn_implementation(wanted)

    def _logits(self, name: str, batch: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> Tensor:
        index = [t.name for t in self.tasks].index(name)
        m, (b, length) = len(self.members), batch["input_ids"].shape
        if b == 0:
            # A process without an example of a small last batch still takes part in the backward pass.
            return self.weights.sum() * 0 + self.weights.new_zeros(m, 0, self.tasks[index].num_outputs)

        def rows(x: Tensor) -> Tensor:  # (B, L) -> (M·B, L)
            return x.expand(m, b, length).reshape(m * b, length)

        inputs = {"input_ids": rows(batch["input_ids"]), "attention_mask": rows(batch["attention_mask"])}
        if self._token_types and "token_type_ids" in batch:
            inputs["token_type_ids"] = rows(batch["token_type_ids"])
        out = self.encoder(**inputs)
        hidden = out.last_hidden_state.view(m, b, length, -1)
        pooled = getattr(out, "pooler_output", None)
        head = self.heads[index]
        parameters = {n: views[f"{name}/{n}"] for n, _ in head.named_parameters()}
        stub = getattr(head, self.prefix)

        def one(parameters: dict[str, Tensor], hidden: Tensor, pooled: Tensor | None, mask: Tensor) -> Tensor:
            stub.hidden, stub.pooled = hidden, pooled
            return functional_call(head, parameters, (), {"inputs_embeds": hidden, "attention_mask": mask}).logits

        try:
            # "different": each member draws its own dropout masks.
            many = vmap(one, in_dims=(0, 0, None if pooled is None else 0, None), randomness="different")
            pooled = None if pooled is None else pooled.view(m, b, -1)
            return many(parameters, hidden, pooled, batch["attention_mask"])
        finally:
            stub.hidden = stub.pooled = None  # keep no activations alive

    @torch.no_grad()
    def member_state(self, index: int) -> tuple[Adapter, dict[str, dict[str, Tensor]]]:
        """A member's adapter at its own rank and its heads (task to parameter name to tensor), float32, on the CPU."""
        views = self._views(self.weights[index : index + 1].float().cpu().expand(len(self.members), -1))
        views = {name: view[0] for name, view in views.items()}
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

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's weights under the classification model's names, for a fully fine-tuned member."""
        return {f"{self.prefix}.{n}": p.detach().float().cpu().clone() for n, p in self.encoder.named_parameters()}


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
