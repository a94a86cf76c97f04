"""Read the chain of layers from the trace of a module.

Basis paths exist for networks whose hidden units can be rescaled one by one without changing the function: linear
layers and convolutions in sequence, with only operations between them that commute with a positive factor on a unit (a
channel of a convolution is one unit). The module is traced symbolically. Every operation between the first and the last
layer must be in a list of known ones; others raise an error that names them. The class of the module does not matter,
only its ``forward``. Operations before the first and after the last layer may be anything without parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_flatness.geometry.path.chain import Chain, ChainLayer, not_a_chain
from lightning_flatness.geometry.path.layout import Layout
from lightning_flatness.geometry.path.tracing import (
    CONVOLUTION_FUNCTIONS,
    ELEMENTWISE,
    ELEMENTWISE_FUNCTIONS,
    ELEMENTWISE_METHODS,
    PADS,
    POOL_FUNCTIONS,
    POOLS,
    PRELU_FUNCTIONS,
    SPATIAL_REDUCTIONS,
    bound_arguments,
    function_name,
    is_in_place,
    is_shape,
    known_class,
    reachable,
    trace,
)


def trace_chain(module: nn.Module, prefix: str = "") -> Chain:
    """Return the layers and the slopes of the chain in a module's ``forward``. The module is not changed.

    For a module without a ``forward`` of its own (a LightningModule may have only a ``training_step``), or compiled by
    ``torch.compile``, the child that holds all trainable parameters is read instead.

    Raises:
        ValueError: If it cannot be traced or is not a chain; the error names layers with ``prefix``.

    Example:
        >>> chain = trace_chain(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
        >>> [layer.name for layer in chain.layers]
        ['0', '3']
        >>> chain.layers[1].sources.tolist()  # the linear layer's columns: four positions of each channel
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    """
    while not _has_forward(module):
        name, module = _only_child(module)
        prefix = f"{prefix}.{name}" if prefix else name
    return _ChainReader(module, prefix).read(trace(module))


def _has_forward(module: nn.Module) -> bool:
    if hasattr(module, "_orig_mod"):  # made by torch.compile
        return False
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return owner is not nn.Module and owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _only_child(module: nn.Module) -> tuple[str, nn.Module]:
    wanted = {id(p) for p in module.parameters() if p.requires_grad}
    for name, child in module.named_children():
        if wanted and wanted <= {id(p) for p in child.parameters()}:
            return name, child
    raise not_a_chain(
        f"{type(module).__name__}, which has no forward of its own and no single submodule with all its trainable "
        f"parameters (it has {[name for name, _ in module.named_children()]})"
    )


class _ChainReader:
    """Reads the layers of a traced graph in the order of execution."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module = module
        self.prefix = prefix
        self.layers: list[ChainLayer] = []
        self.slopes: list[nn.Parameter] = []
        self.layout: Layout | None = None
        self.seen: dict[int, str] = {}
        self.followed: set[fx.Node] = set()

    def read(self, graph: fx.Graph) -> Chain:
        nodes = list(graph.nodes)
        weighted = [n for n in nodes if self._is_layer(n)]
        if not weighted:
            for node in nodes:
                self._check_parameters(node)
            raise not_a_chain(f"{type(self.module).__name__} without any")
        downstream = reachable(weighted, lambda n: [] if is_shape(n) else n.users)
        upstream = reachable(weighted, lambda n: n.all_input_nodes)
        used = reachable(nodes[-1:], lambda n: n.all_input_nodes)
        behind = reachable(weighted[-1:], lambda n: n.users)
        hidden = {n for n in nodes if n in downstream and n in upstream and n is not weighted[-1] and not is_shape(n)}
        current = None
        for node in nodes:
            if node in hidden or node is weighted[-1]:
                self._follow(node, current, downstream)
                current = node
                if self._is_layer(node):
                    self._add_layer(node)
                else:
                    self.layout = self._transform(node, self.layout)
                continue
            self._check_parameters(node)
            if not is_shape(node) and any(n in hidden for n in node.all_input_nodes):
                self._check_second_use(node, is_used=node in used)
            elif node in downstream - behind - used and is_in_place(node, self.module):
                raise not_a_chain(f"{self._describe(node)} on a part of what a layer returns")
        return Chain(self.layers, self.slopes)

    def _is_layer(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._submodule(node), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return node.op == "call_function" and (node.target is F.linear or node.target in CONVOLUTION_FUNCTIONS)

    def _follow(self, node: fx.Node, current: fx.Node | None, downstream: set[fx.Node]) -> None:
        """Check that ``node`` takes the result of ``current`` and nothing else that depends on weights."""
        inputs = [n for n in node.all_input_nodes if n in downstream and not is_shape(n)]
        self.followed.add(node)
        if current is not None and inputs != [current]:
            joined = " and ".join(self._describe(n) for n in inputs) or "the input"
            raise not_a_chain(
                f"{self._describe(node)}, which takes what {joined} returns and not only that of the operation before "
                f"it, {self._describe(current)} (a branch, a residual sum or a reused layer)"
            )

    def _check_second_use(self, node: fx.Node, is_used: bool) -> None:
        """Reject paths that bypass layers; an in-place operation counts as the next step of the chain."""
        if is_used:
            hidden = next(n for n in node.all_input_nodes if n in self.followed)
            raise not_a_chain(
                f"{self._describe(hidden)}, whose result is used beside the chain: by {self._describe(node)}"
            )
        if is_in_place(node, self.module):
            self.layout = self._transform(node, self.layout)

    def _check_parameters(self, node: fx.Node) -> None:
        """Reject parameters before the first and after the last layer, except slopes."""
        if node.op == "get_attr" and (parameter := self._parameter(node)) is not None:
            for user in node.users:
                if user.target in PRELU_FUNCTIONS:
                    self._keep_slopes(parameter)
                elif not self._is_layer(user):
                    raise not_a_chain(f"{self._describe(user)} with the parameter {self._name(str(node.target))!r}")
        if node.op == "call_module" and any(True for _ in self._submodule(node).parameters()):
            if known_class(self._submodule(node)) is not nn.PReLU:
                raise not_a_chain(f"{self._describe(node)} with parameters of its own")
            self._keep_slopes(self._submodule(node).weight)

    # --------------------------------------------------------------------------------------------------- layers

    def _add_layer(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self._submodule(node)
            if known_class(module) is None:
                raise not_a_chain(f"{self._describe(node)} with a forward of its own")
            name = str(node.target)
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            has_bias = module.bias is not None
            groups = getattr(module, "groups", 1)
        else:
            arguments = bound_arguments(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
            weight, bias = (self._parameter(arguments.get(key)) for key in ("weight", "bias"))
            has_bias = arguments.get("bias") is not None
            name = str(arguments["weight"].target) if weight is not None else node.name
            groups = arguments.get("groups", 1)
        if weight is None or (has_bias and bias is None):
            raise not_a_chain(
                f"{self._describe(node)} whose weight or bias is not a parameter itself but computed from others "
                "(weight normalisation, pruning, tied weights)"
            )
        if groups != 1:
            raise not_a_chain(f"{self._describe(node)} with groups={groups}")
        self._check_first_use(name, weight, bias)
        sources, num_inputs = self._columns(node, weight)
        self.layers.append(ChainLayer(self._name(name.removesuffix(".weight")), weight, bias, sources, num_inputs))
        is_linear = weight.dim() == 2
        self.layout = Layout("last" if is_linear else "channels", weight.shape[0], weight.dim() - 2)

    def _check_first_use(self, name: str, *parameters: nn.Parameter | None) -> None:
        for p in parameters:
            if p is None:
                continue
            if id(p) in self.seen:
                what = "used twice" if self.seen[id(p)] == name else f"that shares a tensor with {self.seen[id(p)]!r}"
                raise not_a_chain(f"the layer {self._name(name)!r} {what}")
            self.seen[id(p)] = name

    def _columns(self, node: fx.Node, weight: nn.Parameter) -> tuple[Tensor, int]:
        """Return the source unit of each column of ``weight.flatten(1)``, and the number of these units."""
        num_inputs, kernel = weight.shape[1], weight.shape[2:]
        layout = self.layout or Layout("channels" if kernel else "last", num_inputs, len(kernel))
        if kernel:
            columns, wrong = layout.columns_of_convolution(num_inputs, kernel), "whose channels are not the units"
        else:
            columns, wrong = layout.columns_of_linear(num_inputs), "that is not flattened to the units"
        if columns is None:
            raise not_a_chain(f"{self._describe(node)} on an input {wrong} before it")
        return columns, layout.num_units

    # --------------------------------------------------------------------------------- operations between layers

    def _transform(self, node: fx.Node, layout: Layout | None) -> Layout:
        """Return the layout after an operation between two layers."""
        assert layout is not None
        transform = self._transform_module if node.op == "call_module" else self._transform_call
        if (transformed := transform(node, layout)) is None:
            raise not_a_chain(f"{self._describe(node)} between its layers")
        return transformed

    def _transform_module(self, node: fx.Node, layout: Layout) -> Layout | None:
        module = self._submodule(node)
        known = known_class(module)
        if known is nn.PReLU:
            self._keep_slopes(module._parameters.get("weight"))
        if known in ELEMENTWISE:
            return layout
        if known is nn.Flatten:
            return layout.flattened(module.start_dim, module.end_dim)
        if known in POOLS and not getattr(module, "return_indices", False):
            return layout.pooled(POOLS[known])
        return layout.pooled(PADS[known]) if known in PADS else None

    def _transform_call(self, node: fx.Node, layout: Layout) -> Layout | None:
        target = node.target
        if target in PRELU_FUNCTIONS:
            slopes = self._parameter(bound_arguments(node, ("input", "weight"))["weight"])
            if slopes is None:
                return None
            self._keep_slopes(slopes)
        if target in ELEMENTWISE_FUNCTIONS or (node.op == "call_method" and target in ELEMENTWISE_METHODS):
            return layout
        if target in POOL_FUNCTIONS and node.kwargs.get("return_indices") is not True:
            return layout.pooled(POOL_FUNCTIONS[target])
        name = function_name(node)
        if target not in (name, getattr(torch, name, None)):
            return None  # a function of the same name from elsewhere
        return self._transform_shape(node, name, layout)

    def _transform_shape(self, node: fx.Node, name: str, layout: Layout) -> Layout | None:
        """Return the layout after a function or method whose arguments determine it."""
        if name == "flatten":
            arguments = bound_arguments(node, ("input", "start_dim", "end_dim"))
            return layout.flattened(arguments.get("start_dim", 0), arguments.get("end_dim", -1))
        if name in ("view", "reshape"):
            return layout.viewed(node.args[1:] or [node.kwargs.get("shape", node.kwargs.get("size"))])
        if name in ("clamp", "clamp_", "clamp_min", "clamp_min_"):
            arguments = bound_arguments(node, ("input", "min", "max"))
            return layout if arguments.get("min") == 0 and arguments.get("max") is None else None
        if name in SPATIAL_REDUCTIONS:
            arguments = bound_arguments(node, ("input", "dim", "keepdim"))
            return layout.reduced(arguments.get("dim"), arguments.get("keepdim", False))
        return layout.squeezed(bound_arguments(node, ("input", "dim")).get("dim")) if name == "squeeze" else None

    def _keep_slopes(self, slopes: Any) -> None:
        if isinstance(slopes, nn.Parameter) and all(s is not slopes for s in self.slopes):
            self.slopes.append(slopes)

    # ---------------------------------------------------------------------------------------------------- names

    def _submodule(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target))

    def _attribute(self, node: fx.Node) -> Any:
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.module.get_submodule(owner), name)

    def _parameter(self, node: Any) -> nn.Parameter | None:
        value = self._attribute(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None
        return value if isinstance(value, nn.Parameter) else None

    def _name(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self._submodule(node)).__name__} ({self._name(str(node.target))!r})"
        stack = list(node.meta.get("nn_module_stack", {}).values())
        where, owner = stack[-1] if stack else (self.prefix, type(self.module))
        name = function_name(node)
        place = f" ({self._name(where)!r})" if where and stack else f" ({where!r})" if where else ""
        return f"the operation {name!r} in the forward of {owner.__name__}{place}"
