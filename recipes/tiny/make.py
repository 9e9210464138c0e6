"""The tiny ladder from raw text to the bundled encoder, in one command that can be killed and given again.

    python recipes/tiny/make.py --wiki wiki.txt.gz --sentences tatoeba.txt.gz --books gutenberg --pairs nli.csv \
        --evaluate sts=stsb classification=senteval-cls words=word-sim --output tiny

It writes texts and tokenizer (`prepare.py`), pretrains the base, climbs `ladder.yaml`, scores every rung on the
development and the test split (what `--evaluate` names, as in `bivec.benchmarks.ladder`), exports the rung that ships
with bivec to OUTPUT/encoder, and scores that one as it is exported.
"""

import argparse
import shutil
from pathlib import Path

from prepare import prepare

from bivec.benchmarks import ladder
from bivec.engine.export import export
from bivec.evaluation.report import table
from bivec.evaluation.tasks import EvaluateSettings, evaluate
from bivec.training import read_settings, train

HERE = Path(__file__).resolve().parent
SHIPPED = "crops-supervised"  # the rung, chosen on the development split
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wiki", "sentences", "books", "pairs", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--evaluate", type=ladder.named_file, nargs="+", required=True, metavar="TASK=DATA")
    arguments = parser.parse_args()
    output = arguments.output
    if not (output / "model" / "config.json").is_file():  # written last
        prepare(arguments.wiki, arguments.sentences, arguments.books, output)

    base = output / "pretrain"
    given = ["--recipe", HERE / "pretrain.yaml", "--model", output / "model", "--data", output / "pretrain.txt"]
    given += ["--eval-data", output / "held-out.txt", "--output", base, "--device", "cpu", "--resume"]
    print(train(read_settings("pretrain", [str(part) for part in given])))

    for split in ("dev", "test"):
        climbed = [HERE / "ladder.yaml", "--model", base, "--runs", output / "runs", "--seeds", SEED, "--split", split]
        climbed += ["--data", f"texts={output / 'sentences.txt'}", f"crops={output / 'crops.jsonl'}"]
        climbed += [f"pairs={arguments.pairs}", "--evaluate", *(f"{task}={data}" for task, data in arguments.evaluate)]
        climbed += ["--output", output / f"ladder-{split}.json", "--report", output / f"ladder-{split}.html"]
        ladder.main([str(part) for part in climbed])

    shutil.rmtree(output / "encoder", ignore_errors=True)
    export(output / "runs" / f"seed-{SEED}" / SHIPPED, output / "encoder")
    for task, data in arguments.evaluate:
        written = output / f"{task}-{data.resolve().name}.json"
        settings = EvaluateSettings(task, str(data), str(output / "encoder"), output=str(written), overwrite=True)
        print("\n".join(table(evaluate(settings))))


if __name__ == "__main__":
    main()
