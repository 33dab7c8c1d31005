"""Every strategy by its name in a recipe; a new one is one file and one line here."""

from fedtune.strategies.fed_sb import FedSB
from fedtune.strategies.fedalt import FedALT
from fedtune.strategies.feddpa import FedDPA
from fedtune.strategies.fedex_lora import FedExLoRA
from fedtune.strategies.fedit import FedIT
from fedtune.strategies.fedmomentum import FedMomentum
from fedtune.strategies.fedrot import FedRot
from fedtune.strategies.fedsa_lora import FedSALoRA
from fedtune.strategies.fedsvd import FedSVD
from fedtune.strategies.ffa_lora import FFALoRA
from fedtune.strategies.flexlora import FlexLoRA
from fedtune.strategies.flexlora_sum import FlexLoRASum
from fedtune.strategies.flora import FLoRA
from fedtune.strategies.flora_sum import FLoRASum
from fedtune.strategies.frlora import FRLoRA
from fedtune.strategies.hetlora import HetLoRA
from fedtune.strategies.hetlora_sum import HetLoRASum
from fedtune.strategies.lora_a2 import LoRAA2
from fedtune.strategies.lora_fair import LoRAFAIR
from fedtune.strategies.oracle import Oracle
from fedtune.strategies.pf2lora import PF2LoRA
from fedtune.strategies.ravan import Ravan
from fedtune.strategies.references import Centralized, LocalOnly
from fedtune.strategies.rolora import RoLoRA
from fedtune.strategies.scaffold import Scaffold
from fedtune.strategies.strategy import Strategy

__all__ = ["STRATEGIES", "Strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    "fedit": FedIT,
    "ffa_lora": FFALoRA,
    "rolora": RoLoRA,
    "flora": FLoRA,
    "flora_sum": FLoRASum,
    "flexlora": FlexLoRA,
    "flexlora_sum": FlexLoRASum,
    "fedsa_lora": FedSALoRA,
    "fedsvd": FedSVD,
    "scaffold": Scaffold,
    "hetlora": HetLoRA,
    "hetlora_sum": HetLoRASum,
    "fedex_lora": FedExLoRA,
    "fedmomentum": FedMomentum,
    "frlora": FRLoRA,
    "lora_fair": LoRAFAIR,
    "fedrot": FedRot,
    "fed_sb": FedSB,
    "ravan": Ravan,
    "lora_a2": LoRAA2,
    "feddpa": FedDPA,
    "pf2lora": PF2LoRA,
    "fedalt": FedALT,
    "local_only": LocalOnly,
    "centralized": Centralized,
    "oracle": Oracle,
}
