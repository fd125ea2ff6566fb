"""Write a checkpoint as ONNX, torch.export or safetensors."""
