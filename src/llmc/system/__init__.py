"""What the machine and the operating system offer: files, signals, memory, the GPU's clocks and peak. Knows no model and no run."""
