"""Our file in vLLM's workers, with a fault that can be switched on: a head that stays packed as it was."""

import llm_trainer_vllm  # type: ignore[import-not-found]

_right = llm_trainer_vllm.pack_again


class FaultyWorker(llm_trainer_vllm.TrainerWorker):  # type: ignore[misc]
    """Joined to vLLM's worker."""

    def llm_trainer_leave_head_old(self) -> None:
        """From now on."""
        llm_trainer_vllm.pack_again = lambda model: None

    def llm_trainer_pack_again(self) -> None:
        """As it is meant to be."""
        llm_trainer_vllm.pack_again = _right
