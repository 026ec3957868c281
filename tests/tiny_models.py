"""Models small enough to test with: hand-written blocks, and transformers' own classes."""

import torch
import transformers
from torch import nn

from layer_tying.core.tying import Tying
from layer_tying.policies.dqn import DQN

transformers.logging.set_verbosity_error()


class FromLosses(DQN):
    """An agent that learns from the training losses, and settles."""

    reward = "training_loss"
    settles = 0.5


class Block(nn.Module):
    """A hand-written block with all a block may have: a buffer, a bare parameter, a list."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed_forward = nn.ModuleList(
            [nn.Linear(width, 2 * width), nn.Linear(2 * width, width)]
        )
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("offset", torch.tensor(float(index)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        wide, narrow = self.feed_forward
        return x + self.scale * narrow(torch.tanh(wide(x))) + 0.01 * self.offset


class Plain(nn.Module):
    """A torch model without transformers: Linear, blocks, Linear. Input [batch, length, width]."""

    def __init__(self, num_layers: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, i) for i in range(num_layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gpt2(num_layers: int = 6, **options) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        n_layer=num_layers,
        n_head=2,
        n_embd=16,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        **{"vocab_size": 40} | options,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(num_layers: int = 6) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=40,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(
        num_layers=3,
        num_decoder_layers=3,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_heads=2,
        vocab_size=40,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt_neo() -> transformers.GPTNeoForCausalLM:
    """Its layers attend globally and locally in turn."""
    config = transformers.GPTNeoConfig(
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        hidden_size=16,
        num_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        window_size=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPTNeoForCausalLM(config)


def tokens(batch: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
    """[batch, length] token ids below 40."""
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """The loss of a Plain or a causal language model on a batch that the seed names."""
    if isinstance(model, Plain):
        dtype = model.head.weight.dtype
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return model(x).square().mean()
    ids = tokens(seed=seed)
    return model(input_ids=ids, labels=ids).loss


def random_action(rng, num_layers: int) -> list[int]:
    return [rng.randrange(i + 1) for i in range(num_layers)]


def random_tying(rng, num_layers: int) -> Tying:
    return Tying.from_action(random_action(rng, num_layers))


class Plainest(nn.Module):
    """Not one of transformers' models, yet the Trainer takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head = nn.Linear(8, 40)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}
