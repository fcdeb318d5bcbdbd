"""The reward model: rubric-tree attention, distillation, calibration, audit, scoring."""
