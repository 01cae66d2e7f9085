"""One way to disks and object stores, and to the files that torch and safetensors write."""
