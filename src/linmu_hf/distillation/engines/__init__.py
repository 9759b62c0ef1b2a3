"""Several processes, and the engines that spread a distillation over them: DDP, FSDP2, ZeRO-2 and ZeRO-3."""
