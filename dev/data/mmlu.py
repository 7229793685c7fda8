"""llm.c's dev/data/mmlu.py over llmc.datasets: writes mmlu_test.bin into a folder beside this script.

llm.c's script evaluates a model (-m) on a device (-d) and writes no file. Both options are accepted and without effect; `llmc eval`
evaluates.
"""

from common import output_folder, parser, run

from llmc.datasets import mmlu

if __name__ == "__main__":
    options = parser(__doc__, tokenizer=False)
    options.add_argument("-m", "--model_type", default="gpt2", help="without effect")
    options.add_argument("-d", "--device", default="cuda", help="without effect")
    args = options.parse_args()
    run(lambda: print(f"wrote {mmlu.prepare(output_folder('mmlu'), source=args.source)}"))
