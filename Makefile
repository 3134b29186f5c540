.PHONY: all train test lint fmt doc bench coverage
all: lint test

train: ## the main job
	cargo run --release -- train

test:
	cargo test

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt:
	cargo fmt --all

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

bench:
	cargo bench --bench inference
	cargo bench --bench training

coverage: ## needs llvm-cov and llvm-profdata; LLVM=-19 where they are called llvm-cov-19
	dev/coverage.sh
