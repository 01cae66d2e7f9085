"""Let the model continue some prompts, so that one can read how it gets on."""

from collections.abc import Mapping, Sequence

from ostro.data.tokenizer import Tokenizer
from ostro.generate.sampling import SamplingConfig, complete_all
from ostro.runtime.phase import enter_phase
from ostro.trainer.callbacks.callback import Callback
from ostro.trainer.trainer import Trainer


class Sampling(Callback):
    """Draws a continuation of each prompt at each evaluation."""

    def __init__(self, prompts: Sequence[str], config: SamplingConfig, tokenizer: Tokenizer):
        self._prompts, self._config, self._tokenizer = prompts, config, tokenizer

    def after_evaluation(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        agree = trainer.interruption.agree
        if trainer.world.is_first or trainer.engine.is_collective:
            texts = complete_all(
                trainer.state.model,
                self._tokenizer,
                self._prompts,
                self._config,
                poll=lambda: agree(ready=False),
            )
            for index, text in enumerate(texts):
                trainer.tracker.log_text(f"sample/{index}", text, step=step)
        # The other ranks wait here, and answer once for every token: a signal is heeded meanwhile.
        while not agree():
            enter_phase("sample")
