"""Linear layers and norms."""

import pickle

import torch

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class _Module(torch.nn.Module):
    def __init__(self, groups: int = 1):
        super().__init__()
        self._groups, self._cached, self.fp8_meta = groups, {}, {}

    def _prepare(self, rows: torch.Tensor, splits: list[int], weights: list[torch.Tensor], first: bool | None):
        """The weights that FP8 computes with: those of the step's first micro-batch, where they may be cached."""
        assert [rows.shape[0]] == [sum(splits)] and len(weights) == self._groups
        state = FP8GlobalStateManager
        if not state.enabled:
            return weights
        assert all(n % 16 == 0 for n in splits), f"rows {splits} of FP8 GEMMs are no multiples of 16"
        assert all(size % 16 == 0 for weight in weights for size in weight.shape)
        if state.recipe.delayed():
            length = state.recipe.amax_history_len
            for direction, tensors in (("fwd", 3), ("bwd", 2)):
                self.fp8_meta.setdefault(f"amax_history_{direction}", torch.zeros(length, tensors * self._groups))
            state.add_fp8_tensors_to_global_buffer(self.fp8_meta)
            now = self.fp8_meta["amax_history_fwd"][0]
            for i, pair in enumerate(zip(rows.split(splits), weights)):
                for place, tensor in enumerate(pair, start=3 * i):
                    if tensor.numel():
                        now[place] = torch.maximum(now[place], tensor.detach().abs().amax().float())
        if first is None:
            return weights
        for i, weight in enumerate(weights):
            if first or i not in self._cached:
                self._cached[i] = weight.detach().clone()
        return [weight + (self._cached[i] - weight).detach() for i, weight in enumerate(weights)]

    def get_extra_state(self) -> torch.Tensor:
        histories = {k: v for k, v in self.fp8_meta.items() if k != "registered"}
        return torch.frombuffer(bytearray(pickle.dumps(histories)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        for name, history in pickle.loads(state.numpy().tobytes()).items():
            self.fp8_meta.setdefault(name, torch.zeros_like(history)).copy_(history)


class _FusedGradient(torch.autograd.Function):
    """x W^T whose weight gradient goes into ``main_grad``."""

    @staticmethod
    def forward(ctx, x, weight, parameter, overwrite):
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.overwrite = parameter, overwrite
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        product = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        main_grad = ctx.parameter.main_grad
        main_grad.copy_(product) if ctx.overwrite else main_grad.add_(product)
        ctx.parameter.grad_added_to_main_grad = True
        return gradient @ weight, torch.full_like(weight, float("nan")), None, None


class Linear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        symmetric_ar_type=None,
    ):
        super().__init__()
        assert tp_size == 1 and not return_bias
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.save_original_input = False
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        # As in Transformer Engine, a layer without a bias has an empty tensor in its place.
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else torch.Tensor()
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, int(parallel_mode == "row")
        self.bias.tensor_model_parallel, self.bias.partition_dim = True, 0

    def forward(self, inp, is_first_microbatch=None):
        rows = inp.reshape(-1, inp.shape[-1])
        (weight,) = self._prepare(rows, [rows.shape[0]], [self.weight], is_first_microbatch)
        if self.fuse_wgrad_accumulation and torch.is_grad_enabled():
            output = _FusedGradient.apply(inp, weight, self.weight, bool(is_first_microbatch))
        else:
            output = inp @ weight.t()
        return output + self.bias if self.bias.numel() else output


class LayerNormLinear(Linear):
    pass


class GroupedLinear(_Module):
    def __init__(
        self, num_gemms, in_features, out_features, init_method=None, bias=True, params_dtype=None, device="cuda"
    ):
        super().__init__(num_gemms)
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))

    def forward(self, inp, m_splits, is_first_microbatch=None):
        weights = [getattr(self, f"weight{i}") for i in range(self._groups)]
        weights = self._prepare(inp, m_splits, weights, is_first_microbatch)
        return torch.cat([x @ weight.t() for x, weight in zip(inp.split(m_splits), weights)])


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self, hidden_size, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False, device=None
    ):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype)
        self.weight.sequence_parallel = sequence_parallel


LayerNorm = RMSNorm
