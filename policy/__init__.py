"""RL with the reward model: TRL adapters, evaluation of a policy, the command line, the demo."""
