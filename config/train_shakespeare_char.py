"""A small GPT on the characters of Shakespeare: nanoGPT's first example, with its values.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py

Minutes on a GPU, hours on a CPU. For a CPU nanoGPT makes it smaller:

    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 \\
        --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 \\
        --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
"""

out_dir = "out-shakespeare-char"
eval_interval = 250  # often: it overfits soon
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # only the weights with the lowest validation loss

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small model takes a high one
max_iters = 5000
lr_decay_iters = 5000  # as many as max_iters
min_lr = 1e-4  # a tenth of learning_rate
beta2 = 0.99  # few tokens in an iteration
warmup_iters = 100
