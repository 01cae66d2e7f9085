"""What happens beside the steps of a run: callbacks that the trainer calls in their order."""

from ostro.trainer.callbacks.callback import Callback, CallbackConfig, StepInfo, is_due
