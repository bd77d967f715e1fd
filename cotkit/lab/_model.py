"""The embedded model: a real tokenizer, a small Llama, its checkpoints; and ``load`` for any other model."""

import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from cotkit._check import integers

CHECKPOINTS = Path(__file__).parent / "checkpoints"
VOCABULARY = 768
SPECIALS = (
    "<pad>",
    "<eos>",
    "<mask>",
    "<think>",
    "</think>",
    "<tool>",
    "</tool>",
    "<user>",
    "<assistant>",
    "<system>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Frequent English words, so that prose outside the tasks does not fall apart into letters.
COMMON = (
    "the of and to in is that it was for on are as with they be at one have this from or had by not but "
    "what all were we when there can an your which their said if do will each about how up out them "
    "then she many some so these would other into has more her two like him see time could no make than "
    "first been its who now people my made over did down only way find use may water long little very "
    "after words called just where most know get through back much before go good new write our used me "
    "man too any day same right look think also around another came come work three word must because "
    "does part even place well such here take why things help put years different away again off went "
    "old number great tell men say small every found still between name should home big give air line "
    "set own under read last never us left end along while might next sound below saw something thought "
    "both few those always looked show large often together asked house world going want school until "
    "form food keep children feet land side without boy once animals life enough took sometimes four "
    "head above kind began almost live page got earth need far hand high year mother light parts "
    "country father let night following picture being study second soon story since white ever paper "
    "hard near sentence better best across during today others however sure means knew try told young "
    "miles sun ways thing whole hear example heard several change answer room sea against top turned "
    "learn point city play toward five using himself usually money seen car morning half cost costs "
    "each buy buys sold sell sells earn earns total hour hours minutes week weeks month months dollars "
    "cents price pay pays paid per percent times twice add adding left remaining many much eat eats "
    "spend spends spent save saves bought gave friends boxes bags eggs cookies books apples miles "
    "pounds feet students class party days altogether combined how does she he it take makes needs "
    "worked weighs"
)


def build_tokenizer(seed: int = 0) -> Any:
    """Train the byte-level BPE tokenizer, digits one by one, on the lab's own tasks: always the same."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from cotkit.tasks.arithmetic import countdown, word_problem

    rng = random.Random(seed)
    texts = []
    for _ in range(3000):
        row = word_problem(
            rng,
            steps=(1, 6),
            style=rng.choice(("terse", "normal", "normal", "verbose", "check")),
            distractors=rng.randint(0, 2),
            answerable=0.9,
            cue=0.1,
            implicit=0.1,
        )
        texts.append(row["prompt"] + row["completion"])
    for _ in range(300):
        row = countdown(rng, numbers=3, target=None, trace=rng.choice(("solution", "dfs")))
        texts.append(row["prompt"] + row["completion"])
    texts += [f" {word} " * 40 for word in dict.fromkeys(COMMON.split())]
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(tokenizer: Any, seed: int = 0) -> Any:
    """A Llama of 4 layers, 128 wide, with random weights drawn from ``seed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load(name: str = "tiny", *, four_bit: bool = False, lora: Any = None, seed: int = 0) -> tuple[Any, Any]:
    """Model and tokenizer: the one call that changes when a notebook moves to a real model.

    Args:
        name: "tiny" (the embedded model), a directory that holds a saved Hugging Face model, or a hub id.
        four_bit: load the weights in 4 bit (NF4, through bitsandbytes); on CUDA and on the CPU. Only LoRA
            weights can be trained then.
        lora: None, a rank (alpha is twice the rank, all linear layers but the head), or a
            ``peft.LoraConfig``.
        seed: which of the embedded checkpoints (0, 1, 2: three pre-training runs), and the seed of new LoRA
            weights.

    Returns:
        ``(model, tokenizer)``: on CUDA where there is one (bfloat16 there, for anything but "tiny"), else
        float32 on the CPU; padding side left, pad token set.

    Raises:
        ValueError: no such checkpoint, or a name that is neither a directory nor found on the hub.

    Source: none (plumbing)

    Example:
        >>> model, tokenizer = load("tiny")
        >>> tokenizer.decode(tokenizer("17+5")["input_ids"])
        '17+5'
    """
    integers("load", seed=seed)
    cuda = torch.cuda.is_available()
    if name == "tiny":
        model, tokenizer = _tiny(seed)
        if four_bit:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = _pretrained(folder, four_bit, torch.float32)
    else:
        from transformers import AutoTokenizer

        model = _pretrained(name, four_bit, torch.bfloat16 if cuda else torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    if cuda and not four_bit:
        model = model.to("cuda")
    if lora is not None:
        model = _with_lora(model, lora, four_bit, seed)
    return model.eval(), tokenizer


def _tiny(seed: int) -> tuple[Any, Any]:
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast

    path = CHECKPOINTS / f"tiny-{seed}.safetensors"
    if not path.exists():
        there = sorted(p.stem.removeprefix("tiny-") for p in CHECKPOINTS.glob("tiny-*.safetensors"))
        raise ValueError(f"load: expected seed to be one of {', '.join(there) or 'none'}, got {seed}.")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINTS)
    model = build_model(tokenizer)
    weights = {key: value.float() for key, value in load_file(path).items()}
    model.load_state_dict(weights, strict=False)  # the head is tied to the embeddings and not stored
    return model, tokenizer


def _pretrained(name: str, four_bit: bool, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized: dict[str, Any] = {}
    if four_bit:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        quantized["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **quantized)
    except OSError as error:
        raise ValueError(
            f"load: expected 'tiny', a directory with a saved model, or a hub id, got {name!r}. {error}"
        ) from error


def _with_lora(model: Any, lora: Any, four_bit: bool, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if isinstance(lora, int):
        lora = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM")
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=torch.cuda.is_available())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, lora)
