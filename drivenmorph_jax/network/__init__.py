"""DrivenMorph and its parts, the networks to compare it with, the training loss, the refinement and the inference."""
