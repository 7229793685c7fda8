"""llm.c's dev/data/hellaswag.py over llmc.datasets: writes hellaswag_val.bin into a folder beside this script.

llm.c's script evaluates a model (-m) on a device (-d) on the way. The file does not need one, so both are accepted and without
effect; `llmc eval` evaluates.
"""

from common import output_folder, parser, run

from llmc.datasets import hellaswag

if __name__ == "__main__":
    options = parser(__doc__, tokenizer=False)
    options.add_argument("-m", "--model_type", default="gpt2", help="without effect")
    options.add_argument("-d", "--device", default="cuda", help="without effect")
    args = options.parse_args()
    run(lambda: print(f"wrote {hellaswag.prepare(output_folder('hellaswag'), source=args.source)}"))
