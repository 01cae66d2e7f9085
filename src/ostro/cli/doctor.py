"""`ostro verify-resume`: hit a run on purpose, and see that nothing is lost."""

import tempfile
from pathlib import Path

from ostro.cli.arguments import Parser, explained, load_run
from ostro.doctor.verify_resume import Plan, check_ranks
from ostro.doctor.verify_resume import verify_resume as verify
from ostro.signals import Signals


def verify_resume(argv: list[str], signals: Signals) -> None:
    """`ostro verify-resume`: is a run that was killed and resumed the run it would have been?"""
    about = "Train N updates, kill, resume and train N more; compare with 2N in one go, bit by bit."
    parser = Parser("verify-resume", about)
    parser.add_config_path()
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="updates of each part")
    parser.add_argument(
        "--ranks", default="1,1", help="processes of each part: 1,2,1 resumes in two, then in one"
    )
    parser.add_argument(
        "--folder", help="where to work and leave everything; default: a temporary folder"
    )
    options, flags = parser.parse(argv)
    loaded = load_run(options.config_path, flags)
    plan = Plan(options.steps, check_ranks(options.ranks))
    with tempfile.TemporaryDirectory(prefix="ostro-verify-") as temporary:
        folder = Path(options.folder or temporary)
        explained(loaded, lambda: verify(loaded.config, plan, folder))
