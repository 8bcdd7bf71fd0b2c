"""dpaudit: privacy audits for differentially private fine-tuning of vision-language models."""

__version__ = "0.1.0"
