"""Real PyTorch programs compute on the simulated GPU, bit for bit, what they compute on the CPU."""

from __future__ import annotations

import gc
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from acb.config import SimulatedSpec  # noqa: E402
from acb.devices.simulated import Card, create_cards  # noqa: E402
from acb.hooks.torch import simulated  # noqa: E402

nn: Any = torch.nn
F: Any = torch.nn.functional

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def digest(values: Any) -> str:
    """Of all bytes, types and shapes in a nest of tensors and numbers."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        text = "".join(map(digest, values))
    elif isinstance(values, torch.Tensor):
        text = f"{values.dtype}{tuple(values.shape)}{values.detach().cpu().tolist()!r}"
    else:
        text = repr(values)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    create_cards(tmp_path, SimulatedSpec((1 << 30,)))
    with Card.open(tmp_path) as card:
        yield card


def train_encoder(device: str, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    x = torch.randn(4, 8, 32).to(device)
    mask = nn.Transformer.generate_square_subsequent_mask(8, device=device)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x, mask=mask, is_causal=True).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    model.eval()
    with torch.inference_mode():
        return losses, saved["model"], model(x)


def fused_encoder(device: str) -> Any:
    return train_encoder(device, fused=True)


def foreach_encoder(device: str) -> Any:
    return train_encoder(device, foreach=True)


class Pictures(torch.utils.data.Dataset):  # type: ignore[misc, unused-ignore]
    """Seeded noise with a class each."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)), index % 5


def train_on_pictures(device: str) -> Any:
    """Convolutions in channels-last order; worker processes prepare the batches, pinned for a GPU."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
    layers += [nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5)]
    model = nn.Sequential(*layers).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    pin = device == "cuda"
    losses = []
    for x, y in torch.utils.data.DataLoader(Pictures(), 8, shuffle=True, num_workers=2, pin_memory=pin):
        assert x.is_pinned() == pin
        x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def recurrent(device: str) -> Any:
    torch.manual_seed(4)
    network = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True, dropout=0.1).to(device)
    embedding = nn.Embedding(10, 6, padding_idx=0).to(device)
    x = embedding(torch.randint(1, 10, (3, 7)).to(device))
    lengths = torch.tensor([7, 3, 5])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, lengths = nn.utils.rnn.pad_packed_sequence(network(packed)[0], batch_first=True)
    assert lengths.device.type == "cpu"
    scores = y.transpose(0, 1)[..., :5].log_softmax(2)
    loss = F.ctc_loss(scores, torch.tensor([[1, 2], [3, 4], [1, 1]]).to(device), lengths, torch.tensor([2, 1, 2]))
    loss.backward()
    return y, loss, embedding.weight.grad, [parameter.grad for parameter in network.parameters()]


def gradients(device: str) -> Any:
    from torch.func import grad, hessian, jacrev, vmap
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(6)
    x = torch.randn(3, 4).to(device).requires_grad_()
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1)).to(device)

    def function(a: Any) -> Any:
        return (a.sin() * a).sum()

    results = [jacrev(lambda a: a**3)(x.detach()), hessian(function)(x.detach()[0]), vmap(grad(function))(x.detach())]
    for reentrant in (True, False):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    scaler = torch.amp.GradScaler(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler.scale(model(x).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return results, x.grad, model.state_dict(), scaler.get_scale()


def scripted(device: str) -> Any:
    class Scripted(nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.dropout(torch.relu(self.linear(x)))
            mask = torch.ones([4], dtype=torch.bool, device=x.device)
            return (torch.zeros([4], device=x.device) + y).masked_fill(mask, 0.5) + y.sum(dim=0)

    torch.manual_seed(11)
    model = torch.jit.script(Scripted()).to(device)
    x = torch.randn(3, 4).to(device)
    results = [model(x) for _ in range(3)]
    sum(results).sum().backward()
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    loaded = torch.jit.load(file, map_location=device).eval()
    assert loaded(x).device.type == device
    return results, loaded(x), [parameter.grad for parameter in model.parameters()]


def fold_a_protein(device: str) -> Any:
    transformers = pytest.importorskip("transformers")
    trunk = {"num_blocks": 1, "sequence_state_dim": 32, "pairwise_state_dim": 16, "max_recycles": 1}
    trunk |= {"sequence_head_width": 8, "pairwise_head_width": 8}
    structure = {
        "sequence_dim": 32,
        "pairwise_dim": 16,
        "ipa_dim": 8,
        "resnet_dim": 8,
        "num_blocks": 2,
        "num_heads_ipa": 4,
    }
    letters = [*"LAGVSERTIDPKQNFYMHWCXBUZO.-"]
    configuration = transformers.EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        is_folding_model=True, position_embedding_type="rotary", mask_token_id=32, pad_token_id=1,
        max_position_embeddings=64, vocab_list=["<cls>", "<pad>", "<eos>", "<unk>", *letters, "<null_1>", "<mask>"],
        esmfold_config={"trunk": trunk | {"structure_module": structure}, "fp16_esm": False, "lddt_head_hid_dim": 8},
    )  # fmt: skip
    torch.manual_seed(8)
    model = transformers.EsmForProteinFolding(configuration).eval().to(device)
    with torch.no_grad():
        output = model.infer(["MQIFVKTLTGKT"])
    assert output["positions"].device.type == device
    return output["positions"], output["plddt"], model.output_to_pdb(output)


def language_and_vision(device: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    torch.manual_seed(9)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes)).to(device)
    ids = torch.randint(0, 50, (2, 9)).to(device)
    output = bert(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    output.loss.backward()
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))
    with torch.inference_mode():
        seen = vit.to(device).eval()(torch.randn(1, 3, 32, 32).to(device)).logits
    return output.loss, output.logits, bert.bert.embeddings.word_embeddings.weight.grad, seen


PROGRAMS: list[Callable[[str], Any]] = [
    train_encoder,
    fused_encoder,
    foreach_encoder,
    train_on_pictures,
    recurrent,
    gradients,
    scripted,
    fold_a_protein,
    language_and_vision,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_bit_for_bit_as_on_the_cpu(card: Card, program: Callable[[str], Any]) -> None:
    expected = digest(program("cpu"))
    simulated.install(torch, lambda: card, lambda: card)
    try:
        assert digest(program("cuda")) == expected
        assert card.peak() > 0
    finally:
        gc.collect()
        simulated.uninstall()
