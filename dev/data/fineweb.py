"""llm.c's dev/data/fineweb.py over llmc.datasets: writes the shards into a folder beside this script.

`llmc data fineweb --tokenized` does what llm.c's fineweb.sh and edu_fineweb.sh do.
"""

from common import output_folder, parser, run, tokenizer

from llmc.commands.data import print_token_files
from llmc.datasets import fineweb

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument(
        "-t", "--type", default="classic", choices=("edu", "classic"), help="FineWeb, or its educational part"
    )
    options.add_argument(
        "-v", "--version", default="10B", choices=("10B", "100B"), help="size of the sample, in tokens"
    )
    options.add_argument("-s", "--shard_size", type=int, default=10**8, help="tokens in a file")
    args = options.parse_args()
    folder = ("edu_fineweb" if args.type == "edu" else "fineweb") + args.version
    run(
        lambda: print_token_files(
            fineweb.prepare(
                output_folder(folder),
                kind=args.type,
                version=args.version,
                shard_size=args.shard_size,
                source=args.source,
                tokenizer=tokenizer(args),
                overwrite=True,  # as llm.c's script, which writes over the shards of an earlier run
            )
        )
    )
