"""The recipe `finetune` beside what people would fine-tune the same weights with."""
