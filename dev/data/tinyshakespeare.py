"""llm.c's dev/data/tinyshakespeare.py over llmc.datasets: writes the shards into a folder beside this script."""

from common import output_folder, parser, tokenizer

from llmc.commands.data import print_written
from llmc.datasets import tinyshakespeare

if __name__ == "__main__":
    args = parser(__doc__).parse_args()
    print_written(
        tinyshakespeare.prepare(output_folder("tinyshakespeare"), source=args.source, tokenizer=tokenizer(args))
    )
