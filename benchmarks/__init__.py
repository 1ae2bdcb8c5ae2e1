"""The benchmarks, as a package: another distribution installs one of that name, which would else be found first."""
