def sharpen(model, factor: float = 4.0):
    """Random weights give flat logits, where every choice is a near-tie; larger ones give decided answers."""
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(factor)
    return model.eval()
