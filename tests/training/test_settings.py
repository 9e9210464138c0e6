"""Settings from recipes and the command line: what wins, what is refused and by what name."""

import re
from pathlib import Path

import pytest
import yaml

from bivec.training import STAGES, read_settings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NEEDED = ["--model", "m", "--data", "a.txt", "--output", "run"]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_wins_over_the_recipe_and_that_over_the_defaults(recipe):
    path = recipe("stage: mntp\nmodel: base\nlearning_rate: 5e-4\nmax_steps: 7\nmask_style: all_mask\n")
    settings = read_settings(
        "mntp", ["--recipe", path, "--data", "a", "b", "--output", "run", "--max-steps", "9", "--lora_r", "4"]
    )
    assert (settings.model, settings.learning_rate, settings.max_steps, settings.lora_r) == ("base", 5e-4, 9, 4)
    assert (settings.mask_style, settings.data, settings.batch_size) == ("all_mask", ["a", "b"], 32)


def test_booleans_and_lists_on_the_command_line():
    settings = read_settings(
        "supervised", [*NEEDED, "--symmetric", "--continue-adapter", "--dims", "8", "16", "--target_modules", "q_proj"]
    )
    assert (settings.symmetric, settings.continue_adapter, settings.dims) == (True, True, [8, 16])
    assert settings.target_modules == ["q_proj"]
    assert read_settings("pretrain", [*NEEDED, "--no-full-finetuning"]).full_finetuning is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: simcse\n", "is a recipe of stage 'simcse', not of 'mntp'"),
        ("stage: mntp\nlerning_rate: 1\n", "no field 'lerning_rate' in stage mntp"),
        ("stage: mntp\nmax_steps: many\n", "max_steps must be a whole number, got 'many'"),
        ("stage: mntp\nlearning_rate: fast\n", "learning_rate must be a number, got 'fast'"),
        ("stage: mntp\ntrain_head: 1\n", "train_head must be a boolean, got 1"),
        ("stage: mntp\ndata: a.txt\n", "data must be a list of strings, got 'a.txt'"),
        ("- mntp\n", "must be a mapping of fields, got list"),
        ("stage: mntp\nlearning_rate: .inf\n", "learning_rate must be a finite number, got inf"),
        ("stage: mntp\nmodel: 2026-13-45\n", "must be YAML: month must be in 1..12"),
        ("data: &a [x, x]\neval_data: *a\n", r"lists of values, got the alias \*a"),
        ("data:\n" + "".join(f"- {'[' * n}{']' * n}\n" for n in (1, 30_000)), "lists of values, got deeper nesting"),
        ("a: [1\n", "must be YAML"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        read_settings("mntp", ["--recipe", recipe(text), "--model", "m", "--output", "run"] + (
            [] if "data" in text else ["--data", "a.txt"]
        ))  # fmt: skip


def test_a_missing_recipe_and_an_unknown_stage():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such recipe"):
        read_settings("mntp", ["--recipe=nowhere.yaml", *NEEDED])
    with pytest.raises(ValueError, match="must be one of pretrain, mntp, simcse, supervised, got 'mlm'"):
        read_settings("mlm", NEEDED)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("mntp", ["--lora_r", "0"], "lora_r must be at least 1, got 0"),
        ("mntp", ["--mask_probability", "0"], r"mask_probability must be in \(0, 1\], got 0.0"),
        ("mntp", ["--block_size", "1"], "block_size must be 0 or at least 2, got 1"),
        ("mntp", ["--token_budget", "100", "--max_length", "200"], r"at least max_length \(200\), got 100"),
        ("supervised", ["--dims", "8", "0"], r"dims must be sizes of at least 1, got \[8, 0\]"),
        ("mntp", ["--resume", "--overwrite"], "resume and overwrite must not both"),
        ("mntp", ["--full_finetuning", "--continue_adapter"], "full_finetuning and continue_adapter"),
        ("pretrain", ["--random_weights", "--no_full_finetuning"], "random_weights needs full_finetuning"),
        ("simcse", ["--attention_dropout", "0", "--lora_dropout", "0"], "both views are the same vector"),
        ("simcse", ["--learning-rate", "inf"], "learning_rate must be a finite number, got inf"),
        ("simcse", ["--adam_epsilon", "nan"], "adam_epsilon must be a finite number, got nan"),
        ("simcse", ["--output", ""], "output must be a folder, got ''"),
        ("simcse", ["--temperature", "0"], "temperature must be above 0, got 0.0"),
        ("simcse", ["--batch_size", "1"], "batch_size must be at least 2"),
        ("simcse", ["--attention_dropout", "1"], r"attention_dropout must be in \[0, 1\), got 1.0"),
        ("supervised", ["--seed", "-1"], r"seed must be in \[0, 2 \*\* 63\), got -1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(stage, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_settings(stage, [*NEEDED, *arguments])


@pytest.mark.parametrize(
    ("stage", "given", "lengths", "notes"),
    [
        ("mntp", {}, (256, 256), ["block_size is 256, not 512: the model has no more positions"]),
        ("mntp", {"block_size": 0}, (256, 0), ["max_length is 256, not 512: the model has no more positions"]),
        ("pretrain", {"block_size": 64, "max_length": 200}, (200, 64), []),
        ("supervised", {}, (256, None), ["max_length is 256, not 512: the model has no more positions"]),
        ("simcse", {}, (128, None), []),
    ],
)
def test_lengths_that_nobody_asked_for_are_within_the_models_positions(stage, given, lengths, notes):
    settings, said = STAGES[stage](model="m", data=["a"], output="o", **given).within(256)
    assert (settings.max_length, getattr(settings, "block_size", None)) == lengths
    assert said == notes
    assert settings.within(256) == (settings, [])


def test_a_length_beyond_the_models_positions_is_refused():
    for name in ("max_length", "block_size"):
        with pytest.raises(ValueError, match=f"{name} must be at most the model's 256 positions, got 257"):
            STAGES["mntp"](model="m", data=["a"], output="o", **{name: 257}).within(256)
    with pytest.raises(ValueError, match=r"token_budget must be at least max_length \(256\), got 100"):
        STAGES["supervised"](model="m", data=["a"], output="o", token_budget=100).within(256)


def test_every_recipe_of_the_project_can_be_read():
    paths = sorted(path for path in RECIPES.glob("*/*.yaml") if path.name != "ladder.yaml")
    assert len(paths) >= 23
    for path in paths:
        stage = yaml.safe_load(path.read_text())["stage"]
        settings = read_settings(stage, ["--recipe", str(path), "--data", "a.txt", "--output", "run", "--model", "m"])
        assert settings.stage == stage


def test_a_yaml_bomb_is_refused_before_it_is_expanded(recipe):
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    with pytest.raises(ValueError, match=r"got the alias \*a0"):
        read_settings("mntp", ["--recipe", recipe("\n".join(lines)), *NEEDED])


def test_a_recipe_within_the_output_is_refused(tmp_path, recipe):
    path = recipe("stage: mntp\n")
    with pytest.raises(ValueError, match=r"would overwrite the input .*recipe\.yaml"):
        read_settings("mntp", ["--recipe", path, "--model", "m", "--data", "a.txt", "--output", str(tmp_path)])


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_field_once_with_its_default(stage, capsys):
    with pytest.raises(SystemExit) as exit_info:
        read_settings(stage, ["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    defaults = vars(read_settings(stage, NEEDED))
    options = re.findall(r"^  (--[\w-]+)", shown, re.MULTILINE)
    assert set(options) >= {f"--{name.replace('_', '-')}" for name in defaults}
    assert len(options) == len(set(options))
    assert not re.findall(r"--\w+_\w+", shown)
    assert f"(default: {defaults['batch_size']})" in shown
    assert f"(default: {defaults['learning_rate']})" in shown
