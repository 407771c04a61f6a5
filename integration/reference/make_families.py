"""Make the fixtures whose weights are generated at test time.

python make_families.py                    all that transformers 5 knows
python make_families.py bloom phi3         these only
python make_families.py --remote SOURCES   all that published modelling files compute; see README.md
"""

import sys

import torch
import transformers

import goldens


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the same order of summation everywhere
    arguments = sys.argv[1:]
    if arguments[:1] == ["--remote"]:
        import families_remote
        import remote

        reference, specs = remote.Reference(arguments[1]), families_remote.SPECS
        arguments = arguments[2:]
    else:
        import families_gated
        import families_moe
        import families_plain
        import native

        reference, specs = native, families_plain.SPECS + families_gated.SPECS + families_moe.SPECS
    unknown = set(arguments) - {spec.name for spec in specs}
    if unknown:
        raise SystemExit(f"unknown fixtures: {sorted(unknown)}")
    for spec in specs:
        if not arguments or spec.name in arguments:
            goldens.make(reference, spec)


if __name__ == "__main__":
    main()
