"""Games on trainers and models that dpaudit did not write.

`trainer` audits `module:factory` (protocol in trainers.protocol) by up to four means: canaries inserted into its
records (`canaries`), canary gradients injected into its steps (`gradients`), many trainings with one canary in or out
(`runs`) and the step contract. `model` audits a checkpoint or adapter that is already trained, with its owner's coins.
"""
