"""What an owner's model takes: pictures with questions, or text. Each kind reads records, loads models and scores.

The type of the base model decides, before the records are opened.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from attacks import blind
from attacks.external import records, texts
from attacks.external.options import ModelOptions
from attacks.external.texts import TextUnit
from attacks.scores import losses
from dpaudit.errors import UsageError
from trainers import adapter_files, model_files
from trainers.data.local import PICTURE_UNIT
from trainers.opened import told_as
from trainers.records import Unit
from trainers.text import CausalLanguageModel, Tokens, is_text_model, template_in
from trainers.vlm import VisionLanguageModel

TEXT_UNIT = "text (all rows of one id)"

Floats = npt.NDArray[np.float64]
Log = Callable[[str], None]
U = TypeVar("U")
M = TypeVar("M")


class Kind(ABC, Generic[U, M]):
    """U: a unit. M: a model. unit: in words, for the claim. thing: what no two ids may share."""

    unit: ClassVar[str]
    thing: ClassVar[str]

    def __init__(self, options: ModelOptions) -> None:
        self.options = options

    @abstractmethod
    def read(self) -> dict[str, U]:
        """The owner's units by id."""

    @abstractmethod
    def shared(self, units: Mapping[str, U]) -> list[tuple[str, str]]:
        """Pairs of ids that hold the same thing."""

    @abstractmethod
    def features(self, units: Sequence[U]) -> Floats:
        """(n, columns) numbers for the blind baseline."""

    @abstractmethod
    def load(self, source: str, flag: str, *, fetch: bool) -> M:
        """A whole model."""

    @abstractmethod
    def losses(self, model: M, units: Sequence[U], log: Log) -> Floats:
        """(n,) one loss a unit, the mean over its rows."""

    def base(self) -> M:
        """--base: typed by the auditor, so that a hub id may be fetched."""
        return self.load(self.options.base, "--base", fetch=True)

    def trained(self) -> M:
        """--base with the adapter on top, or the checkpoint. UsageError when they don't fit together."""
        base: Any = self.base()
        if (self.options.model / adapter_files.SETTINGS).is_file():
            base.load_adapter(self.options.model, "--model")
            adapted: M = base
            return adapted
        model: Any = self.load(str(self.options.model.resolve()), "--model", fetch=False)
        ours, theirs = ({name: tuple(one.shape) for name, one in item.hf.named_parameters()} for item in (model, base))
        different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if different:
            raise UsageError(
                f"--base {self.options.base}: is not what --model was fine-tuned from: {len(different)} weights differ "
                f"in name or shape, the first is {different[0]}"
            )
        whole: M = model
        return whole

    def scores(self, units: Sequence[U], log: Log) -> tuple[Floats, Floats]:
        """(n,) losses under the base model and under the trained one."""
        log(f"losses of {len(units)} records under the base model")
        base = self.base()
        with told_as("--base: can't be run on the records"):
            before = self.losses(base, units, log)
        del base
        log("losses under the trained model")
        trained = self.trained()
        with told_as("--model: can't be run on the records"):
            return before, self.losses(trained, units, log)


class Pictures(Kind[Unit, VisionLanguageModel]):
    """A vision-language model."""

    unit, thing = PICTURE_UNIT, "picture"

    def read(self) -> dict[str, Unit]:
        return records.read_units(self.options.records, self.options.images)

    def shared(self, units: Mapping[str, Unit]) -> list[tuple[str, str]]:
        return records.shared_pictures(units)

    def features(self, units: Sequence[Unit]) -> Floats:
        return blind.features(units)

    def load(self, source: str, flag: str, *, fetch: bool) -> VisionLanguageModel:
        path = None if source == "reference" else source
        return VisionLanguageModel.load(path, device=self.options.device, fetch=fetch, flag=flag)

    def losses(self, model: VisionLanguageModel, units: Sequence[Unit], log: Log) -> Floats:
        return losses(model, units)


class Texts(Kind[TextUnit, CausalLanguageModel]):
    """A causal language model."""

    unit, thing = TEXT_UNIT, "text"

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.tokens: list[Tokens] = []

    def read(self) -> dict[str, TextUnit]:
        if self.options.images is not None:
            raise UsageError("--images: --base is a text model; accepted: records with text alone")
        return texts.read_texts(self.options.records)

    def shared(self, units: Mapping[str, TextUnit]) -> list[tuple[str, str]]:
        return texts.shared_texts(units)

    def features(self, units: Sequence[TextUnit]) -> Floats:
        return texts.features(units)

    def load(self, source: str, flag: str, *, fetch: bool) -> CausalLanguageModel:
        return CausalLanguageModel.load(source, device=self.options.device, fetch=fetch, flag=flag)

    def losses(self, model: CausalLanguageModel, units: Sequence[TextUnit], log: Log) -> Floats:
        """Both models are given the same tokens: those of the base, in the template beside the trained one."""
        owner = [place for place, unit in enumerate(units) for _ in unit.texts]
        if not self.tokens:
            model.template = template_in(self.options.model) or model.template
            made = model.tokens([text for unit in units for text in unit.texts])
            self.tokens, cut = _fitting(made, model.longest)
            if cut:
                log(f"warning: {cut} texts have more than {model.longest} tokens; their beginnings are scored")
            for place, item in zip(owner, self.tokens, strict=True):
                if not item.counts.any():
                    raise UsageError(f"--records: nothing of id {units[place].id!r} is scored: too short, or cut off")
        found = model.losses(self.tokens)
        return np.bincount(owner, found, len(units)) / np.bincount(owner, minlength=len(units))


def _fitting(tokens: Sequence[Tokens], longest: int | None) -> tuple[list[Tokens], int]:
    """Texts cut to the model's context, and how many were."""
    if longest is None:
        return list(tokens), 0
    cut = [Tokens(item.ids[:longest], item.counts[:longest]) for item in tokens]
    return cut, sum(len(item.ids) > longest for item in tokens)


def kind_of(options: ModelOptions) -> Kind[Any, Any]:
    """By the type of --base, and of --model where it is a whole checkpoint."""
    if options.base == "reference":
        return Pictures(options)
    folder = model_files.find(options.base, "--base", fetch=True)
    text = is_text_model(model_files.model_type(folder, "--base:"))
    if text and (options.model / model_files.CONFIG).is_file():
        own = model_files.model_type(options.model, "--model:")
        if not is_text_model(own):
            raise UsageError(f"--model {options.model}: is of type {own:.60}, --base is a text model; they must match")
    return Texts(options) if text else Pictures(options)
