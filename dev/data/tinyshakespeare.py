"""llm.c's dev/data/tinyshakespeare.py over llmc.datasets: writes the shards into a folder beside this script."""

from common import output_folder, parser, run, tokenizer

from llmc.commands.data import print_token_files
from llmc.datasets import tinyshakespeare

if __name__ == "__main__":
    args = parser(__doc__).parse_args()
    folder = output_folder("tinyshakespeare")
    run(lambda: print_token_files(tinyshakespeare.prepare(folder, source=args.source, tokenizer=tokenizer(args))))
