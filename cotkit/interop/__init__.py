"""Bridges to the training and serving engines: the only room that knows TRL, vLLM or verl by name.

A bridge is thin. It turns rows, losses and rewards of the other rooms into what the engine expects and adds
no idea of its own. Engines are imported inside the functions that need them, never by ``import cotkit``.
Files: ``trl`` (supervised and preference losses inside ``SFTTrainer``; rewards need no bridge,
``GRPOTrainer`` takes them as they are), ``trl_grpo`` (advantages inside ``GRPOTrainer``), ``verl``
(advantages, policy losses and rewards by name), ``peft`` (an adapter folded back into its base).
"""

from cotkit.interop import peft, trl, trl_grpo, verl

__all__ = ["peft", "trl", "trl_grpo", "verl"]
