"""The command line: train, generate, evaluate, export, verify. Also installed as `align-jax`.

    python -m align_jax train --config=FILE.py[:arg] --workdir=DIR [--config.key=value]...
    python -m align_jax generate --model=PATH_OR_WORKDIR --prompt=TEXT
    python -m align_jax evaluate --workdir=DIR [--data=SOURCE]
    python -m align_jax export --workdir=DIR --to=DIR
    python -m align_jax verify PACKAGE.MODULE:LOSS --kind=pair|token|reward

A config file is Python code, and `train` runs it: start only what you would run yourself.

Exit status: 0 done; 1 a loss that `verify` found wrong; 2 something the user can mend, said in one
message; 130 or 143 interrupted.
"""

import argparse
import dataclasses
import json
import logging
import re
import sys
from typing import Any

from align_jax.files import refusal
from align_jax.text import one_line, printable


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments, rest = _parser().parse_known_args(argv)
    overrides = [item for item in rest if item.startswith("--config.") and "=" in item]
    unknown = [item for item in rest if item not in overrides]
    if unknown or (overrides and arguments.command != "train"):
        wrong = (unknown or overrides)[0]
        hint = ""
        if arguments.command == "train" and wrong.startswith("--"):
            name = wrong.removeprefix("--").removeprefix("config.").partition("=")[0]
            hint = f" Fields of the config are set by --config.KEY=VALUE: --config.{name}=..."
        return _fail(
            f"unknown argument {wrong!r}; see `align-jax {arguments.command} --help`.{hint}"
        )

    from align_jax.errors import DataError, ModelError, RewardError, RunError
    from align_jax.training.signals import Interrupted, Stopped

    # Orbax logs with a traceback what it then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return arguments.run(arguments, overrides) or 0
    except (Interrupted, Stopped) as stop:
        print(f"align-jax: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(
            "align-jax: interrupted. The same command goes on from what is finished.",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        reason = refusal(error)
        return _fail(f"{reason}, then start again ({error})." if reason else str(error))
    except (MemoryError, RuntimeError) as error:
        # Of jax's own errors this one only is the user's to mend.
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        return _fail(
            f"the memory is too small for this ({one_line(str(error)) or 'MemoryError'}). Lower "
            "the lengths, the batch size or the samples, or use more devices."
        )
    except (RunError, DataError, ModelError, RewardError, ImportError) as error:
        return _fail(str(error))


_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|[Oo]ut of memory")


def _fail(message: str) -> int:
    print(f"align-jax: error: {printable(message)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align-jax", description="Align language models in JAX.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, help: str, **described: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **described,
        )
        sub.set_defaults(run=run)
        return sub

    train = command(
        "train",
        _train,
        "Run an experiment, or go on with one that was stopped.",
        usage="%(prog)s [-h] --config FILE.py[:arg] --workdir DIR [--config.KEY=VALUE ...]",
        epilog="""\
Any field of the config can be set, as often as needed, with --config.KEY=VALUE (with the "="):

  align-jax train --config=experiments/dpo.py:scale=tiny --workdir=runs/dpo \\
      --config.data.source=pairs.jsonl --config.optimizer.learning_rate=1e-6

VALUE is a plain value and never run. The config file itself is Python code, and is run: start only
a file that you have read or whose author you trust.""",
    )
    train.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:arg]",
        help="Python file with get_config(arg), such as dpo.py:scale=small; its code is run",
    )
    train.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")

    generate = command("generate", _generate, "Sample from a model or a run.")
    generate.add_argument(
        "--model", required=True, help="model directory, hub id, GGUF, or workdir"
    )
    generate.add_argument("--prompt", required=True)
    generate.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the chat template"
    )
    generate.add_argument(
        "--special_tokens",
        choices=("text", "allow"),
        default="text",
        help="what special tokens in the prompt are read as: text, or the tokens (allow)",
    )
    generate.add_argument("--max_new_tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    generate.add_argument("--top_k", type=int)
    generate.add_argument("--top_p", type=float)
    generate.add_argument("--samples", type=int, default=1)
    generate.add_argument("--seed", type=int, default=0, help="0 to 4294967295")

    evaluate = command("evaluate", _evaluate, "Evaluate a run's model on held-out data.")
    evaluate.add_argument("--workdir", required=True)
    evaluate.add_argument("--data", help="instead of the config's data.eval_source")

    export = command("export", _export, "Write a run's model as a directory transformers loads.")
    export.add_argument("--workdir", required=True)
    export.add_argument("--to", required=True, help="directory to be made")

    verify = command(
        "verify",
        _verify,
        "Find what a loss converges to, in a language small enough to enumerate.",
        usage="%(prog)s [-h] PACKAGE.MODULE:LOSS --kind {pair,token,reward} [--beta BETA] "
        "[--seed SEED]",
        epilog="""\
LOSS is a jax function, to be minimised; all its arguments are float arrays:

  pair    LOSS(chosen, rejected, ref_chosen, ref_rejected) -> [B]
  token   LOSS(log_probs, old, ref, rewards, mask) -> scalar; rewards [P,K], the others [P,K,T]
  reward  LOSS(chosen, rejected) -> [B]

Hyperparameters are bound in your module: my_loss = functools.partial(loss, beta=0.1). The module is
run: name only code that you trust. docs/verify.md has an example of every verdict.

Exit status: 0 the checks pass and the limit is the optimum; 1 they do not, or it is not; 2 the loss
cannot be called.""",
    )
    verify.add_argument("loss", metavar="PACKAGE.MODULE:LOSS")
    verify.add_argument("--kind", required=True, choices=("pair", "token", "reward"))
    verify.add_argument(
        "--beta",
        type=float,
        default=0.1,
        help="price of a nat of KL in the optimum of E[r] - beta KL; the loss's own (default 0.1)",
    )
    verify.add_argument(
        "--seed", type=int, default=0, help="of the reference and the rewards (default 0)"
    )
    return parser


def _train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from align_jax.algorithms import algorithm_of, settings_of
    from align_jax.config import load_config
    from align_jax.distributed.hosts import telling_failures
    from align_jax.distributed.mesh import initialize_distributed
    from align_jax.training.signals import Interrupted, stopping_between_loops
    from align_jax.training.workdir import Workdir, only_run_in

    config = settings_of(load_config(arguments.config, overrides))
    with stopping_between_loops(), telling_failures(except_for=Interrupted):
        initialize_distributed()
        workdir = Workdir(arguments.workdir, config)
        with only_run_in(workdir.path):
            if workdir.finished() is not None:
                print(
                    f"{workdir.path} is finished already. Give another --workdir to run it again."
                )
                return
            summary = algorithm_of(config).run(config, workdir)
            workdir.finish(summary)
    if "eval" in summary:
        print(json.dumps(summary["eval"], indent=2))
    print(f"Finished: {workdir.path}")


def _generate(arguments: argparse.Namespace, _: list[str]) -> None:
    import jax

    from align_jax.data.records import parse_record
    from align_jax.data.tokenise import encode_record
    from align_jax.errors import RunError
    from align_jax.generation import generate
    from align_jax.generation.sampler import check_options
    from align_jax.models.tokenizers import check_vocabulary, decode_completions
    from align_jax.settings import MAX_SEED

    if not 0 <= arguments.seed <= MAX_SEED:
        raise RunError(f"--seed is {arguments.seed}; expected 0 to {MAX_SEED}.")
    options = {
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "samples_per_prompt": arguments.samples,
        "max_new_tokens": arguments.max_new_tokens,
    }
    try:
        check_options(**options)
    except ValueError as error:
        raise RunError(str(error)) from error
    parse_record({"prompt": arguments.prompt}, kind="prompt", where="--prompt")
    model, tokenizer = _open(arguments.model)
    check_vocabulary(tokenizer, model.config, arguments.model)
    prompt: Any = arguments.prompt
    if tokenizer.chat_template and not arguments.raw:
        prompt = [{"role": "user", "content": prompt}]
    record = parse_record({"prompt": prompt}, kind="prompt", where="--prompt")
    example = encode_record(
        record,
        tokenizer,
        id=0,
        kind="prompt",
        max_length=model.config.context_length,
        special_tokens=arguments.special_tokens,
    )
    try:
        samples = generate(
            model,
            [example.prompt],
            key=jax.random.key(arguments.seed),
            stop_tokens=(tokenizer.eos_token_id,),
            **options,
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    rows = [tokens[mask > 0].tolist() for tokens, mask in zip(*jax.device_get(samples[:2]))]
    for text in decode_completions(tokenizer, rows, [example.prompt] * len(rows)):
        print(printable(text))  # a model can write what a terminal obeys


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> None:
    from align_jax.algorithms import OF_OWN_SAMPLES, algorithm_of, settings_of
    from align_jax.errors import RunError
    from align_jax.training.workdir import Workdir, read_config

    content = read_config(arguments.workdir)
    if not isinstance(content.get("algorithm"), str):
        raise RunError(
            f"{arguments.workdir} is not the workdir of a run: its config.json is something else's."
        )
    config = settings_of(content)
    workdir = Workdir(arguments.workdir, config)
    if config.algorithm in OF_OWN_SAMPLES:
        if arguments.data:
            raise RunError(
                f"a run of {config.algorithm} is evaluated on its own samples: no --data."
            )
    elif arguments.data:
        data = dataclasses.replace(config.data, eval_source=arguments.data)
        config = dataclasses.replace(config, data=data, evaluators=())
    elif not (config.data.eval_source or getattr(config, "held_out", 0) or config.evaluators):
        raise RunError(
            "the run's config has no data.eval_source; name the data with --data=SOURCE."
        )
    print(json.dumps(algorithm_of(config).evaluate(config, workdir), indent=2))


def _export(arguments: argparse.Namespace, _: list[str]) -> None:
    from align_jax.models.export import save_model
    from align_jax.training.workdir import read_config

    read_config(arguments.workdir)  # a workdir, and no other model
    model, tokenizer = _open(arguments.workdir)
    save_model(model, tokenizer, arguments.to)
    print(f"Wrote {arguments.to}")


def _verify(arguments: argparse.Namespace, _: list[str]) -> int:
    from align_jax.exact.verify import verify_named

    report = verify_named(
        arguments.loss, kind=arguments.kind, beta=arguments.beta, seed=arguments.seed
    )
    print(printable(str(report)))
    return 0 if report.passed else 1


def _open(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of a workdir, or of anything `load_model` reads."""
    from align_jax.errors import RunError
    from align_jax.models.loading import load_model
    from align_jax.models.tokenizers import load_tokenizer
    from align_jax.training import pretrained

    found = pretrained.run_at(path)
    if found is None:
        return load_model(path), load_tokenizer(path)
    if found.algorithm == "reward_model":
        raise RunError(
            f"{found.folder} is a run of a reward model, which writes no text; what transformers "
            f"loads is {found.folder / 'reward_model'}."
        )
    mesh = pretrained.open_mesh(found.config)
    return pretrained.load_pretrained(
        found.config, path, mesh
    ), pretrained.load_pretrained_tokenizer(path)
