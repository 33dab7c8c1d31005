"""Every attack by its name in a recipe; a new one is a class and one line here."""

from fedtune.attacks.attack import Attack, NoAttack, colluded
from fedtune.attacks.replies import Alie, Gauge, InnerProduct, ScaledUpdate, SignFlip
from fedtune.attacks.rows import Backdoor, LabelFlip, poisoned, triggered

__all__ = ["ATTACKS", "Attack", "colluded", "poisoned", "triggered"]

ATTACKS: dict[str, type[Attack]] = {
    "none": NoAttack,
    "sign_flip": SignFlip,
    "scaled_update": ScaledUpdate,
    "label_flip": LabelFlip,
    "alie": Alie,
    "inner_product": InnerProduct,
    "gauge": Gauge,
    "backdoor": Backdoor,
}
