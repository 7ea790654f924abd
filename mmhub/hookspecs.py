"""The hooks a plugin may implement, in the module that its `mmhub` entry point names.

A plugin marks its implementation with `mmhub.spec.hookimpl` and lists the hook's name under `hooks` in its manifest;
the module is imported only when one of those fires. Arguments are passed by name, and new ones are only ever added, so
an implementation may take fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from mmhub.engine.report import TrainRun
    from mmhub.interfaces import Decoder, Encoder, ForeignReader, ForeignWriter
    from mmhub.model import Model
    from mmhub.spec import DataSource, Guard, Tracker

hookspec = pluggy.HookspecMarker("mmhub")


@hookspec
def mmhub_train_callbacks(run: TrainRun) -> Iterable[Tracker]:  # type: ignore[empty-body]  # pluggy wants functions, not a class
    """Return (or yield) `Tracker` objects that watch one training run, such as an experiment tracker.

    Called once per run, on rank 0 only, before the first step, as all their methods are.

    Args:
        run: the training run. `run.folder` is the run folder (a `Path`), `run.config` the resolved recipe as plain
            data, `run.total_steps` the number of optimizer steps planned.
    """


@hookspec
def mmhub_datasets() -> Iterable[DataSource]:  # type: ignore[empty-body]
    """Return (or yield) `DataSource` records: schemes of data addresses, such as `sql:` in `train = "sql:sales.db"`.

    Called when a recipe, `eval` or `predict --data` names data with a scheme that is not the core's own (`hub:`). It
    should only name the schemes; reading starts when the source's `open(request)` is called. Errors of
    `mmhub.errors` that `open` raises are shown to the user as they are, any other as the plugin's failure.
    """


@hookspec
def mmhub_generation_guards(model: Model) -> Iterable[Guard]:  # type: ignore[empty-body]
    """Return (or yield) `Guard` objects that watch what goes into `model` and what it answers.

    Called once per model, before its first answer through `predict`, `generate` or `chat`, in the library, on the
    command line and in the server alike. They stand behind the model's own guards, components that its recipe or
    checkpoint names, and those of MMHUB_GUARDS. Guard by guard, each sample may be rewritten (`rewrite`, if there is
    one) and passes `check`; the first that objects makes the answer `{"refused": REASON, "guard": NAME}`, and the model
    never sees the sample. Then every guard may change or refuse the answer in `review`. Refusals and changes are logged
    (logger "mmhub.guards", and the file MMHUB_GUARD_LOG). `eval` and training measure the model itself, without guards.
    A plugin that fails here stops `predict`: an installed guard is never left out in silence.

    Args:
        model: the model, for guards that only watch some: `model.task.name`, `model.modalities`.
    """


@hookspec
def mmhub_load_foreign(folder: Path, config: Mapping[str, Any]) -> Iterable[ForeignReader]:  # type: ignore[empty-body]
    """Return a `ForeignReader` if this plugin reads the model in `folder`, which another library wrote; else nothing.

    Called when a name leads to a folder or repository that is no mmhub checkpoint. It should decide by `config` and
    import a heavy library only for a model that is its own. The reader's `read(folder)` is called later, with all
    files there; errors it raises are shown to the user. Only JSON, tokenizer files and safetensors may be read, and
    no code from the folder may run. A model that will not be read for a reason worth telling gets a reader with a
    `refusal`.

    Args:
        folder: where config.json is; of a Hub repository nothing else needs to be there yet.
        config: the content of config.json, {} if there is none.
    """


@hookspec
def mmhub_write_foreign(  # type: ignore[empty-body]
    encoder: Encoder, decoder: Decoder | None, layout: str
) -> Iterable[ForeignWriter]:
    """Return a `ForeignWriter` if `encoder` is one of this plugin's and `layout` one it can write; else nothing.

    Called to publish a model of one encoder for users of another library. The writer's `write(folder)` is called
    with an empty folder; it raises UsageError if the model cannot be expressed there, for instance for its head.

    Args:
        encoder: the model's only encoder; of a language model, which reads text itself, its decoder.
        decoder: its head, None if it has none.
        layout: "transformers", "sentence-transformers", "timm", or what a plugin calls its own.
    """


def hook_names() -> tuple[str, ...]:
    """Return the names of all hooks of this version of mmhub."""
    return tuple(name for name in globals() if name.startswith("mmhub_"))
